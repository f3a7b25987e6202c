"""The native executor against torch's decoder, and against itself: a text's bits do not depend on batch, chunks or threads."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llmctl.core.config.model import Experts, RopeScaling
from llmctl.core.infer.torch_executor import TorchExecutor
from llmctl.core.model import Decoder
from llmctl.core.model.moe import RoutedMlp
from llmctl.core.native.cache import CacheDtype
from llmctl.core.native.executor import NativeExecutor, supports
from llmctl.core.native.library import ISA_VARIABLE, Int4Matrix, Int8Matrix, from_bf16, to_bf16
from llmctl.core.quant import QuantMatrix, dequantise
from tests.core.model.families import SETTINGS, VOCAB, random_tokens
from tests.core.native.models import forced, loaded, native, quantised, runnable_kernels, whole_text

pytestmark = pytest.mark.skipif(not runnable_kernels(), reason="the native library was not built")

MIXED = [
    *("gpt2-tied", "llama-mqa-biases", "qwen2-window", "qwen3-tied-biases"),
    *("gpt_neox-quarter", "gemma2-windows", "gemma3-windows", "olmo2-gqa-tied-bias"),
    *("mixtral-two-of-four", "qwen3_moe-some-layers"),
]
"""Norms before, after and over all heads, attention beside the mlp, positions, biases, windows, heads that share and do not, experts."""


def as_quant(matrix: Int8Matrix | Int4Matrix) -> QuantMatrix:
    minimums = matrix.minimums if isinstance(matrix, Int4Matrix) else None
    return QuantMatrix("int8" if minimums is None else "int4", matrix.codes, matrix.scales, minimums, matrix.num_columns)


def text(num_tokens: int, *, seed: int = 1) -> NDArray[np.int64]:
    ids: NDArray[np.int64] = random_tokens(1, num_tokens, seed=seed)[0].numpy()
    return ids


@pytest.mark.parametrize("setting", SETTINGS)
def test_logits_are_torchs(setting: str) -> None:
    model, config, arrays = loaded(setting)
    if (reason := supports(config)) is not None:
        pytest.skip(reason)
    executor = native(config, arrays)
    tokens = random_tokens(3, 40)
    with torch.inference_mode():
        want = model(tokens).numpy()
    got = executor.step(tokens.numpy(), np.zeros(3, dtype=np.int64), np.array([2, 0, 3]), all_logits=True)
    assert np.abs(got - want).max() < 1e-4


def test_what_the_library_lacks_is_named() -> None:
    assert not [setting for setting in SETTINGS if supports(loaded(setting)[1]) is not None]
    config = loaded("llama-mha")[1]
    assert "heads of 2048" in str(supports(dataclasses.replace(config, head_dim=2048)))
    experts = Experts(num_experts=2, num_active=1, mlp_size=1 << 31, normalised=True, layers=(True,) * config.num_layers)
    assert "too large" in str(supports(dataclasses.replace(config, experts=experts)))


@pytest.mark.parametrize("name", runnable_kernels())
@pytest.mark.parametrize("setting", MIXED)
def test_every_instruction_set_gives_torchs_logits(setting: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config, arrays = loaded(setting)
    with forced(name, monkeypatch):
        executor = native(config, arrays, num_threads=2)
    assert executor.kernels == name
    tokens = random_tokens(1, 40)
    with torch.inference_mode():
        want = model(tokens).numpy()
    assert np.abs(whole_text(executor, tokens[0].numpy()) - want[0]).max() < 1e-4


@pytest.mark.parametrize("setting", MIXED)
def test_soft_caps_and_multipliers_are_torchs(setting: str) -> None:
    model, config, arrays = loaded(setting)
    changed = dataclasses.replace(
        config,
        attention_softcap=0.5,
        attention_scale=0.7,
        logit_softcap=3.0,
        embedding_multiplier=1.5,
        residual_multiplier=0.8,
        logit_multiplier=0.9,
    )
    decoder = Decoder(changed)
    decoder.load_state_dict(model.state_dict())
    tokens = random_tokens(1, 30)
    with torch.inference_mode():
        want = decoder.eval()(tokens).numpy()
    assert np.abs(whole_text(native(changed, arrays), tokens[0].numpy()) - want[0]).max() < 1e-4


@pytest.mark.parametrize("setting", MIXED)
def test_bf16_weights_are_computed_with_as_their_float32_values(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, next(name for name in runnable_kernels() if name != "avx512bf16"))  # which rounds inputs too
    _, config, arrays = loaded(setting)
    rounded = {name: to_bf16(array) for name, array in arrays.items()}
    widened: dict[str, NDArray[Any]] = {name: from_bf16(array) for name, array in rounded.items()}
    ids = text(20)
    want = whole_text(native(config, widened), ids)
    for given in (rounded, arrays):
        got = whole_text(native(config, given, dtype="bfloat16", cache_dtype="float32"), ids)
        assert np.abs(got - want).max() < 1e-5
    assert whole_text(native(config, rounded), ids).tobytes() == want.tobytes()


@pytest.mark.parametrize("name", runnable_kernels())
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4", "int8 cache"])
@pytest.mark.parametrize("setting", MIXED)
def test_a_text_is_the_same_bits_in_any_batch_any_chunks_and_any_threads(
    setting: str, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config, arrays = loaded(setting)
    how: dict[str, Any] = {"quant": kind} if kind in ("int8", "int4") else {"cache_dtype": "int8"} if " " in kind else {"dtype": kind}
    with forced(name, monkeypatch):
        executor, threaded = native(config, arrays, num_slots=8, **how), native(config, arrays, num_slots=8, num_threads=3, **how)
    texts = np.stack([text(37, seed=seed) for seed in range(8)])
    alone = [whole_text(executor, ids).tobytes() for ids in texts]
    for each, batches, widths in ((executor, (1, 3, 8), (1, 5, 16, 36)), (threaded, (3,), (16,))):
        for batch in batches:
            got = each.step(texts[:batch], np.zeros(batch, dtype=np.int64), np.arange(batch)[::-1].copy(), all_logits=True)
            assert [row.tobytes() for row in got] == alone[:batch]
        for width in widths:
            pieces = [
                each.step(texts[:3, at : at + width], np.full(3, at), np.arange(3), all_logits=True)
                for at in range(0, texts.shape[1], width)
            ]
            assert [row.tobytes() for row in np.concatenate(pieces, axis=1)] == alone[:3]


@pytest.mark.parametrize("window", [None, 5, 100, 300])
@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "int8"])
def test_a_text_longer_than_the_librarys_own_chunks_and_blocks_of_keys_is_one_text(cache_dtype: CacheDtype, window: int | None) -> None:
    model, config, arrays = loaded("llama-gqa-tied")
    longer = dataclasses.replace(config, max_positions=700, windows=None if window is None else (window,) * config.num_layers)
    decoder = Decoder(longer)
    decoder.load_state_dict(model.state_dict())
    executor = native(longer, arrays, capacity=700, cache_dtype=cache_dtype)
    tokens = random_tokens(1, 600)
    with torch.inference_mode():
        want = decoder.eval()(tokens).numpy()[0]
    got = whole_text(executor, tokens[0].numpy())
    limits: dict[CacheDtype, float] = {"float32": 1e-4, "float16": 1e-2, "int8": 0.15}  # of logits up to 5
    assert np.abs(got - want).max() < limits[cache_dtype]
    for cuts in ((0, 300, 600), (0, 1, 250, 258, 400, 401, 402, 600)):
        parts = [
            executor.step(tokens[:, at:to].numpy(), np.array([at]), np.array([1]), all_logits=True)[0]
            for at, to in itertools.pairwise(cuts)
        ]
        assert np.concatenate(parts).tobytes() == got.tobytes()


@pytest.mark.parametrize("window", [None, 900])
@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "int8"])
def test_a_long_text_whose_keys_are_shared_out_to_threads_is_the_same_bits(cache_dtype: CacheDtype, window: int | None) -> None:
    """One token, or a few of several texts, over many blocks of keys: alone, beside others, and with any number of threads."""
    _, config, arrays = loaded("llama-gqa-tied")
    longer = dataclasses.replace(config, max_positions=1200, windows=None if window is None else (window,) * config.num_layers)
    texts = np.stack([text(1160, seed=seed) for seed in range(3)])
    single = native(longer, arrays, capacity=1200, cache_dtype=cache_dtype)
    want = [whole_text(single, ids, slot=slot) for slot, ids in enumerate(texts)]
    for num_threads in (2, 5):
        executor = native(longer, arrays, capacity=1200, cache_dtype=cache_dtype, num_threads=num_threads)
        for slot in range(3):
            executor.step(texts[slot : slot + 1, : 800 + 100 * slot], np.array([0]), np.array([slot]))
        for widths in ((1, 1, 1), (3, 2, 2), (200, 1, 1)):
            starts = np.array([800, 900, 1000])
            fed = np.stack([np.resize(ids[start:], max(widths)) for ids, start in zip(texts, starts, strict=True)])
            got = executor.step(fed, starts, np.arange(3), lengths=np.array(widths), all_logits=True)
            for row, width in enumerate(widths):
                assert got[row, :width].tobytes() == want[row][starts[row] : starts[row] + width].tobytes()
        for at in range(1000, 1160, 40):
            alone = executor.step(texts[:1, at : at + 40], np.array([at]), np.array([0]), all_logits=True)[0]
            assert alone.tobytes() == want[0][at : at + 40].tobytes()
        alone = executor.step(texts[:1, 1159:], np.array([1159]), np.array([0]), all_logits=True)[0]
        assert alone.tobytes() == want[0][1159:].tobytes()


@pytest.mark.parametrize("name", runnable_kernels())
@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("setting", MIXED)
def test_quantised_models_are_torchs_whose_inputs_of_matrices_are_rounded(
    setting: str, quant: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config, arrays = loaded(setting)
    decoder = Decoder(config)
    rounded = {key: quantised(key, array, quant) for key, array in arrays.items()}
    plain = {key: array if isinstance(array, np.ndarray) else dequantise(as_quant(array)) for key, array in rounded.items()}
    names = model.state_dict().keys()
    decoder.load_state_dict({key: torch.from_numpy(np.ascontiguousarray(plain[key])) for key in names})
    for key, module in decoder.named_modules():
        if isinstance(module, torch.nn.Linear) and not key.endswith("router"):  # which is not quantised
            module.register_forward_pre_hook(lambda _, inputs: (rounded_to_codes(inputs[0]),))
    tokens = random_tokens(1, 40)
    with torch.inference_mode():
        want = decoder.eval().logits(rounded_to_codes(decoder.hidden(tokens))).numpy()[0]
    with forced(name, monkeypatch):
        executor = native(config, arrays, quant=quant, num_threads=2, cache_dtype="float32")
        got = whole_text(executor, tokens[0].numpy())
    error = np.abs(got - want)
    assert error.max(axis=1).min() < 1e-5 * np.abs(want).max()  # some rows are the same but for float32's rounding, in others
    # a number at the border of two codes fell to the other side, and those after it see that
    assert error.max() < 0.03 * np.abs(want).max(), error.max() / np.abs(want).max()
    assert np.sqrt((error**2).mean()) < 0.01 * np.sqrt((want**2).mean())


def rounded_to_codes(x: torch.Tensor) -> torch.Tensor:
    """Numbers (..., C) in groups of 32, each rounded to 127 steps on either side of 0."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    step = padded.abs().amax(dim=-1, keepdim=True) / 127
    codes = torch.where(step > 0, torch.round(padded / step), torch.zeros(()))
    return (codes * step).flatten(-2)[..., : x.shape[-1]]


