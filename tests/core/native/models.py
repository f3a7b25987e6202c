"""Tiny random models for the native executor, loaded twice: by torch, the oracle, and by the library."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from llmctl.core.checkpoint import load_config, load_model, stored_arrays, stored_tensors
from llmctl.core.config.model import ModelConfig
from llmctl.core.model import Decoder
from llmctl.core.model.frequencies import angle_tables
from llmctl.core.native.cache import CacheDtype
from llmctl.core.native.executor import NativeExecutor
from llmctl.core.native.library import ISA_VARIABLE, KERNEL_NAMES, Int4Matrix, Int8Matrix, kernels, load
from llmctl.core.native.packed import pack_model
from llmctl.core.quant import layout_for, quantise
from llmctl.core.sharedlib import Unavailable
from tests.core.model.families import reference_model


def library_is_built() -> bool:
    """Whether there is a library to test."""
    try:
        load()
    except Unavailable:
        return False
    return True


def runnable_kernels() -> list[str]:
    """The kernels that this CPU can run."""
    if not library_is_built():
        return []
    return [name for name in KERNEL_NAMES if load().llmctl_kernels(name.encode()) is not None]


@cache
def loaded(setting: str) -> tuple[Decoder, ModelConfig, dict[str, NDArray[Any]]]:
    """A model of tests/core/model/families.py as torch's decoder, its facts, and the arrays for the library."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference_model(setting).save_pretrained(folder)
        config, family, _ = load_config(folder)
        # copies: the folder goes away
        arrays = {name: array.copy() for name, array in stored_arrays(stored_tensors(folder, config, family))}
        return load_model(folder, dtype=torch.float32).model, config, arrays


def native(
    config: ModelConfig,
    arrays: dict[str, NDArray[Any]],
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    num_threads: int = 1,
    num_slots: int = 4,
    capacity: int = 48,
    quant: Literal["int8", "int4"] | None = None,
    cache_dtype: CacheDtype | None = None,
) -> NativeExecutor:
    """An executor with a cache, of quantised weights if `quant` says so."""
    tensors: dict[str, Any] = dict(arrays) if quant is None else {name: quantised(name, array, quant) for name, array in arrays.items()}
    turning = (lambda num_positions: angle_tables(config, num_positions)) if config.positions == "rope" else None
    packed = pack_model(config, tensors.items(), dtype=dtype, num_threads=num_threads)
    executor = NativeExecutor(config, packed, angles=turning, num_threads=num_threads, cache_dtype=cache_dtype)
    executor.reserve(num_slots=num_slots, capacity=capacity)
    return executor


def quantised(name: str, array: NDArray[Any], quant: Literal["int8", "int4"]) -> Any:
    """A tensor as a model of that layout holds it."""
    layout = layout_for(name, array.shape, quant)
    if layout is None:
        return array
    matrix = quantise(array, layout)
    if matrix.minimums is None:
        return Int8Matrix(matrix.codes, matrix.scales, matrix.num_columns)
    return Int4Matrix(matrix.codes, matrix.scales, matrix.minimums, matrix.num_columns)


def whole_text(executor: NativeExecutor, ids: NDArray[np.int64], *, slot: int = 0) -> NDArray[np.float32]:
    """The logits of a text (T,) fed at once into `slot`, (T, V)."""
    return executor.step(ids[None], np.array([0]), np.array([slot]), all_logits=True)[0]


@contextmanager
def forced(name: str, monkeypatch: Any) -> Iterator[None]:
    """The kernels called `name` for executors that are made inside."""
    with monkeypatch.context() as patch:
        patch.setenv(ISA_VARIABLE, name)
        assert kernels() == name
        yield
