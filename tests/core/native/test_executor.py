"""The native executor against torch's decoder, and against itself: a text's bits do not depend on batch, chunks or threads."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llmctl.core.infer.torch_executor import TorchExecutor
from llmctl.core.model import Decoder
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
]
"""Norms before, after and over all heads, attention beside the mlp, positions, biases, windows, heads that share and do not."""


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
    reasons = {setting: supports(loaded(setting)[1]) for setting in SETTINGS}
    lacking = {setting for setting, reason in reasons.items() if reason is not None}
    assert lacking == {s for s in SETTINGS if s.startswith(("mixtral", "qwen3_moe"))} | {"phi3-longrope-short"}
    assert "mixture of experts" in str(reasons["mixtral-two-of-four"])
    assert "longrope" in str(reasons["phi3-longrope-short"])


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
    for module in decoder.modules():
        if isinstance(module, torch.nn.Linear):
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