def test_longrope_turns_each_text_by_its_length_in_the_call_as_torch_does() -> None:
    """Its short factors hold for up to 48 tokens here; keys that are in the cache already stay as they were turned."""
    model, config, arrays = loaded("phi3-longrope-short")
    executors: list[NativeExecutor | TorchExecutor] = [native(config, arrays, num_slots=2, capacity=64), TorchExecutor(model)]
    executors[1].reserve(num_slots=2, capacity=64)
    tokens, both = random_tokens(2, 64).numpy(), np.array([0, 1])
    calls = [((0, 0), 20, (20, 20)), ((20, 20), 28, (28, 20)), ((48, 40), 8, (3, 8)), ((51, 48), 1, (1, 1)), ((0, 0), 64, (60, 48))]
    seen = []
    for executor in executors:
        seen.append([])
        for starts, width, lengths in calls:
            fed = np.stack([np.resize(row[start:], width) for row, start in zip(tokens, starts, strict=True)])
            got = executor.step(fed, np.array(starts), both, lengths=np.array(lengths), all_logits=True)
            seen[-1] += [row[:length] for row, length in zip(got, lengths, strict=True)]
    for got, want in zip(*seen, strict=True):
        assert np.abs(got - want).max() < 1e-4
    assert config.rope_scaling is not None
    later = {**config.rope_scaling.parameters, "original_max_position_embeddings": 64}
    short = native(dataclasses.replace(config, rope_scaling=RopeScaling(kind="longrope", parameters=later)), arrays, capacity=64)
    assert np.abs(whole_text(short, tokens[0, :60]) - seen[0][-2]).max() > 1e-2  # the factors count


