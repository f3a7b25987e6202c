"""Checkpoints that several processes write and read, each its part. Knows DTensors and torch.distributed.checkpoint; no loop.

The folder is that of state.py, with the model in as many files as there are ranks and with `trainer/shard-…safetensors`, a
file a rank, in place of optimizer.safetensors: torch.distributed.checkpoint's safetensors storage, which any number of ranks
reads. It is asked neither to consolidate (that loses 0-d tensors) nor for its own `.metadata` (a pickle).
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from llmctl.core.distributed.ranks import Ranks
from llmctl.core.errors import InputError, LlmctlError, WriteError, first_line
from llmctl.core.files import atomic_dir, fsync_file, write_json, write_manifest
from llmctl.core.train import state as checkpoints

OPTIMIZER_NAME = "optimizer.safetensors"


def save_together(
    run_dir: Path,
    state: checkpoints.TrainerState,
    *,
    write_model: Callable[[Path], None],
    optimizer: Mapping[str, Tensor],
    rng: Mapping[str, Tensor],
    expected_bytes: int,
    ranks: Ranks,
) -> int:
    """Write a checkpoint, each rank its part; give its size in bytes. Raises WriteError on all ranks when one cannot write.

    As state.save_checkpoint does, whose files these are: nothing has the checkpoint's name before all is there. `optimizer`
    are DTensors, which may lie on the CPU; `write_model` asks nothing of other ranks. It may run in a thread, with `ranks`
    that are `apart` from those of the steps.
    """
    target = checkpoints.step_folder(run_dir, state.step)
    with contextlib.ExitStack() as stack:

        def begin() -> str:
            checkpoints.check_room(target, expected_bytes)
            if target.exists():
                checkpoints.discard(target)
            temp = stack.enter_context(atomic_dir(target, before_rename=write_manifest))
            (temp / "trainer").mkdir()
            save_file(dict(rng), temp / "trainer" / "rng.safetensors")
            write_json(temp / "trainer" / "state.json", asdict(state))
            return str(temp)

        temp = Path(ranks.on_main(begin))
        before = set(temp.rglob("*")) if ranks.is_main else set()
        # one after the other: a rank whose weights find no room must not leave the others waiting for its part of the optimizer
        for write in (lambda: write_model(temp), lambda: _write_optimizer(temp, optimizer, ranks), lambda: _sync(temp, besides=before)):
            ranks.all_or_none(partial(_write, write, target, expected_bytes), doing=f"saving {target}")
        # leaving the block, rank 0 writes the manifest and gives the folder its name
        return int(ranks.on_main(lambda: _finish(stack, target)))


def _write(write: Callable[[], None], target: Path, expected_bytes: int) -> None:
    try:
        write()
    except LlmctlError:
        raise
    except Exception as error:  # torch wraps what happened on each rank in an exception of its own
        raise checkpoints.as_write_error(_cause(error), target, expected_bytes) from error


def _write_optimizer(temp: Path, optimizer: Mapping[str, Tensor], ranks: Ranks) -> None:
    writer = HuggingFaceStorageWriter(str(temp / "trainer"), save_distributed=True)
    save(dict(optimizer), storage_writer=writer, process_group=ranks.patient)


def _sync(temp: Path, *, besides: set[Path]) -> None:
    for path in temp.rglob("*.safetensors"):
        if path not in besides:
            fsync_file(path)


def _cause(error: Exception) -> Exception:
    inner = _inner(error)
    return inner if isinstance(inner, OSError) else WriteError(f"cannot save: {first_line(inner)}")


def _finish(stack: contextlib.ExitStack, target: Path) -> int:
    stack.close()
    return sum(p.stat().st_size for p in target.rglob("*") if p.is_file())


def load_whole(checkpoint: Path) -> dict[str, Tensor]:
    """The optimizer's state as whole tensors, whoever wrote it. Raises InputError."""
    trainer = checkpoint / "trainer"
    if (trainer / OPTIMIZER_NAME).is_file():
        return checkpoints.load_tensors(trainer / OPTIMIZER_NAME)
    with _readable(trainer):
        reader = HuggingFaceStorageReader(str(trainer))
        found = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in found.items()
            if isinstance(entry, TensorStorageMetadata) and name not in checkpoints.RNG_NAMES
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it assumes to be alone, as it is told
            load(cast(dict[str, Any], tensors), storage_reader=HuggingFaceStorageReader(str(trainer)), no_dist=True)
    return tensors


def load_parts(checkpoint: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Read each rank's part of the optimizer's state into `tensors`, DTensors, whoever wrote it. Raises InputError."""
    trainer = checkpoint / "trainer"
    with ranks.contact(), _readable(trainer):
        reader = HuggingFaceStorageReader(str(trainer))
        ranks.watched(lambda: load(dict(tensors), storage_reader=reader, process_group=ranks.patient))


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Within it, what torch.distributed.checkpoint raises about missing or unfit tensors is an InputError that names the folder."""
    try:
        yield
    except LlmctlError:
        raise
    except Exception as error:
        raise InputError(f"{folder}: cannot read the optimizer's state: {first_line(_inner(error))}") from error


def _inner(error: Exception) -> BaseException:
    failures = getattr(error, "failures", None)
    inner = next(iter(failures.values())) if isinstance(failures, dict) and failures else error
    inner = inner[0] if isinstance(inner, tuple) else inner
    return inner if isinstance(inner, BaseException) else error
