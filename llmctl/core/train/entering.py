"""Before a run begins: what cannot be is refused, its folder is entered, its checkpoint chosen, on all ranks alike. Knows no model."""

import os
from collections.abc import Iterator
from pathlib import Path

from llmctl.core.config.fields import flag_of, options_of
from llmctl.core.config.finetune import FinetuneConfig
from llmctl.core.config.pretrain import PretrainConfig
from llmctl.core.distributed.ranks import Ranks
from llmctl.core.errors import Interrupted, NotFoundError, UsageError
from llmctl.core.files import check_out_dir
from llmctl.core.runlog import RunFolder
from llmctl.core.train import state as checkpoints
from llmctl.core.train.events import Event

RunConfig = PretrainConfig | FinetuneConfig


def begins(config: RunConfig) -> bool:
    """Refuse what cannot be; whether the run goes on from a checkpoint."""
    if config.out_dir is None and not config.dry_run:
        raise UsageError("--out-dir is missing: the run folder for checkpoints and metrics")
    _check_names(config)
    resuming = _wants_resume(config)
    if config.out_dir is not None and not resuming:
        check_out_dir(config.out_dir)
        _refuse_used(config)
    return resuming


def enter(path: Path, ranks: Ranks, *, fresh: bool) -> RunFolder:
    """The run folder, held by rank 0 for all."""
    held: list[RunFolder] = []
    ranks.on_main(lambda: held.append(RunFolder(path, fresh=fresh)))
    return held[0] if held else RunFolder(path, fresh=fresh, writes=False)


def found_together(config: RunConfig, ranks: Ranks) -> tuple[checkpoints.Checkpoint, list[str]]:
    """The checkpoint that rank 0 chose, so that all have the same."""
    found: list[checkpoints.Checkpoint] = []

    def choose() -> tuple[str, list[str]]:
        checkpoint, warnings = _find_checkpoint(config)
        found.append(checkpoint)
        return str(checkpoint.path), warnings

    path, warnings = ranks.on_main(choose)
    return found[0] if found else checkpoints.open_checkpoint(Path(path), hashes=False), warnings


def opened_together(opening: Iterator[Event], ranks: Ranks) -> Iterator[Event]:
    """What is opened on each rank; a signal that comes to one of them meanwhile ends all."""
    number = 0
    try:
        yield from opening
    except Interrupted as error:
        if ranks.size == 1:
            raise
        number = error.signal_number
    ranks.wait()  # one may have taken much longer to read its data
    if number := ranks.greatest(number):
        raise Interrupted("stopped before the first step", signal_number=number)


def check_share(batch_size: int, parts: int) -> None:
    """Raise UsageError when so many processes cannot take equal parts of a batch."""
    if batch_size % parts:
        raise UsageError(f"--batch-size {batch_size}: {parts} processes cannot share it equally; give a multiple")


def _check_names(config: RunConfig) -> None:
    """Refuse names that are no UTF-8: config.toml, status.json and the metrics are text, and hold them."""
    for option in options_of(type(config)):
        value = getattr(config, option.name)
        for name in value if isinstance(value, tuple) else (value,):
            try:
                str(name).encode("utf-8")
            except UnicodeEncodeError:
                raise UsageError(
                    f"{flag_of(option)} {os.fsencode(str(name))!r}: the name is not UTF-8, so the run's settings cannot hold it; rename it"
                ) from None


def _refuse_used(config: RunConfig) -> None:
    """Say early, before data is read, what entering the folder would say later: that it is in use, or holds a run."""
    if config.out_dir is not None and not config.auto_resume and checkpoints.step_folders(config.out_dir):
        RunFolder(config.out_dir, fresh=True).close()


def _wants_resume(config: RunConfig) -> bool:
    if config.resume_from is not None:
        if config.out_dir is not None and config.resume_from.resolve().parent != config.out_dir.resolve():
            raise UsageError(f"--resume-from {config.resume_from}: is not a checkpoint of --out-dir {config.out_dir}")
        if not config.resume_from.is_dir():
            raise NotFoundError(f"--resume-from {config.resume_from}: no such checkpoint")
        return True
    if config.resume:
        if config.out_dir is None or not config.out_dir.is_dir():
            raise NotFoundError(f"--resume: no run folder {config.out_dir}; --auto-resume starts one")
        return True
    return config.auto_resume and config.out_dir is not None and bool(checkpoints.step_folders(config.out_dir))


def _find_checkpoint(config: RunConfig) -> tuple[checkpoints.Checkpoint, list[str]]:
    if config.resume_from is not None:
        checkpoints.step_of(config.resume_from)
        return checkpoints.open_checkpoint(config.resume_from), []
    assert config.out_dir is not None
    found, warnings = checkpoints.newest_good(config.out_dir)
    if found is None:
        raise NotFoundError(f"--resume: {config.out_dir} holds no checkpoint; --auto-resume starts afresh in such a case")
    return found, warnings
