"""What the decoder promises beyond parity: documents, ragged caches, positions, padding, initial weights, facts."""

import copy
import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from llmctl.core.checkpoint import load_model, save_model
from llmctl.core.config.model import Experts, ModelConfig, RopeScaling
from llmctl.core.errors import InputError, UsageError
from llmctl.core.model import Decoder, KVCache
from llmctl.core.model.attention import Pattern, attend
from llmctl.core.model.facts import flops_per_token, num_parameters, tensor_shapes, training_memory
from llmctl.core.model.rope import inverse_frequencies
from llmctl.core.model.shapes import SHAPES, shape_for_depth
from tests.core.model.families import random_tokens

LLAMA = ModelConfig(
    vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12, mlp_size=40, max_positions=64, qk_norm=True
)
VARIANTS = {
    "rope": LLAMA,
    "partial-rope": dataclasses.replace(LLAMA, rotary_dim=6),
    "window": dataclasses.replace(LLAMA, windows=(5, None)),
    "softcap": dataclasses.replace(LLAMA, attention_softcap=2.0, logit_softcap=5.0, windows=(None, 4)),
    "multipliers": dataclasses.replace(
        LLAMA, attention_scale=0.1, embedding_multiplier=3.0, residual_multiplier=0.5, logit_multiplier=0.25, head_bias=True
    ),
    "no-positions": dataclasses.replace(LLAMA, positions="none"),
    "learned": dataclasses.replace(LLAMA, positions="learned", norm="layer", norm_bias=True, gated_mlp=False, activation="gelu_tanh"),
    "sinusoidal": dataclasses.replace(LLAMA, positions="sinusoidal", tie_embeddings=True),
    "experts": dataclasses.replace(LLAMA, experts=Experts(num_experts=5, num_active=2, mlp_size=24, normalised=True, layers=(False, True))),
    "norms-after": dataclasses.replace(LLAMA, pre_norms=False, post_norms=True, qk_norm=False, qk_norm_whole=True),
    "norms-around": dataclasses.replace(LLAMA, post_norms=True, norm_plus_one=True, windows=(4, None), local_rope_theta=50.0),
    "parallel": dataclasses.replace(LLAMA, parallel_residual=True, norm="layer", norm_bias=True, gated_mlp=False, rotary_dim=4),
    "some-layers-rotate": dataclasses.replace(LLAMA, rope_layers=(True, False)),
    "dynamic": dataclasses.replace(LLAMA, max_positions=16, rope_scaling=RopeScaling(kind="dynamic", parameters={"factor": 2.0})),
}


def random_model(config: ModelConfig) -> Decoder:
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
    return model.eval()


@pytest.fixture(scope="module", params=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> Decoder:
    return random_model(VARIANTS[request.param])


def dense_attention(q, k, v, visible, *, scale, softcap=None):
    """Softmax attention from its definition, float64. `visible` (B, T, K) is true where a query may look."""
    q, k, v = (x.double() for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.einsum("bhtd,bhkd->bhtk", q, k) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.where(visible[:, None], scores.exp(), 0.0)
    return torch.einsum("bhtk,bhkd->bhtd", weights / weights.sum(-1, keepdim=True), v)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("documents", [None, ((13,), (13,)), ((4, 1, 8), (5, 8)), ((1,) * 13, (12, 1))])
def test_attention_equals_a_dense_mask_with_gradients(documents, kv_heads: int, window: int | None, softcap: float | None) -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 13, 8, generator=random, requires_grad=True) for heads in (6, kv_heads, kv_heads))
    row = torch.arange(13)
    visible = (row[None, :] <= row[:, None]).expand(2, 13, 13).clone()
    if window is not None:
        visible &= row[None, :] > row[:, None] - window
    if documents is not None:
        numbers = torch.stack([torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)) for lengths in documents])
        visible &= numbers[:, :, None] == numbers[:, None, :]
    wanted = dense_attention(q, k, v, visible, scale=0.3, softcap=softcap)
    found = attend(q, k, v, Pattern(document_lengths=documents), scale=0.3, window=window, softcap=softcap)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    weight = torch.randn(wanted.shape, generator=random)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), (q, k, v)), torch.autograd.grad((wanted * weight).sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_documents_in_a_row_do_not_see_each_other(model: Decoder) -> None:
    tokens = random_tokens(2, 20)
    lengths = ((3, 9, 8), (14, 6))
    with torch.no_grad():
        packed = model(tokens, document_lengths=lengths)
        for row, row_lengths in enumerate(lengths):
            alone = [model(part[None])[0] for part in tokens[row].split(list(row_lengths))]
            torch.testing.assert_close(packed[row], torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_ragged_slots_equal_each_text_alone(model: Decoder, seed: int) -> None:
    """Texts of random lengths in random slots, which take part in a call or not, with any number of tokens each."""
    config, random = model.config, np.random.default_rng(seed)
    num_texts = int(random.integers(1, 5))
    slots = [int(slot) for slot in random.permutation(5)[:num_texts]]
    longest = 16 if config.rope_scaling is not None else 24  # a text beyond the limit is stretched as it grows: chunks count
    texts = [random_tokens(1, int(random.integers(1, longest + 1)), seed=i)[0] for i in range(num_texts)]
    cache, done, found = KVCache(config, num_slots=5, capacity=24), [0] * num_texts, [[] for _ in texts]
    with torch.no_grad():
        while any(done[i] < len(text) for i, text in enumerate(texts)):
            rows = [i for i, text in enumerate(texts) if done[i] < len(text) and random.random() < 0.7]
            if not rows:
                continue
            counts = [int(random.integers(1, min(6, len(texts[i]) - done[i]) + 1)) for i in rows]
            width = max(counts)
            tokens, positions = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), -1)
            for line, (i, count) in enumerate(zip(rows, counts, strict=True)):
                tokens[line, :count] = texts[i][done[i] : done[i] + count]
                positions[line, :count] = torch.arange(done[i], done[i] + count)
            logits = model(tokens, positions=positions, cache=cache, slots=torch.tensor([slots[i] for i in rows]))
            for line, (i, count) in enumerate(zip(rows, counts, strict=True)):
                found[i].append(logits[line, :count])
                done[i] += count
                assert int(cache.lengths[slots[i]]) == done[i]
        for i, text in enumerate(texts):
            torch.testing.assert_close(torch.cat(found[i]), model(text[None])[0], atol=1e-5, rtol=1e-5)