@pytest.mark.parametrize("num_active", [1, 2, 5])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("setting", ["qwen3_moe-every-layer", "olmo2-gqa-tied-bias"])
def test_experts_are_torchs_however_many_whatever_their_shares_and_norms(setting: str, normalised: bool, num_active: int) -> None:
    """With few and with many tokens; the second has norms after, biases and a multiplier, which no model with experts has."""
    _, config, _ = loaded(setting)
    experts = Experts(num_experts=5, num_active=num_active, mlp_size=40, normalised=normalised, layers=(True, False, True))
    changed = dataclasses.replace(config, experts=experts, residual_multiplier=0.8, mlp_bias=True)
    torch.manual_seed(3)
    decoder = Decoder(changed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.3)
    arrays = {name: tensor.numpy() for name, tensor in decoder.state_dict().items()}
    for num_tokens, num_threads in ((3, 1), (3, 3), (40, 1), (40, 3)):
        tokens = random_tokens(1, num_tokens)
        with torch.inference_mode():
            want = decoder.eval()(tokens).numpy()[0]
        got = whole_text(native(changed, arrays, num_threads=num_threads), tokens[0].numpy())
        assert np.abs(got - want).max() < 1e-4 * max(1.0, np.abs(want).max())


def test_experts_that_nobody_chose_are_not_read() -> None:
    """Weights of NaN there change no bit."""
    model, config, arrays = loaded("qwen3_moe-every-layer")
    ids = text(2)
    chosen: dict[str, set[int]] = {}

    def note(name: str, router_input: torch.Tensor) -> None:
        module = model.get_submodule(name)
        assert isinstance(module, RoutedMlp)
        chosen[name] = set(module.route(router_input.flatten(0, 1))[1].flatten().tolist())

    names = [name for name, module in model.named_modules() if isinstance(module, RoutedMlp)]
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))  # type: ignore[misc]
        for name in names
    ]
    try:
        with torch.inference_mode():
            model(torch.from_numpy(ids)[None])
    finally:
        for hook in hooks:
            hook.remove()
    idle = [f"{name}.experts.{e}." for name in names for e in range(5) if e not in chosen[name]]
    assert len(idle) >= config.num_layers  # 2 of 5 experts for each of 2 tokens
    poisoned = {name: np.full_like(array, np.nan) if name.startswith(tuple(idle)) else array for name, array in arrays.items()}
    want = whole_text(native(config, arrays), ids)
    for num_threads in (1, 2):
        assert whole_text(native(config, poisoned, num_threads=num_threads), ids).tobytes() == want.tobytes()
    assert np.isnan(whole_text(native(config, poisoned), text(40))).any()  # which reach them


