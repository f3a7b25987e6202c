"""Text files to token shards: the plan, the workers, and what happens when one encoder has to take over from the other.
Knows settings; the reading and writing is packrun's. No tokenizer's inside and no training.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from llmctl.core.config.pack import PackConfig
from llmctl.core.data.batches import Encoders
from llmctl.core.data.cuts import may_cut
from llmctl.core.data.documents import SplitRule
from llmctl.core.data.encode import EncodeRules, framing_ids
from llmctl.core.data.encoders import UnequalError
from llmctl.core.data.packevents import Packed, PackEvent, PackPlanned, PackWarned, SplitSummary
from llmctl.core.data.packfolder import PackFolder
from llmctl.core.data.packrun import PackRun, total_bytes
from llmctl.core.data.quality import Cleaner, QualityRules, read_patterns
from llmctl.core.data.sharding import part_of
from llmctl.core.data.shards import id_dtype
from llmctl.core.data.sources import STDIN, Format, Source, find_sources
from llmctl.core.data.worker import open_encoders
from llmctl.core.errors import InputError, LlmctlError, NotFoundError, UsageError, WriteError
from llmctl.core.files import check_out_dir

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

_BYTES_FOR_A_WORKER = 2 << 20
"""Below this much text a process costs more than it brings (it starts in 0.3 s, and `tokenizers` does some 2 MB/s in one)."""
_DEFAULT_FRACTION = {"hash": 0.01, "tail": 0.1}


def never_stop() -> int | None:
    """The answer of somebody who lets it run: no signal came."""
    return None


def pack(
    config: PackConfig,
    *,
    tokenizer: "Tokenizer | None" = None,
    stdin: IO[bytes] | None = None,
    stop: Callable[[], int | None] = never_stop,
) -> Iterator[PackEvent]:
    """Pack a corpus, as events that end with Packed.

    `tokenizer` None loads `config.tokenizer`, a folder or a tokenizer.json; `stdin` is read for the input `-`. `stop` is
    asked between batches; a signal's number makes it end with Interrupted, the finished shards kept. The same call again
    goes on. The bytes of the result depend on the input and the settings, not on workers or interruptions.

    Raises UsageError, NotFoundError, InputError, WriteError, LockedError; LlmctlError when a worker dies or every record failed.
    """
    from llmctl.core.tokenizer import Tokenizer

    assert config.out_dir is not None  # PackConfig sees to both
    assert config.tokenizer is not None
    out_dir = config.out_dir
    check_out_dir(out_dir)
    format = cast("Format | None", config.format)
    sources = find_sources(config.inputs, format=format, exclude=out_dir)
    num_train_sources = len(sources)
    sources += find_sources(config.val_data, format=format, exclude=out_dir)
    if [*config.inputs, *config.val_data].count(STDIN) and stdin is None:
        raise UsageError("stdin is closed, but `-` names it as an input; pipe something in or name a file")
    tokenizer = tokenizer or Tokenizer.load(Path(config.tokenizer))
    split = split_rule(config, sources)
    if config.shard_numbers is not None:
        train = part_of(sources[:num_train_sources], *config.shard_numbers)
        sources = [*train, *part_of(sources[num_train_sources:], *config.shard_numbers)]
        num_train_sources = len(train)
        if not train:
            raise InputError(f"--shard {config.shard}: nothing of this input begins in that part; divide it among fewer")
    framing_ids(tokenizer, add_bos=config.add_bos, where=Path(config.tokenizer))  # so that a tokenizer without an end is refused early
    rules = EncodeRules(
        field=config.field,
        split=split,
        allow_special=config.allow_special,
        add_bos=config.add_bos,
        skip_errors=config.on_error == "skip",
        max_line_bytes=config.max_line_bytes,
        wants_fast=config.encoder == "auto",
        quality=quality_of(config),
    )
    Cleaner(rules.quality)  # what it needs is there, or nothing is begun
    began = time.monotonic()
    num_workers = _num_workers(config, sources)
    with contextlib.ExitStack() as stack:
        encoders = stack.enter_context(contextlib.closing(open_encoders(rules, tokenizer, num_workers)))
        plan = plan_of(config, sources, num_train_sources, split, tokenizer)
        if rules.quality.is_on:
            plan["quality"] = rules.quality.as_plan()
        folder = stack.enter_context(PackFolder.open(out_dir, plan, overwrite=config.overwrite))
        if (done := folder.finished()) is not None:
            yield _packed(folder, done, already_complete=True)
            return
        for message in folder.warnings:
            yield PackWarned(message)
        folder.keep_tokenizer(tokenizer)
        yield PackPlanned(
            num_sources=len(sources),
            num_bytes=total_bytes(sources),
            num_workers=num_workers,
            split_kind=split.kind if num_train_sources == len(sources) else "data",
            val_fraction=split.fraction,
            dtype=id_dtype(tokenizer.vocab_size).name,
            vocab_size=tokenizer.vocab_size,
            num_shards_kept=sum(len(places) for places in folder.places.values()),
        )

        def attempt(encoders: Encoders) -> Iterator[PackEvent]:
            run = PackRun(
                config,
                folder,
                sources,
                num_train_sources,
                split,
                tokenizer,
                stdin,
                stop,
                may_cut=may_cut(tokenizer.structure) and not rules.quality.is_on,  # a tool looks at whole documents
            )
            with contextlib.closing(run):
                try:
                    yield from run.events(encoders)
                    manifest = run.finish()
                except WriteError as error:
                    raise WriteError(f"{error} ({folder.kept()})") from error
            done = _packed(folder, manifest, already_complete=False)
            assert run.note is not None  # there was text
            yield dataclasses.replace(
                done,
                encoder=run.note.name,
                encoder_reason=run.note.why,
                num_checked_bytes=run.note.num_checked_bytes,
                elapsed_s=round(time.monotonic() - began, 3),
            )

        try:
            yield from attempt(encoders)
        except UnequalError as error:
            if any(source.path is None for source in sources):
                raise LlmctlError(f"{error}; give the same input again with --encoder tokenizers and --overwrite") from error
            yield PackWarned(f"{error}; all is encoded again by tokenizers")
            folder.start_again()
            encoders.close()
            slow = open_encoders(dataclasses.replace(rules, wants_fast=False), tokenizer, num_workers)
            for event in attempt(stack.enter_context(contextlib.closing(slow))):
                yield dataclasses.replace(event, encoder_reason=str(error)) if isinstance(event, Packed) else event


def quality_of(config: PackConfig) -> QualityRules:
    """What the settings say is done to documents. Raises NotFoundError and UsageError for the files that they name."""
    for path in config.decontaminate:
        if not Path(path).is_file():
            raise NotFoundError(f"--decontaminate {path}: no such file")
    return QualityRules(
        normalize=config.normalize,
        min_chars=config.min_chars,
        max_chars=config.max_chars,
        scripts=config.script,
        redact=() if config.redact is None else read_patterns(config.redact),
        dedupe=config.dedupe,
        decontaminate=tuple(os.path.abspath(path) for path in config.decontaminate),
    )


def split_rule(config: PackConfig, sources: list[Source]) -> SplitRule:
    """The rule that the settings mean; for the sources of --val-data another one, "all", takes its place."""
    if config.val_data or config.val_fraction == 0:
        return SplitRule(kind="none")
    one_document = len(sources) == 1 and sources[0].format == "text" and config.separator is None
    kind = config.val_by or ("tail" if one_document else "hash")
    fraction = _DEFAULT_FRACTION[kind] if config.val_fraction is None else config.val_fraction
    return SplitRule(kind="tail" if kind == "tail" else "hash", fraction=fraction, seed=config.split_seed if kind == "hash" else 0)


def plan_of(config: PackConfig, sources: list[Source], num_train_sources: int, split: SplitRule, tokenizer: "Tokenizer") -> dict[str, Any]:
    """Everything that decides the bytes of the result, as JSON. An interrupted run goes on only under the same plan."""
    plan: dict[str, Any] = {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "sources": [
            {
                "name": "stdin" if source.path is None else os.fsencode(source.path.name).decode("utf-8", "backslashreplace"),
                "num_bytes": source.num_bytes,
                "format": source.format,
                "is_val": number >= num_train_sources,
                **({} if source.start is None else {"start": source.start}),
            }
            for number, source in enumerate(sources)
        ],
        "field": config.field,
        "separator": config.separator,
        "split": dataclasses.asdict(split),
        "allow_special": config.allow_special,
        "add_bos": tokenizer.adds_bos if config.add_bos is None else config.add_bos,
        "on_error": config.on_error,
        "max_line_bytes": config.max_line_bytes,
        "shard_tokens": config.shard_tokens,
    }
    return plan if config.shard is None else {**plan, "shard": config.shard}


def _num_workers(config: PackConfig, sources: list[Source]) -> int:
    if config.workers is not None:
        return config.workers
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    total = total_bytes(sources)
    return num_cores if total is None else max(1, min(num_cores, total // _BYTES_FOR_A_WORKER))


def _packed(folder: PackFolder, manifest: dict[str, Any], *, already_complete: bool) -> Packed:
    def summary(name: str) -> SplitSummary | None:
        entry = manifest["splits"].get(name)
        return entry and SplitSummary(entry["num_documents"], entry["num_tokens"], entry["num_bytes"], len(entry["shards"]))

    num_errors = manifest["num_errors"]
    return Packed(
        directory=str(folder.path),
        train=summary("train") or SplitSummary(0, 0, 0, 0),
        val=summary("val"),
        num_errors=num_errors,
        errors_file=str(folder.errors_path) if num_errors else None,
        num_special_names=manifest["num_special_names"],
        quality=manifest.get("quality", {}),
        already_complete=already_complete,
    )