def test_a_slot_can_be_cut_back_copied_and_used_again(model: Decoder) -> None:
    if model.config.rope_scaling is not None:
        pytest.skip("dynamic scaling depends on the length that a text had")
    text, other = random_tokens(1, 12, seed=1), random_tokens(1, 12, seed=2)
    cache = KVCache(model.config, num_slots=3, capacity=16)
    with torch.no_grad():
        model(text, cache=cache, slots=torch.tensor([1]))
        cache.truncate(1, length=7)
        cache.copy_slot(1, to=2)
        again = model(text[:, 7:].expand(2, -1), cache=cache, slots=torch.tensor([2, 1]))
        torch.testing.assert_close(again, model(text)[:, 7:].expand(2, -1, -1), atol=1e-5, rtol=1e-5)
        cache.clear([1])
        assert cache.lengths.tolist() == [0, 0, 12]
        torch.testing.assert_close(model(other, cache=cache, slots=torch.tensor([1])), model(other), atol=1e-5, rtol=1e-5)
        cache.clear()
        assert cache.lengths.tolist() == [0, 0, 0]
    assert cache.num_bytes == 2 * 2 * 3 * 2 * 16 * 12 * 4


def test_what_does_not_fit_is_refused(model: Decoder) -> None:
    cache = KVCache(model.config, num_slots=1, capacity=4)
    with pytest.raises(ValueError, match="position 4 does not fit a cache of 4"):
        model(random_tokens(1, 5), cache=cache)
    with pytest.raises(ValueError, match="do not fill 6"):
        model(random_tokens(1, 6), document_lengths=((2, 3),))
    with pytest.raises(ValueError, match="document_lengths"):
        model(random_tokens(1, 4), cache=cache, document_lengths=((2, 2),))


def test_absolute_positions_end_with_their_table() -> None:
    model = random_model(VARIANTS["learned"])
    with pytest.raises(ValueError, match="position 64 is beyond the 64"):
        model(random_tokens(1, 65))


