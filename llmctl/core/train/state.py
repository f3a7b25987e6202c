"""Training checkpoints: saved whole or not at all, found again, checked, compared. Knows files; knows no loop.

step-00000500/  a model directory with float32 masters
    trainer/    optimizer.safetensors  rng.safetensors  state.json
    manifest.json
"""

import errno
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmctl import __version__
from llmctl.core.errors import InputError, NotFoundError, UsageError, WriteError, write_error
from llmctl.core.files import TEMP_PREFIX, atomic_dir, check_manifest, fsync_dir, read_json, write_json, write_manifest

FORMAT = 1
_THEN = "go on with --resume"
"""What to do when a checkpoint found no room: the same command again would meet a folder that is in use."""
_STEP_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """The numbers of a checkpoint beside its tensors. `settings` shape the course of a run; `identity` says of what it is."""

    step: int
    num_steps: int
    warmup_steps: int
    num_updates: int
    """Optimizer steps taken: `step` less the skipped ones."""
    tokens_seen: int
    skipped_steps: int
    elapsed_s: float
    settings: dict[str, Any]
    identity: dict[str, Any]
    skipped_samples: int = 0
    """Samples that were left out when the run went back from a spike."""
    recent_losses: tuple[float, ...] = ()
    llmctl_version: str = __version__
    torch_version: str = torch.__version__
    threads: int = 0
    machine: str = ""
    ranks: int = 1
    format: int = FORMAT


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    state: TrainerState


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run_dir / f"step-{step:08d}"