@pytest.mark.parametrize("setting", MIXED)
def test_ragged_rows_slots_and_decoding_are_torchs(setting: str) -> None:
    """Both executors driven through the same calls, as the engine would make them."""
    model, config, arrays = loaded(setting)
    executors: list[NativeExecutor | TorchExecutor] = [native(config, arrays, num_slots=2, capacity=16), TorchExecutor(model)]
    executors[1].reserve(num_slots=2, capacity=16)
    seen = []
    for executor in executors:
        results = []
        tokens, lengths = random_tokens(2, 9).numpy(), np.array([9, 4])
        padded = executor.step(tokens, np.array([0, 0]), np.array([1, 0]), lengths=lengths, all_logits=True)
        results += [padded[0], padded[1, :4]]
        executor.reserve(num_slots=3, capacity=40)  # grows with texts in the slots
        results.append(executor.step(tokens[:, :3], np.array([9, 4]), np.array([1, 0]), lengths=np.array([1, 3])))
        executor.copy_slot(1, to=2, length=7)
        results.append(executor.step(np.array([[5], [6], [7]]), np.array([10, 7, 7]), np.array([1, 0, 2])))
        results.append(executor.step(np.array([[8]]), np.array([3]), np.array([0])))  # takes tokens back
        seen.append(results)
    for got, want in zip(*seen, strict=True):
        assert got.shape == want.shape
        assert np.abs(got - want).max() < 1e-4