def test_dynamic_scaling_follows_each_text_alone() -> None:
    """transformers stretches by the longest text of a batch; with a batch of one the two must agree."""
    config = VARIANTS["dynamic"]
    hf = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    )
    ours = random_model(dataclasses.replace(config, qk_norm=False))
    reference = transformers.LlamaForCausalLM(hf).eval()
    from llmctl.core.checkpoint import hf_tensors
    from llmctl.core.families import FAMILIES

    reference.load_state_dict(hf_tensors(ours.config, FAMILIES["llama"], ours.state_dict(), dtype=torch.float32))
    with torch.no_grad():
        for num_tokens in (10, 16, 17, 40):
            tokens = random_tokens(1, num_tokens)
            torch.testing.assert_close(ours(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)
        long, padded = random_tokens(1, 40), torch.full((1, 40), 0)
        padded[:, :20] = random_tokens(1, 20, seed=9)
        positions = torch.arange(40).repeat(2, 1)
        positions[1, 20:] = -1
        both = ours(torch.cat([long, padded]), positions=positions, cache=KVCache(ours.config, num_slots=2, capacity=40))
        torch.testing.assert_close(both[1, :20], ours(padded[:, :20])[0], atol=1e-5, rtol=1e-5)


def test_longrope_changes_its_frequencies_with_the_length_of_each_text() -> None:
    """As in transformers with a batch of one, on both sides of the trained length."""
    factors = {"short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.0, 2.0, 4.0, 8.0]}
    hf = transformers.Phi3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e3, "original_max_position_embeddings": 16, **factors},
        pad_token_id=None,
    )
    reference = transformers.Phi3ForCausalLM(hf).eval()
    from llmctl.core.checkpoint import hf_tensors
    from llmctl.core.families import FAMILIES

    config = FAMILIES["phi3"].config_from_hf(hf.to_dict())
    ours = random_model(config)
    reference.load_state_dict(hf_tensors(config, FAMILIES["phi3"], ours.state_dict(), dtype=torch.float32))
    with torch.no_grad():
        for num_tokens in (10, 16, 17, 40, 12):
            tokens = random_tokens(1, num_tokens)
            torch.testing.assert_close(ours(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)


def test_an_expert_works_only_on_the_tokens_that_chose_it() -> None:
    """The work of all experts together is the chosen pairs, and the result that of the sum over all experts in float64."""
    config = VARIANTS["experts"]
    assert config.experts is not None
    routed = random_model(config).layers[1].mlp
    x = torch.randn(1, 3, config.hidden_size, generator=torch.Generator().manual_seed(1))
    seen: dict[int, int] = {}
    for number, expert in enumerate(routed.experts):
        expert.register_forward_hook(lambda _, inputs, __, number=number: seen.update({number: len(inputs[0])}))
    with torch.no_grad():
        found = routed(x)
        assert sum(seen.values()) == 3 * config.experts.num_active
        assert set(seen) == set(routed.route(x[0])[1].flatten().tolist())
        wide = copy.deepcopy(routed).double()
        probabilities = torch.softmax(wide.router(x[0].double()), -1)
        kept = probabilities >= probabilities.topk(2, dim=-1).values[:, 1:]
        weights = probabilities * kept / (probabilities * kept).sum(-1, keepdim=True)
        wanted = sum(weights[:, e : e + 1] * expert(x[0].double()) for e, expert in enumerate(wide.experts))
    torch.testing.assert_close(found[0].double(), wanted, atol=1e-5, rtol=1e-5)
    assert routed(x[:, :0]).shape == (1, 0, config.hidden_size)


def test_flops_of_a_mixture_count_the_experts_in_use() -> None:
    config = VARIANTS["experts"]
    assert config.experts is not None
    dense = dataclasses.replace(config, experts=None)
    one_mlp = 3 * config.hidden_size * config.mlp_size
    active = 2 * 3 * config.hidden_size * 24 + 5 * config.hidden_size
    assert flops_per_token(config, 16) - flops_per_token(dense, 16) == 6 * (active - one_mlp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_tables_do_not_depend_on_what_was_asked_before(dtype: torch.dtype) -> None:
    tokens = random_tokens(1, 30)
    fresh, used = random_model(LLAMA).to(dtype), random_model(LLAMA).to(dtype)
    with torch.no_grad():
        used(random_tokens(1, 3))
        used(random_tokens(1, 600))
        assert torch.equal(fresh(tokens), used(tokens))


def test_sinusoidal_positions_are_a_fixed_table_that_transformers_reads(tmp_path: Path) -> None:
    config = dataclasses.replace(shape_for_depth(1, 97, 24, "gpt2"), positions="sinusoidal")
    model = Decoder(config)
    model.init_weights()
    assert "positions.weight" not in dict(model.named_parameters())
    trained_only = dict(model.named_parameters())  # what an optimizer and a trainer's float32 masters hold
    save_model(tmp_path, config=config, family="gpt2", tensors=trained_only)
    loaded = load_model(tmp_path)
    assert loaded.config == config
    assert "positions.weight" not in dict(loaded.model.named_parameters())
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for position in (0, 1, 17):
        for column in (0, 1, 30, 31):
            angle = position / 10_000 ** (2 * (column // 2) / 64)
            wanted = math.sin(angle) if column % 2 == 0 else math.cos(angle)
            assert reference.transformer.wpe.weight[position, column].item() == pytest.approx(wanted, abs=1e-6)
    tokens = random_tokens(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)


def test_initial_weights_are_those_that_were_published() -> None:
    """GPT-2: normal 0.02, residual projections divided by sqrt(2 * layers), biases 0, norms 1. Llama: normal 0.02."""
    for family in SHAPES:
        config = shape_for_depth(4, 500, 32, family)
        model = Decoder(config)
        model.init_weights(torch.Generator().manual_seed(1))
        for name, parameter in model.state_dict().items():
            if name.endswith("bias"):
                assert not parameter.any(), name
            elif "norm" in name:
                assert bool((parameter == 1).all()), name
            else:
                residual = family == "gpt2" and name.endswith(("attn.o.weight", "mlp.down.weight"))
                wanted = 0.02 / math.sqrt(8) if residual else 0.02
                assert float(parameter.std()) == pytest.approx(wanted, rel=0.05), name
                assert abs(float(parameter.mean())) < 0.1 * wanted, name
    again = Decoder(config)
    again.init_weights(torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_bf16_stays_near_float32(model: Decoder) -> None:
    tokens = random_tokens(2, 15)
    with torch.no_grad():
        wanted = torch.softmax(model(tokens), -1)
        found = torch.softmax(random_model(model.config).to(torch.bfloat16)(tokens).float(), -1)
    assert float((wanted - found).abs().max()) < 0.1


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_facts_agree_with_the_torch_module(variant: str) -> None:
    config = VARIANTS[variant]
    with torch.device("meta"):
        state = Decoder(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == tensor_shapes(config)
    assert list(state) == list(tensor_shapes(config))
    counts = num_parameters(config)
    assert counts.total == sum(tensor.numel() for tensor in state.values()) == counts.embedding + counts.non_embedding


@pytest.mark.parametrize("window", [None, 3])
def test_flops_equal_those_that_torch_counts(window: int | None) -> None:
    """torch's counter sees the whole attention square, so only the matrix products outside of attention are its count.

    In float64 all attention is torch's own, which the counter lists apart.
    """
    from torch.utils.flop_counter import FlopCounterMode

    # LayerNorm, because the backward of our RMSNorm uses matrix products of its own
    windows = None if window is None else (window, window)
    config = dataclasses.replace(LLAMA, num_kv_heads=4, windows=windows, norm="layer", norm_bias=True, qk_norm=False)
    model, seq_len = random_model(config).double(), 16
    with FlopCounterMode(display=False) as counter:
        torch.set_grad_enabled(True)
        model(random_tokens(1, seq_len)).sum().backward()
    per_op = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    matmul = sum(count for op, count in per_op.items() if op in ("aten.mm", "aten.addmm", "aten.bmm"))
    keys = np.minimum(np.arange(seq_len) + 1, window or seq_len)
    attention = 12 * config.num_layers * config.query_size * float(keys.sum())
    assert flops_per_token(config, seq_len) * seq_len == pytest.approx(matmul + attention)


def test_gpt2_small_has_its_published_size() -> None:
    config = ModelConfig(
        vocab_size=50257,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        mlp_size=3072,
        max_positions=1024,
        gated_mlp=False,
        norm="layer",
        norm_bias=True,
        positions="learned",
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
    )
    assert num_parameters(config).total == 124_439_808
    memory = training_memory(config, tokens_per_micro_batch=1024, compute_bytes=2)
    assert memory.optimizer_bytes == 8 * 124_439_808
    assert memory.total_bytes > 14 * 124_439_808


@pytest.mark.parametrize("family", SHAPES)
def test_the_size_dial_grows_and_is_valid(family: str) -> None:
    sizes = [num_parameters(shape_for_depth(depth, 4096, 256, family)).total for depth in range(1, 33)]
    assert sizes == sorted(sizes)
    for depth in (0, -3):
        with pytest.raises(UsageError, match="--depth"):
            shape_for_depth(depth, 4096, 256, family)
    with pytest.raises(UsageError, match="mamba"):
        shape_for_depth(2, 4096, 256, "mamba")


def test_unknown_rope_scaling_is_refused_by_name() -> None:
    config = dataclasses.replace(LLAMA, rope_scaling=RopeScaling(kind="spiral"))
    with pytest.raises(InputError, match="'spiral'"):
        inverse_frequencies(config)


def test_facts_and_shapes_need_no_torch() -> None:
    code = "import sys, llmctl.core.model.facts, llmctl.core.model.shapes, llmctl.core.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
