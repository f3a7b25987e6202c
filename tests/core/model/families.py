"""Tiny random transformers models of every family, the oracles of the parity tests."""

from typing import Any

import torch
import transformers

VOCAB = 97
_SMALL = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1}
_TRUNK = {
    **_SMALL,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_GPT2 = {**_SMALL, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_HALF = {"partial_rotary_factor": 0.5}
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
_PAD = {"pad_token_id": None}  # transformers gives the embedding of the padding no gradient
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e3,
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-tied": ("gpt2", _GPT2),
    "gpt2-free-head": ("gpt2", {**_GPT2, "tie_word_embeddings": False, "n_inner": 40}),
    "gpt2-gelu": ("gpt2", {**_GPT2, "activation_function": "gelu", "layer_norm_epsilon": 1e-3}),
    "gpt2-relu": ("gpt2", {**_GPT2, "activation_function": "relu"}),
    "llama-mha": ("llama", _TRUNK),
    "llama-gqa-tied": ("llama", {**_TRUNK, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-mqa-biases": ("llama", {**_TRUNK, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {**_TRUNK, "head_dim": 16, "num_key_value_heads": 2}),
    "llama-gelu": ("llama", {**_TRUNK, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3}),
    "llama-rope-llama3": ("llama", {**_TRUNK, "head_dim": 16, "rope_parameters": _LLAMA3}),
    "llama-rope-linear": ("llama", {**_TRUNK, "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}),
    "llama-rope-yarn": (
        "llama",
        {
            **_TRUNK,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
        },
    ),
    "llama-rope-yarn-mscale": (
        "llama",
        {
            **_TRUNK,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "mscale": 0.7,
                "mscale_all_dim": 0.4,
                "beta_fast": 8.0,
                "beta_slow": 2.0,
            },
        },
    ),
    "qwen2-gqa": ("qwen2", {**_TRUNK, "num_key_value_heads": 2}),
    "qwen2-window": (
        "qwen2",
        {
            **_TRUNK,
            "num_key_value_heads": 4,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-head-dim": ("qwen3", {**_TRUNK, "num_key_value_heads": 2, "head_dim": 16}),
    "qwen3-tied-biases": (
        "qwen3",
        {**_TRUNK, "num_key_value_heads": 4, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "llama-rope-dynamic": ("llama", {**_TRUNK, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}}),
    "gpt_neox-quarter": ("gpt_neox", {**_TRUNK, "hidden_size": 64}),
    "gpt_neox-sequential-tied": (
        "gpt_neox",
        {**_TRUNK, "use_parallel_residual": False, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 500.0, **_HALF}},
    ),
    "gpt_neox-whole-no-bias": (
        "gpt_neox",
        {
            **_TRUNK,
            "attention_bias": False,
            "hidden_act": "gelu_pytorch_tanh",
            "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0},
        },
    ),
    "gpt_neox-linear": (
        "gpt_neox",
        {**_TRUNK, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, **_HALF}, "layer_norm_eps": 1e-3},
    ),
    "mistral-window": ("mistral", {**_TRUNK, "num_key_value_heads": 2, "sliding_window": 7}),
    "mistral-full-tied": (
        "mistral",
        {**_TRUNK, "num_key_value_heads": 4, "sliding_window": None, "head_dim": 16, "tie_word_embeddings": True},
    ),
    "mixtral-two-of-four": ("mixtral", {**_TRUNK, "num_key_value_heads": 2, "num_local_experts": 4}),
    "mixtral-one-of-three-window": (
        "mixtral",
        {**_TRUNK, "num_key_value_heads": 4, "num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 6, "rms_norm_eps": 1e-3},
    ),
    "mixtral-all-tied": (
        "mixtral",
        {**_TRUNK, "num_key_value_heads": 1, "num_local_experts": 2, "tie_word_embeddings": True, "head_dim": 16},
    ),
    "qwen3_moe-every-layer": ("qwen3_moe", {**_TRUNK, **_EXPERTS, "num_key_value_heads": 2, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe-some-layers": (
        "qwen3_moe",
        {**_TRUNK, **_EXPERTS, "num_key_value_heads": 4, "head_dim": 8, "mlp_only_layers": [1], "attention_bias": True},
    ),
    "qwen3_moe-sparse-step-window": (
        "qwen3_moe",
        {**_TRUNK, **_EXPERTS, "head_dim": 8, "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 6},
    ),
    "gemma-tied": ("gemma", {**_TRUNK, **_PAD, "num_key_value_heads": 1, "head_dim": 16}),
    "gemma-untied-bias": (
        "gemma",
        {
            **_TRUNK,
            **_PAD,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "hidden_act": "gelu",
        },
    ),
    "gemma2-windows": (
        "gemma2",
        {**_TRUNK, **_PAD, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5, **_CAPS},
    ),
    "gemma2-scale-untied": (
        "gemma2",
        {
            **_TRUNK,
            **_PAD,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "sliding_window": 9,
        },
    ),
    "gemma3-windows": (
        "gemma3_text",
        {
            **_TRUNK,
            **_PAD,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "sliding_window": 5,
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma3-scaled-softcap": (
        "gemma3_text",
        {
            **_TRUNK,
            **_PAD,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 9,
            "final_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            "tie_word_embeddings": False,
        },
    ),
    "phi3-mha": ("phi3", {**_TRUNK, **_PAD}),
    "phi3-gqa-window-partial": (
        "phi3",
        {
            **_TRUNK,
            **_PAD,
            "num_key_value_heads": 2,
            "sliding_window": 6,
            "hidden_size": 64,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 1e3, "rope_type": "default", "partial_rotary_factor": 0.75},
        },
    ),
    "phi3-longrope-short": (
        "phi3",
        {
            **_TRUNK,
            **_PAD,
            "original_max_position_embeddings": 48,
            "rope_parameters": {**_LONGROPE, "original_max_position_embeddings": 48},
        },
    ),
    "olmo2-mha": ("olmo2", {**_TRUNK, **_PAD}),
    "olmo2-gqa-tied-bias": ("olmo2", {**_TRUNK, **_PAD, "num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True}),
    "granite-multipliers": (
        "granite",
        {
            **_TRUNK,
            "num_key_value_heads": 2,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.22,
            "logits_scaling": 49.0,
        },
    ),
    "granite-tied-biases": (
        "granite",
        {
            **_TRUNK,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "logits_scaling": 8,
            "attention_multiplier": 0.35,
        },
    ),
    "smollm3-every-fourth": ("smollm3", {**_TRUNK, **_PAD, "num_key_value_heads": 2, "num_hidden_layers": 5}),
    "smollm3-chosen-window": (
        "smollm3",
        {
            **_TRUNK,
            **_PAD,
            "num_key_value_heads": 4,
            "no_rope_layers": [0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 6,
            "tie_word_embeddings": False,
            "attention_bias": True,
        },
    ),
    "qwen3-window": (
        "qwen3",
        {**_TRUNK, "num_key_value_heads": 2, "head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
}


def reference_model(setting: str) -> transformers.PreTrainedModel:
    """The transformers model of a setting, float32, in eval mode, every parameter random: ones and zeros hide mistakes."""
    model_type, options = SETTINGS[setting]
    config = transformers.AutoConfig.for_model(model_type, **options)
    torch.manual_seed(len(setting))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or ".ln_" in name:
                # Gemma's norms multiply by 1 + weight
                middle = 1.0 if name.endswith("weight") and not model_type.startswith("gemma") else 0.0
                parameter.copy_(middle + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def random_tokens(num_rows: int, num_tokens: int, *, seed: int = 1) -> torch.Tensor:
    """(num_rows, num_tokens) ids."""
    return torch.randint(0, VOCAB, (num_rows, num_tokens), generator=torch.Generator().manual_seed(seed))
