"""From a model's path to an executor: the native library where it can, torch elsewhere. Knows files and machines; no text.

On a CPU the native executor needs no torch, whose import takes longer than many an answer, so torch is imported only when
it is to compute.
"""

import math
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import UsageError
from llmctl.core.infer.executor import Executor
from llmctl.core.infer.memory import cache_token_bytes

if TYPE_CHECKING:
    from llmctl.core.infer.source import Source
    from llmctl.core.infer.weightcache import CacheKey
    from llmctl.core.native.cache import CacheDtype
    from llmctl.core.native.packed import HeldDtype, PackedModel

ExecutorKind = Literal["auto", "native", "torch"]

_NATIVE_DTYPES: "dict[str, HeldDtype]" = {"float32": "float32", "f32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
_CPU_TOKEN_COST, _GPU_TOKEN_COST = 0.1, 0.01
"""On a CPU 8 tokens at once took 1.6 times as long as one, 16 took 2.6 (int8 and bf16); a GPU waits for memory much longer."""
_BYTES_A_THREAD = 64 << 10
"""A product of fewer bytes of weights a thread costs more in waiting for the others than it saves."""


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model that is ready to compute, and what its files say of it."""

    executor: Executor
    kind: Literal["native", "torch"]
    config: ModelConfig
    eos_ids: tuple[int, ...]
    generation: dict[str, Any]
    """generation_config.json, or {}."""
    description: str
    """Family, number format, device and executor, for people."""
    token_cost: float
    """What one more token in a decoding call costs, about, in units of a call for one token."""
    cache_token_bytes: int
    """Bytes of keys and values of one token."""
    device: str
    note: str | None = None
    """What the user should know of how it runs."""


def open_model(
    path: Path,
    *,
    device: str = "auto",
    dtype: str | None = None,
    quant: Literal["int8", "int4"] | None = None,
    threads: int | None = None,
    executor: ExecutorKind = "auto",
    adapter: Path | None = None,
    kv_dtype: "CacheDtype | None" = None,
    cuda_graphs: bool = True,
) -> OpenedModel:
    """Load the model in `path` for the executor that is asked for, or the better one; any architecture that transformers knows.

    `adapter` is a directory with an adapter to merge into the weights. `kv_dtype` says how the native executor holds keys and
    values; None is float32 beside float32 weights, else float16. `cuda_graphs`: see TorchExecutor.

    Raises NotFoundError, InputError, and UsageError when the native executor is needed and cannot run the model.
    """
    why_torch = "as asked for"
    if executor != "torch":
        reason = _why_not_native(path, device=device, dtype=dtype, quant=quant)
        if reason is None:
            return _open_native(path, dtype=dtype, quant=quant, threads=threads, adapter=adapter, kv_dtype=kv_dtype)
        if executor == "native":
            raise UsageError(f"--executor native: {reason}; use --executor torch")
        why_torch = reason
    if kv_dtype is not None:
        raise UsageError(f"--kv-dtype {kv_dtype} needs the native executor, and torch computes here ({why_torch}); leave it out")
    return _open_torch(
        path, device=device, dtype=dtype, quant=quant, threads=threads, why=why_torch, adapter=adapter, cuda_graphs=cuda_graphs
    )


def _why_not_native(path: Path, *, device: str, dtype: str | None, quant: str | None) -> str | None:
    """Why torch must compute, or None. Reads the config: raises NotFoundError and InputError."""
    from llmctl.core.checkpoint import load_config, own_layout, unknown_architecture
    from llmctl.core.native import executor, library
    from llmctl.core.sharedlib import Unavailable

    if device not in ("auto", "cpu"):
        return f"the native executor runs on the CPU, not on {device}"
    if device == "auto" and _may_have_accelerator():
        return "there may be a GPU, which torch can use"
    if dtype is not None and dtype not in _NATIVE_DTYPES:
        return f"the native executor holds no {dtype} weights"
    if path.suffix == ".gguf":
        from llmctl.core.checkpoint.gguf import open_gguf

        config, is_quantised = open_gguf(path).config, quant is not None
    else:
        if unknown_architecture(path) is not None:
            return "the architecture is not one of llmctl's own"
        config, _, raw = load_config(path)
        is_quantised = quant is not None or own_layout(raw, where=path / "config.json") is not None
    if is_quantised and _NATIVE_DTYPES.get(dtype or "f32") != "float32":
        return "with quantised weights the native executor holds the rest in float32"
    try:
        library.kernels()
    except Unavailable as error:
        return str(error)
    return executor.supports(config)


def _may_have_accelerator() -> bool:
    """Whether torch might find a GPU; a guess from the machine that needs no torch and errs towards yes."""
    if sys.platform == "darwin":
        return os.uname().machine == "arm64"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "any").strip() in ("", "-1"):
        return False
    return any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg"))


def _open_native(
    path: Path,
    *,
    dtype: str | None,
    quant: Literal["int8", "int4"] | None,
    threads: int | None,
    adapter: Path | None,
    kv_dtype: "CacheDtype | None",
) -> OpenedModel:
    from llmctl.core.infer import weightcache
    from llmctl.core.infer.source import open_source
    from llmctl.core.model.facts import layer_matmul_parameters
    from llmctl.core.model.frequencies import angle_tables
    from llmctl.core.native.executor import NativeExecutor
    from llmctl.core.native.packed import pack_model

    source = open_source(path, adapter=adapter)
    config, layout = source.config, quant or source.own
    held = _held(source, dtype=dtype, quant=quant)
    if threads is None:
        number_bytes = {"int8": 1.0, "int4": 0.6}[layout] if layout is not None else 2 if held == "bfloat16" else 4
        layer_bytes = int(sum(layer_matmul_parameters(config)) // config.num_layers * number_bytes)
        threads = max(1, min(available_threads(), layer_bytes // 4 // _BYTES_A_THREAD))  # a layer has about four products
    key = cache_key(source, held=held, quant=quant)
    packed = weightcache.load(key, config) if key is not None else None
    is_cached = packed is not None
    if packed is None:
        packed = pack_model(config, source.tensors(quant), dtype=held, num_threads=threads)
        if key is not None and (packed.num_bytes >= weightcache.SMALLEST_BYTES or quant is not None):
            _store_beside(key, packed, source)
    executor = NativeExecutor(
        config,
        packed,
        angles=(lambda num_positions: angle_tables(config, num_positions)) if config.positions == "rope" else None,
        num_threads=threads,
        cache_dtype=kv_dtype,
    )
    number_format = held if layout is None else f"{layout} in {held}"
    how = f"{executor.kernels}, {threads} thread{'s' if threads > 1 else ''}{', packed weights from the cache' if is_cached else ''}"
    if kv_dtype is not None:
        number_format += f" with keys and values in {kv_dtype}"
    return OpenedModel(
        executor=executor,
        kind="native",
        config=config,
        eos_ids=source.eos_ids,
        generation=source.generation,
        token_cost=_CPU_TOKEN_COST + _experts_share(config),
        cache_token_bytes=cache_token_bytes(config, executor.cache_dtype),
        device="cpu",
        description=f"{source.family}, {number_format} on cpu, native ({how})",
    )


def _experts_share(config: ModelConfig) -> float:
    """The share of a token's weights that another token reads anew, since it goes to other experts."""
    from llmctl.core.model.facts import layer_matmul_parameters, matmul_parameters

    if config.experts is None:
        return 0.0
    _, used = layer_matmul_parameters(config)
    idle = 1 - config.experts.num_active / config.experts.num_experts
    return used * idle / matmul_parameters(config)


def _held(source: "Source", *, dtype: str | None, quant: str | None) -> "HeldDtype":
    """How matrices are held that are not quantised."""
    if dtype is not None:
        return _NATIVE_DTYPES[dtype]
    return "bfloat16" if source.stored == "BF16" and (quant or source.own) is None else "float32"


def verify_packed(
    path: Path, *, dtype: str | None = None, quant: Literal["int8", "int4"] | None = None, adapter: Path | None = None
) -> str | None:
    """Check the packed weights that are kept for a model, opened so, against the hashes of them and of the model's files.

    Gives their file, or None when none are kept. Raises InputError for damaged ones, which are removed, UsageError for a model
    that does not run natively, and what opening the model raises.
    """
    from llmctl.core.infer.source import open_source
    from llmctl.core.infer.weightcache import verify

    if (reason := _why_not_native(path, device="cpu", dtype=dtype, quant=quant)) is not None:
        raise UsageError(f"--verify-cache: no packed weights are kept for this model: {reason}")
    source = open_source(path, adapter=adapter)
    key = cache_key(source, held=_held(source, dtype=dtype, quant=quant), quant=quant)
    return None if key is None else verify(key)


def cache_key(source: "Source", *, held: str, quant: str | None) -> "CacheKey | None":
    """What the packed weights of a model are kept under; None when nothing is kept."""
    from llmctl.core.cachefiles import directory
    from llmctl.core.infer.weightcache import CacheKey

    if directory() is None:
        return None
    try:
        return CacheKey.of((*source.weight_files, *source.config_files), held=held, quant=quant)
    except OSError:
        return None


def _store_beside(key: "CacheKey", packed: "PackedModel", source: "Source") -> None:
    """Write the packed weights while the answer is made. The process ends when both are done."""
    from llmctl.core.infer.weightcache import store

    threading.Thread(
        target=store, args=(key, packed), kwargs={"sources": source.weight_files}, name="llmctl packed weights", daemon=False
    ).start()


def _open_torch(
    path: Path,
    *,
    device: str,
    dtype: str | None,
    quant: Literal["int8", "int4"] | None,
    threads: int | None,
    why: str,
    adapter: Path | None,
    cuda_graphs: bool,
) -> OpenedModel:
    import torch

    from llmctl.core.checkpoint import load_model
    from llmctl.core.infer.torch_executor import TorchExecutor
    from llmctl.core.model.device import choose_device, compute_dtype

    if threads is not None:
        torch.set_num_threads(threads)
    chosen = choose_device(device)
    loaded = load_model(path, dtype=compute_dtype(dtype, chosen), device=chosen, quant=quant, adapt=True, adapter=adapter)
    executor = TorchExecutor(loaded.model, decode=None if cuda_graphs else "eager")
    how = "torch, CUDA graphs" if executor.decode == "recorded" else "torch"
    return OpenedModel(
        executor=executor,
        kind="torch",
        config=loaded.config,
        eos_ids=loaded.eos_ids,
        generation=loaded.generation,
        token_cost=(_CPU_TOKEN_COST if chosen.type == "cpu" else _GPU_TOKEN_COST) + _experts_share(loaded.config),
        cache_token_bytes=cache_token_bytes(loaded.config, str(loaded.model.dtype).removeprefix("torch.")),
        device=str(chosen),
        description=f"{loaded.family}, {loaded.number_format} on {chosen}, {how} ({why})",
        note=loaded.note,
    )


def available_threads() -> int:
    """Cores that this process may use: those it is bound to, and not more than a container's quota of CPU time."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            count = min(count, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        pass
    return max(1, count)
