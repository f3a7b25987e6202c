"""The library's products against float64, for sizes that fill no block, and what NaN does to them."""

import numpy as np
import pytest

from llmctl.core.native.library import BFLOAT16, FLOAT32, ISA_VARIABLE, Session, from_bf16, kernels, to_bf16
from llmctl.core.sharedlib import Unavailable
from tests.core.native.models import forced, runnable_kernels

pytestmark = pytest.mark.skipif(not runnable_kernels(), reason="the native library was not built")

SIZES = [(1, 1), (7, 3), (16, 16), (17, 33), (33, 64), (70, 129), (129, 96), (40, 601)]
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65]


@pytest.mark.parametrize("name", runnable_kernels())
@pytest.mark.parametrize("kind", [FLOAT32, BFLOAT16])
def test_products_are_those_of_float64(name: str, kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    with forced(name, monkeypatch):
        session = Session(2)
    for outputs, inputs in SIZES:
        weights = random.standard_normal((outputs, inputs)).astype(np.float32)
        if kind == BFLOAT16:
            weights = from_bf16(to_bf16(weights))
        bias = random.standard_normal(outputs).astype(np.float32)
        packed = session.pack([weights], kind=kind, biases=[bias])
        for num_rows in ROWS:
            x = from_bf16(to_bf16(random.standard_normal((num_rows, inputs)).astype(np.float32)))  # as AVX512_BF16 takes it
            want = x.astype(np.float64) @ weights.astype(np.float64).T + bias
            error = np.abs(session.multiply(packed, x) - want)
            assert error.max() < 1e-6 * (1 + np.sqrt(inputs)) * 4, (outputs, inputs, num_rows)


@pytest.mark.parametrize("name", runnable_kernels())
@pytest.mark.parametrize("kind", [FLOAT32, BFLOAT16])
def test_a_row_is_the_same_bits_in_any_batch_and_for_any_number_of_threads(name: str, kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(2)
    weights, x = random.standard_normal((70, 129)).astype(np.float32), random.standard_normal((67, 129)).astype(np.float32)
    with forced(name, monkeypatch):
        sessions = [Session(1), Session(3)]
    packed = sessions[0].pack([weights], kind=kind)
    whole = sessions[0].multiply(packed, x)
    for session in sessions:
        for num_rows in (1, 2, 3, 4, 5, 8, 11):
            for first in (0, 13):
                part = session.multiply(packed, x[first : first + num_rows])
                assert part.tobytes() == whole[first : first + num_rows].tobytes()


@pytest.mark.parametrize("name", runnable_kernels())
def test_nan_and_infinity_reach_the_results_that_they_belong_to_and_no_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = np.ones((20, 5), dtype=np.float32), np.ones((3, 5), dtype=np.float32)
    weights[17, 4], x[1, 2] = np.nan, np.inf
    with forced(name, monkeypatch):
        session = Session(1)
    for kind in (FLOAT32, BFLOAT16):
        y = session.multiply(session.pack([weights], kind=kind), x)
        assert np.isnan(y[:, 17]).all()
        assert np.isposinf(np.delete(y[1], 17)).all()
        assert (np.delete(y[[0, 2]], 17, axis=1) == 5).all()


def test_matrices_of_any_strides_are_packed_one_below_the_other() -> None:
    random = np.random.default_rng(3)
    joined = random.standard_normal((9, 50)).astype(np.float32)
    parts = [joined.T[:20], joined.T[20:23], joined.T[23:]]
    session = Session(2)
    packed, plain = session.pack(parts, kind=FLOAT32), session.pack([np.ascontiguousarray(joined.T)], kind=FLOAT32)
    assert packed.weights.tobytes() == plain.weights.tobytes()
    halves = [to_bf16(part) for part in parts]
    assert session.pack(halves, kind=BFLOAT16).weights.tobytes() == session.pack(parts, kind=BFLOAT16).weights.tobytes()


def test_rounding_to_bf16_is_torchs() -> None:
    import torch

    bits = np.random.default_rng(4).integers(0, 1 << 32, 4096, dtype=np.uint32)
    values = np.concatenate([bits, np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0xFF800000, 0x00000001], dtype=np.uint32)]).view(
        np.float32
    )
    want = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    real = ~np.isnan(values)
    assert (to_bf16(values)[real] == want[real]).all()
    assert np.isnan(from_bf16(to_bf16(values))[~real]).all()


def test_kernels_that_do_not_exist_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, "mmx")
    with pytest.raises(Unavailable, match=r"LLMCTL_NATIVE_ISA=mmx.*baseline"):
        kernels()