def step_folders(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first. Links are not followed and other names not looked at."""
    if not run_dir.is_dir():
        return []
    return sorted(p for p in run_dir.iterdir() if _STEP_NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink())


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name. Raises UsageError for another name."""
    match = _STEP_NAME.fullmatch(folder.name)
    if match is None:
        raise UsageError(f"{folder} is not a checkpoint folder; its name would be like step-00000500")
    return int(match.group(1))


def open_checkpoint(path: Path, *, hashes: bool = True) -> Checkpoint:
    """Check every hash (or only the sizes) of a checkpoint and read its state. Raises NotFoundError or InputError that names the file."""
    if not path.is_dir():
        raise NotFoundError(f"{path}: no such checkpoint; the run's checkpoints are folders named step-XXXXXXXX")
    check_manifest(path, hashes=hashes)
    where = path / "trainer" / "state.json"
    raw = read_json(where)
    known = {f.name for f in fields(TrainerState)}
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise InputError(f"{where}: not a training state of format {FORMAT}; it was written by another version")
    try:
        state = TrainerState(**{k: v for k, v in raw.items() if k in known})
    except TypeError as error:
        raise InputError(f"{where}: incomplete training state: {error}") from error
    return Checkpoint(path, state)


def newest_good(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files all match its manifest, and a warning for each newer one that does not.

    None means that there is no checkpoint folder at all. Raises InputError when there are some and all are bad.
    """
    warnings: list[str] = []
    folders = step_folders(run_dir)
    for folder in reversed(folders):
        try:
            return open_checkpoint(folder), warnings
        except (InputError, NotFoundError) as error:
            warnings.append(f"{error}; falling back to an older checkpoint")
    if folders:
        raise InputError(f"{run_dir}: none of the {len(folders)} checkpoints is good; the newest: {warnings[0].removesuffix(_FALLBACK)}")
    return None, warnings


_FALLBACK = "; falling back to an older checkpoint"


def save_checkpoint(
    run_dir: Path,
    state: TrainerState,
    *,
    write_model: Callable[[Path], None],
    optimizer: Mapping[str, Tensor],
    expected_bytes: int,
    rng: Mapping[str, Tensor] | None = None,
) -> tuple[Path, int]:
    """Write a checkpoint; give its folder and its size in bytes. Raises WriteError with the room needed and left.

    `rng` is what rng_tensors gave at that step; None means now.

    A folder of the same name, which a resumed run found bad or left behind, is replaced.
    """
    from safetensors.torch import save_file

    target = step_folder(run_dir, state.step)
    check_room(target, expected_bytes)
    try:
        if target.exists():
            discard(target)
        with atomic_dir(target, before_rename=write_manifest) as temp:
            write_model(temp)
            trainer = temp / "trainer"
            trainer.mkdir()
            save_file({k: v.detach().cpu().contiguous() for k, v in optimizer.items()}, trainer / "optimizer.safetensors")
            save_file(dict(rng or rng_tensors()), trainer / "rng.safetensors")
            write_json(trainer / "state.json", asdict(state))
    except Exception as error:
        raise as_write_error(error, target, expected_bytes) from error
    num_bytes = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    return target, num_bytes


def check_room(target: Path, expected_bytes: int) -> None:
    """Raise WriteError when the disk has no room for `expected_bytes` at `target`."""
    free = shutil.disk_usage(target.parent).free
    if free < expected_bytes:
        raise write_error(OSError(errno.ENOSPC, "no space"), path=target, bytes_needed=expected_bytes, bytes_free=free, then=_THEN)


def as_write_error(error: Exception, target: Path, expected_bytes: int) -> Exception:
    """A failure to write, with the room needed and left; safetensors gives the number of the OS error in its text only."""
    cause = error.__cause__ if isinstance(error, WriteError) else error
    found = re.search(r"os error (\d+)", str(cause))
    number = cause.errno if isinstance(cause, OSError) else int(found.group(1)) if found else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
        free = shutil.disk_usage(target.parent).free
        return write_error(OSError(number, os.strerror(number)), path=target, bytes_needed=expected_bytes, bytes_free=free, then=_THEN)
    return error


def discard(folder: Path) -> None:
    """Remove a checkpoint folder of ours: first under a temporary name, so that half of one never looks like a checkpoint."""
    if folder.is_symlink():
        raise UsageError(f"{folder} is a symbolic link; refusing to remove what it points to")
    doomed = folder.parent / f"{TEMP_PREFIX}old-{folder.name}-{os.getpid()}"
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def prune(run_dir: Path, *, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints; never below two."""
    for folder in step_folders(run_dir)[: -max(2, keep_last)]:
        discard(folder)


def set_aside_after(run_dir: Path, step: int) -> list[Path]:
    """Rename checkpoints beyond `step`, which a run resumed at `step` will write anew; give their new places."""
    moved = []
    for folder in step_folders(run_dir):
        if step_of(folder) > step:
            place, number = run_dir / f"unused-{folder.name}", 1
            while place.exists():
                number += 1
                place = run_dir / f"unused-{folder.name}-{number}"
            os.rename(folder, place)
            moved.append(place)
    if moved:
        fsync_dir(run_dir)
    return moved


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises InputError that names it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}") from error


RNG_NAMES = ("torch_cpu", "torch_cuda")


def rng_tensors() -> dict[str, Tensor]:
    """The state of torch's generators."""
    tensors = {"torch_cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["torch_cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_rng(checkpoint: Path) -> None:
    """Put torch's generators where they were when `checkpoint` was saved."""
    tensors = load_tensors(checkpoint / "trainer" / "rng.safetensors")
    torch.set_rng_state(tensors["torch_cpu"])
    if "torch_cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["torch_cuda"])


def machine() -> str:
    """What bit-identity depends on, beside versions and threads."""
    return f"{platform.system()} {platform.machine()}"


def compare(
    saved: TrainerState, *, settings: Mapping[str, Any], identity: Mapping[str, Any], allowed: tuple[str, ...], threads: int, ranks: int = 1
) -> list[str]:
    """Refuse to resume under other conditions; give warnings about those that only cost bit-identity.

    Raises InputError for another model, tokenizer or data set, UsageError for another setting that is not in `allowed`
    and for an allowed key that is no setting.
    """
    unknown = [key for key in allowed if key.replace("-", "_") not in settings]
    if unknown:
        raise UsageError(f"--allow-change {unknown[0]}: no such setting; those that shape a run are {', '.join(sorted(settings))}")
    other = [k for k in sorted(identity) if saved.identity.get(k) != identity[k]]
    if other:
        details = "; ".join(text for k in other for text in _differences(k, saved.identity.get(k), identity[k]))
        raise InputError(f"cannot resume with other {' and '.join(other)} ({details}); start a new run for that")
    permitted = {key.replace("-", "_") for key in allowed}
    changed = [k for k in sorted(settings) if saved.settings.get(k) != settings[k] and k not in permitted]
    if changed:
        details = "; ".join(f"{k}: the run has {saved.settings.get(k)!r}, {settings[k]!r} was given" for k in changed)
        flags = " ".join(f"--allow-change {k}" for k in changed)
        raise UsageError(f"cannot resume with changed settings ({details}); give the run's, or say {flags}")
    here = {"llmctl": __version__, "torch": torch.__version__, "threads": threads, "ranks": ranks, "machine": machine()}
    then = {"llmctl": saved.llmctl_version, "torch": saved.torch_version, "threads": saved.threads}
    then |= {"ranks": saved.ranks, "machine": saved.machine}
    differing = [f"{k} {then[k]} then, {here[k]} now" for k in here if then[k] != here[k]]
    return [f"the checkpoint was made under other conditions ({'; '.join(differing)}): bit-identity is not promised"] if differing else []


def _differences(name: str, then: Any, now: Any) -> list[str]:
    """What differs, in words; of two tables, the entries that do."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [k for k in {**then, **now} if then.get(k) != now.get(k)]
        return [text for k in keys for text in _differences(k, then.get(k), now.get(k))]
    return [f"{name}: the run has {_short(then)}, {_short(now)} was given"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