def test_a_nan_stays_in_its_own_text_and_behind_its_own_place() -> None:
    _, config, arrays = loaded("llama-gqa-tied")
    clean = native(config, arrays)
    texts = np.stack([text(12, seed=1), text(12, seed=2)])
    bad = {**arrays, "embed.weight": arrays["embed.weight"].copy(), "head.weight": arrays["embed.weight"]}
    poison = next(token for token in range(VOCAB) if token not in texts)
    bad["embed.weight"][poison] = np.nan
    executor = native(dataclasses.replace(config, tie_embeddings=False), bad)
    mixed = texts.copy()
    mixed[0, 6] = poison
    got = executor.step(mixed, np.zeros(2, dtype=np.int64), np.arange(2), all_logits=True)
    want = clean.step(texts, np.zeros(2, dtype=np.int64), np.arange(2), all_logits=True)
    assert np.isnan(got[0, 6:]).all()
    assert got[0, :6].tobytes() == want[0, :6].tobytes()
    assert got[1].tobytes() == want[1].tobytes()
    # the slot is clean again once another text has taken it
    assert whole_text(executor, texts[0]).tobytes() == want[0].tobytes()


def test_what_is_not_there_is_refused_before_the_library_reads_it() -> None:
    _, config, arrays = loaded("gpt2-tied")
    executor = native(config, arrays, num_slots=2, capacity=200)
    one = np.array([0])
    for tokens, position, slot, message in (
        ([[VOCAB]], 0, 0, "vocabulary"),
        ([[-1]], 0, 0, "vocabulary"),
        ([[1]], 0, 2, "slot"),
        ([[1, 2]], 207, 0, "cache"),
        ([[1, 2]], 63, 0, "beyond the 64"),
        ([[1]], -1, 0, "position"),
    ):
        with pytest.raises(ValueError, match=message):
            executor.step(np.array(tokens), one + position, one + slot)
    executor.release()
    with pytest.raises(ValueError, match="slot"):
        executor.step(np.array([[1]]), one, one)
