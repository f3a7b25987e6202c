"""transformers models as GGUF files, written by the gguf package: the oracle of the tests of our reader and our export.

Tensor names are those of llama.cpp's own table (gguf.get_tensor_name_map), keys those of gguf.GGUFWriter's methods, and what
is done to a tensor follows the classes of llama.cpp's convert_hf_to_gguf.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

gguf = pytest.importorskip("gguf")

ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "gpt_neox": "gptneox",
}
"""What llama.cpp calls a `model_type`, where it calls it otherwise."""


def architecture_of(config: Any) -> str:
    """GGUF's name of the architecture of a transformers config."""
    return ARCHITECTURES.get(config.model_type, config.model_type)


def permute(weights: np.ndarray, n_head: int, n_head_kv: int | None) -> np.ndarray:
    """As llama.cpp's convert_hf_to_gguf.py has it."""
    if n_head_kv is not None and n_head != n_head_kv:
        n_head = n_head_kv
    return weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def unfused(model: transformers.PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model, its experts' gates and ups apart: transformers holds them in one, GGUF in two."""
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            yield name.replace("gate_up_proj", "gate_proj.weight"), gate.contiguous()
            yield name.replace("gate_up_proj", "up_proj.weight"), up.contiguous()
        else:
            yield (f"{name}.weight" if name.endswith("experts.down_proj") else name), tensor


def write_model(
    path: Path,
    model: transformers.PreTrainedModel,
    *,
    dtype: str = "F32",
    extra: dict[str, Any] | None = None,
    raw: dict[str, tuple[np.ndarray, str]] | None = None,
) -> None:
    """Write a tiny transformers model as llama.cpp's converter does; `extra` are further tensors.

    `raw` has the rows of blocks, and their type, of matrices that are quantised already, by transformers' names.
    """
    config = model.config
    architecture = architecture_of(config)
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    _write_keys(writer, config)
    for name, tensor in unfused(model):
        if name in ("lm_head.weight", "embed_out.weight") and config.tie_word_embeddings:
            continue
        if name.endswith((".attn.bias", ".attention.bias", ".masked_bias")):
            continue
        if raw is not None and name in raw:
            kind = gguf.GGMLQuantizationType[raw[name][1]]
            data = np.ascontiguousarray(_as_converted(raw[name][0], name, config))
        else:
            array = _as_converted(tensor.numpy(), name, config)
            is_router = name.endswith("mlp.gate.weight")
            kind = gguf.GGMLQuantizationType[dtype if array.ndim >= 2 and not is_router else "F32"]
            data = gguf.quants.quantize(np.ascontiguousarray(array, dtype=np.float32), kind)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        writer.add_tensor(theirs, data, raw_dtype=kind)
    for name, array in {**_rope_factors(config), **(extra or {})}.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def blocky_model(*, width: int = 64) -> transformers.LlamaForCausalLM:
    """A Llama whose rows are whole blocks of 32, or of 256 when it is so wide."""
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=width,
        intermediate_size=96 if width == 64 else 2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def blocky_experts() -> transformers.Qwen3MoeForCausalLM:
    """A mixture of experts whose rows are whole blocks of 32."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=96,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(config).eval()


def _write_keys(writer: Any, config: Any) -> None:
    architecture = architecture_of(config)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(heads)
    if architecture == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if architecture == "gptneox":
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_layer_norm_eps(config.layer_norm_eps)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture == "phi3":
        original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_sliding_window(config.sliding_window or 0)
        if "long_factor" in rope:
            stretch = config.max_position_embeddings / original
            writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(stretch) / np.log(original))) if stretch > 1 else 1.0)
        return
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if architecture == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if getattr(config, "num_experts", None):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))


def _as_converted(array: np.ndarray, name: str, config: Any) -> np.ndarray:
    architecture, heads = architecture_of(config), config.num_attention_heads
    if architecture in ("llama", "granite", "smollm3") and ("q_proj" in name or "k_proj" in name):
        return permute(array, heads, config.num_key_value_heads if "k_proj" in name else None)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return array + 1
    if architecture == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return array.T
    if "query_key_value" in name:  # turns head by head become three blocks
        by_head = array.reshape(heads, 3, config.hidden_size // heads, *array.shape[1:])
        return np.concatenate([by_head[:, part].reshape(-1, *array.shape[1:]) for part in range(3)])
    return array


def _rope_factors(config: Any) -> dict[str, np.ndarray]:
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], dtype=np.float32)
        for length in ("long", "short")
        if f"{length}_factor" in rope
    }


_HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where a block of each K-quant has its float16 scales (and minimums): ggml-common.h's block_q2_K to block_q6_K."""


def random_blocks(num_rows: int, num_columns: int, kind: str, rng: np.random.Generator) -> np.ndarray:
    """(num_rows, bytes a row) of a K-quant, every bit of which is used; the package cannot quantise to these types."""
    block, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (num_rows * num_columns // block, num_bytes), dtype=np.uint8)
    for place in _HALVES[kind]:
        scales = rng.uniform(2e-4, 4e-4, (len(blocks), 1)).astype("<f2")
        blocks[:, place : place + 2] = scales.view(np.uint8)
    return blocks.reshape(num_rows, -1)


def k_quantised_model(kinds: tuple[str, ...]) -> tuple[transformers.LlamaForCausalLM, dict[str, tuple[np.ndarray, str]]]:
    """A Llama whose matrices hold the numbers of random blocks, of these types by turns, and the blocks by name."""
    model, rng, raw = blocky_model(width=256), np.random.default_rng(0), {}
    with torch.no_grad():
        for i, (name, parameter) in enumerate((n, p) for n, p in model.named_parameters() if p.ndim == 2):
            kind = kinds[i % len(kinds)]
            raw[name] = random_blocks(*parameter.shape, kind, rng), kind
            numbers = gguf.quants.dequantize(raw[name][0], gguf.GGMLQuantizationType[kind])
            parameter.copy_(torch.from_numpy(numbers.reshape(parameter.shape).copy()))
    return model, raw
