"""`llmctl tokenize pack` and `verify`: draw the events of core.data.pack and core.data.verify."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from llmctl.cli.command import Command
from llmctl.cli.options import add_command
from llmctl.cli.shell import Shell
from llmctl.cli.signals import stop_flag
from llmctl.cli.streams import out
from llmctl.core.config.pack import MergeConfig, PackConfig, VerifyConfig
from llmctl.core.errors import InputError, NotFoundError, PartialFailure, UsageError
from llmctl.core.files import check_out_dir

if TYPE_CHECKING:
    from llmctl.core.data.packevents import Packed, PackPlanned, SplitSummary

PACK_HELP = """Encode a corpus into token shards for `llmctl pretrain`.

Reads .txt, .md and .jsonl files, also with .gz or .zst, folders of them, glob patterns and stdin (-). Each document ends
with the tokenizer's end-of-text id; an empty document is that id alone. The folder gets shards of a fixed number of ids,
a manifest with sizes and hashes, and a copy of the tokenizer. A run stopped in any way goes on when the same command is
given again, and the bytes are the same for any number of workers and any interruption."""
MERGE_HELP = """Join packed folders into one.

The parts of a packing (`pack --shard I/N`) become, in their order, the ids that one machine would have packed; other folders
of the same tokenizer are joined in the order given. Every file is checked while it is copied."""
VERIFY_HELP = """Check a packed folder to the last byte: sizes, hashes, headers, ids and document ends.

Names everything that is damaged; nothing is changed."""


_QUALITY = {
    "normalized": "documents normalized",
    "redacted": "matches redacted",
    "too_short": "left out, too short",
    "too_long": "left out, too long",
    "other_script": "left out, of another script",
    "contaminated": "left out, overlap with an evaluation set",
    "duplicates": "left out, duplicates",
}


def register(app: typer.Typer) -> None:
    """Add the commands to `llmctl tokenize`."""
    add_command(app, Command("tokenize pack", PackConfig, pack, PACK_HELP))
    add_command(app, Command("tokenize merge", MergeConfig, merge, MERGE_HELP))
    add_command(app, Command("tokenize verify", VerifyConfig, verify, VERIFY_HELP))


def pack(config: PackConfig, shell: Shell) -> None:
    """Run `llmctl tokenize pack`."""
    check_out_dir(Path(str(config.out_dir)))
    config = dataclasses.replace(config, decontaminate=tuple(str(path) for path in _evaluation_sets(config)))
    from llmctl.cli.tokenizer_reference import open_tokenizer
    from llmctl.core.data import packevents as core
    from llmctl.core.data.pack import pack as events_of

    stdin = None if sys.stdin is None else sys.stdin.buffer
    done: core.Packed | None = None
    with stop_flag() as stop, _bar(shell) as progress:
        task = progress.add_task("packing", total=None)
        for event in events_of(config, tokenizer=open_tokenizer(str(config.tokenizer)), stdin=stdin, stop=stop):
            if isinstance(event, core.PackPlanned):
                _show_plan(event, shell)
            elif isinstance(event, core.PackProgress):
                text = f"{event.num_documents:,} documents, {event.num_tokens:,} tokens"
                progress.update(task, completed=event.num_bytes_done, total=event.num_bytes, description=text)
            elif isinstance(event, core.ShardWritten):
                shell.detail(f"{event.name}: {event.num_tokens:,} tokens, {event.num_bytes:,} bytes")
            elif isinstance(event, core.PackWarned):
                shell.warn(event.message)
            else:
                done = event
    assert done is not None
    _show_result(done, shell)
    if done.num_errors:
        records = (
            "1 record could not be read and was" if done.num_errors == 1 else f"{done.num_errors:,} records could not be read and were"
        )
        raise PartialFailure(f"{records} left out; {done.errors_file} lists them")


class _Unseen:
    """A bar where there is no terminal to draw it: rich alone takes a tenth of a short packing to import."""

    def add_task(self, *_: Any, **__: Any) -> int:
        return 0

    def update(self, *_: Any, **__: Any) -> None:
        pass


def _bar(shell: Shell) -> Any:
    """A bar of bytes: how far, how fast, how long still."""
    if not shell.live:
        return contextlib.nullcontext(_Unseen())
    from rich.progress import BarColumn, DownloadColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    description = TextColumn("{task.description}")
    return shell.progress(description, BarColumn(), TaskProgressColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())


def _evaluation_sets(config: PackConfig) -> Iterator[Path]:
    """The files of --decontaminate: a file by its path, a task by the data set that `llmctl eval` would read."""
    for name in (name for names in config.decontaminate for name in ([names] if Path(names).is_file() else names.split(",")) if name):
        if Path(name).is_file() and Path(name).suffix != ".toml":
            yield Path(name)
            continue
        from llmctl.core.evals.items import find_file
        from llmctl.core.evals.task import BUILT_IN_FOLDER, built_in_tasks, load_task

        if name not in built_in_tasks() and not name.endswith(".toml"):
            known = ", ".join(built_in_tasks())
            raise NotFoundError(f"--decontaminate {name}: no such file, and no such task; the built-in ones are {known}")
        task = load_task(name)
        if config.eval_data is None and task.path.parent == BUILT_IN_FOLDER:
            raise UsageError(f"--decontaminate {name}: the task's data is not part of llmctl; name its folder with --eval-data DIR")
        try:
            yield find_file(task.dataset, config.eval_data or task.path.parent, task=task)
        except NotFoundError as error:
            raise NotFoundError(
                f"--decontaminate {name}: {str(error).split(';')[0]}; name the folder that does with --eval-data DIR"
            ) from error


def _show_plan(plan: "PackPlanned", shell: Shell) -> None:
    size = "stdin" if plan.num_bytes is None else f"{plan.num_bytes:,} bytes"
    held_out = {
        "hash": f"{plan.val_fraction:.4g} of the documents held out",
        "tail": f"the last {plan.val_fraction:.4g} of each document held out",
        "data": "validation from --val-data",
    }.get(plan.split_kind, "nothing held out")
    files = "1 input" if plan.num_sources == 1 else f"{plan.num_sources:,} inputs"
    workers = "1 worker" if plan.num_workers == 1 else f"{plan.num_workers} workers"
    shell.note(f"packing {files} ({size}) as {plan.dtype}, vocabulary {plan.vocab_size:,}, {workers}; {held_out}")
    if plan.num_shards_kept:
        shards = "1 finished shard is" if plan.num_shards_kept == 1 else f"{plan.num_shards_kept} finished shards are"
        shell.note(f"going on with an interrupted run: {shards} kept")


def _show_result(done: "Packed", shell: Shell) -> None:
    if shell.json:
        out.line(json.dumps(dataclasses.asdict(done), ensure_ascii=False))
    if done.already_complete:
        shell.note(f"{done.directory}: already packed from these inputs with these settings; --overwrite packs it again")
    _show_split("train", done.train, shell)
    if done.val is not None:
        _show_split("val", done.val, shell)
    for what, number in done.quality.items():
        shell.note(f"{_QUALITY[what]}: {number:,}")
    if done.already_complete:
        return
    num_bytes = sum(split.num_bytes for split in (done.train, done.val) if split is not None)
    rate = f" in {done.elapsed_s:.1f} s ({num_bytes / 1e6 / done.elapsed_s:.1f} MB/s)" if done.elapsed_s else ""
    shell.note(f"packed into {done.directory}{rate}")
    if done.encoder == "gigatoken":
        shell.detail(f"encoded by gigatoken; {done.num_checked_bytes:,} bytes were encoded by tokenizers too, and the ids are equal")
    else:
        shell.detail(f"encoded by tokenizers{f'; gigatoken was not used: {done.encoder_reason}' if done.encoder_reason else ''}")


def _show_split(name: str, split: "SplitSummary", shell: Shell) -> None:
    ratio = f", {split.num_bytes / split.num_tokens:.3f} bytes a token" if split.num_tokens else ""
    documents = "1 document" if split.num_documents == 1 else f"{split.num_documents:,} documents"
    shell.note(f"{name:5}  {documents}, {split.num_tokens:,} tokens, {split.num_bytes:,} bytes of text{ratio}")


def merge(config: MergeConfig, shell: Shell) -> None:
    """Run `llmctl tokenize merge`."""
    check_out_dir(Path(str(config.out_dir)))
    from llmctl.core.data import merge as core

    done: core.Merged | None = None
    with stop_flag() as stop, _bar(shell) as progress:
        task = progress.add_task("joining", total=None)
        for event in core.merge(config.directories, Path(str(config.out_dir)), stop=stop):
            if isinstance(event, core.MergeProgress):
                progress.update(task, completed=event.num_bytes_done, total=event.num_bytes)
            else:
                done = event
    assert done is not None
    if shell.json:
        out.line(json.dumps(dataclasses.asdict(done), ensure_ascii=False))
    shards = "1 shard" if done.num_shards == 1 else f"{done.num_shards} shards"
    what = f"{shards}, {done.num_documents:,} documents, {done.num_tokens:,} tokens"
    shell.note(f"{done.directory}: {done.num_folders} folders joined; {what}")


def verify(config: VerifyConfig, shell: Shell) -> None:
    """Run `llmctl tokenize verify`."""
    from llmctl.core.data import verify as core

    damage: list[str] = []
    done: core.Verified | None = None
    with stop_flag() as stop, _bar(shell) as progress:
        task = progress.add_task("verifying", total=None)
        for event in core.verify(Path(str(config.directory)), stop=stop):
            if isinstance(event, core.VerifyProgress):
                progress.update(task, completed=event.num_bytes_done, total=event.num_bytes)
            elif isinstance(event, core.FileChecked):
                shell.detail(f"{event.name}: ok, {event.num_bytes:,} bytes")
            elif isinstance(event, core.DamageFound):
                damage.append(event.message)
            else:
                done = event
    assert done is not None
    if shell.json:
        out.line(json.dumps({**dataclasses.asdict(done), "damage": damage}, ensure_ascii=False))
    for message in damage[1:]:
        shell.note(message)
    if damage:
        more = f" ({len(damage)} faults in all)" if len(damage) > 1 else ""
        raise InputError(f"{damage[0]}{more}; pack the data again, or restore the file")
    shell.note(f"{done.directory}: sound; {done.num_files} files, {done.num_documents:,} documents, {done.num_tokens:,} tokens")
