"""Supervised fine-tuning: from FinetuneConfig to a job for the loop. Knows rows, templates and models; knows no command line."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, cast

import torch

from llmctl.core.config.finetune import DEFAULT_EPOCHS, FinetuneConfig
from llmctl.core.data.chat import BadRow
from llmctl.core.data.packing import PackedSource
from llmctl.core.data.supervised import (
    EncodedExamples,
    ExampleEncoder,
    Fitted,
    Loaded,
    TooLong,
    default_seq_len,
    fit_examples,
    load_examples,
)
from llmctl.core.errors import NotFoundError, PartialFailure, UsageError
from llmctl.core.files import atomic_write
from llmctl.core.model.lora import add_adapters
from llmctl.core.runlog import RunFolder
from llmctl.core.tokenizer import Tokenizer
from llmctl.core.train import state as checkpoints
from llmctl.core.train.base import Adapters, Base, grown, open_base
from llmctl.core.train.cards import checkpoint_card
from llmctl.core.train.evaluation import HeldOut
from llmctl.core.train.events import Event, RowsRead, RowsReading, Warned
from llmctl.core.train.job import Stop, TrainJob
from llmctl.core.train.objectives import AdapterNextToken, NextToken, Objective
from llmctl.core.train.outputs import AdapterOnly, Output, WholeModel
from llmctl.core.train.plan import (
    Machine,
    Prepared,
    Sizes,
    is_hidden_matrix,
    loop_of,
    micro_batch_size,
    optim_of,
    schedule_of,
    settings_of,
    train_subject,
)
from llmctl.core.train.resuming import resume_command

SKIPPED_NAME = "skipped_rows.jsonl"
"""In the run folder: the rows that --on-error skip left out."""

LORA_SHAPING = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")
SHAPING = ("method", "mask_prompt", "chat", "too_long", "drop_empty", "val_fraction", "resize_vocab", "on_error")
"""Settings that shape a run of this kind, beside those of any run; adapters have some more."""

_ROWS_PER_STEP = 16
_MICRO_BATCH_TOKENS = 2048
_WARMUP_SHARE = 0.03


def train(config: FinetuneConfig, *, stop: Stop = lambda: None, save_requested: Callable[[], bool] = lambda: False) -> Iterator[Event]:
    """Fine-tune as `config` says, or go on with a run; yields events and ends with Finished (or Planned, for a dry run).

    Raises PartialFailure at the end when rows were skipped, and LlmctlError of many kinds, each before anything is lost.
    """
    config = config.with_defaults()
    subject = _Finetune(config)
    yield from train_subject(config, subject, stop=stop, save_requested=save_requested)
    if subject.bad_rows:
        listed = f"; they are listed in {config.out_dir / SKIPPED_NAME}" if config.out_dir is not None and not config.dry_run else ""
        raise PartialFailure(f"{len(subject.bad_rows):,} bad rows were skipped, the first: {subject.bad_rows[0]}{listed}")


class _Finetune:
    """The Subject of fine-tuning; see plan.Subject."""

    def __init__(self, config: FinetuneConfig) -> None:
        self._config = config
        self.bad_rows: list[BadRow] = []
        self._prepared: Prepared | None = None

    @property
    def prepared(self) -> Prepared:
        """What `open` found."""
        assert self._prepared is not None
        return self._prepared

    def open(self, stop: Stop) -> Iterator[Event]:
        """Open the model, read and check every row. Nothing is written."""
        config = self._config
        if config.model is None:
            raise UsageError("--model is missing: the model to start from")
        if not config.data:
            raise UsageError("--data is missing: a JSONL file of rows in chat or instruction form")
        for path in (*config.data, *config.val_data):
            if not path.exists():
                raise NotFoundError(f"{path}: no such file")
        self._base = base = open_base(config)
        self._adapters = Adapters.of(config, base) if config.method == "lora" else None
        most = base.architecture.max_positions
        if config.seq_len is not None and config.seq_len > most:
            raise UsageError(f"--seq-len {config.seq_len}: the model sees {most} tokens; give at most that")
        templated = base.has_template if config.chat is None else config.chat
        encoder = ExampleEncoder(plain=base.plain, chat=base.chat, templated=templated, mask_prompt=config.mask_prompt)
        skip_bad = config.on_error == "skip"
        train = yield from _telling(
            load_examples(config.data, encoder, skip_bad=skip_bad, held_out_fraction=config.val_fraction, stop=stop)
        )
        self.bad_rows += train.bad_rows
        held_out, held_out_counts = train.held_out, (len(train.held_out.rows), 0)
        if config.val_data:
            val = yield from _telling(load_examples(config.val_data, encoder, skip_bad=skip_bad, stop=stop))
            self.bad_rows += val.bad_rows
            held_out, held_out_counts = val.train, (val.num_rows, len(val.bad_rows))
        if not len(train.train.rows) or (config.val_fraction and not len(held_out.rows)):
            side = "training" if not len(train.train.rows) else "validation"
            raise UsageError(
                f"--val-fraction {config.val_fraction} leaves no row for {side} out of {len(train.held_out.rows) + len(train.train.rows)}"
            )
        self._digest = train.digest
        used_template = templated or train.uses_conversations
        self._saved_tokenizer = base.chat if base.has_template or used_template else base.plain
        yield from self._remarks(base, train, used_template=used_template)
        seq_len = config.seq_len or default_seq_len(train.train, max_positions=most)
        self._source, fitted = yield from self._pack(train.train, "train", seq_len, train.num_rows, len(train.bad_rows))
        self._held_out: PackedSource | None = None
        if len(held_out.rows):
            self._held_out, _ = yield from self._pack(held_out, "val", seq_len, *held_out_counts)
        self._prepared = self._prepare(fitted, seq_len)

    def _remarks(self, base: Base, loaded: Loaded, *, used_template: bool) -> Iterator[Event]:
        if used_template and not base.has_template:
            kind = "ChatML" if "<|im_start|>" in (base.chat.chat_template or "") else "plain-text"
            yield Warned(
                message=f"the model has no chat template, so conversations go through the default {kind} one,"
                " which is saved with the result; --chat-template FILE gives another"
            )
        ids, learn = loaded.train.rows.row(0)
        last = int(ids[learn.nonzero()[0][-1]]) if learn.any() else None
        if last is not None and last not in base.chat.special_ids and self._config.mask_prompt:
            yield Warned(message="the chat template puts no special token after an answer, so the model will not learn where to stop")

    def _pack(
        self, examples: EncodedExamples, split: str, seq_len: int, num_rows: int, num_bad: int
    ) -> Generator[Event, None, tuple[PackedSource, Fitted]]:
        """Fit examples to the length and pack them; tells what became of them."""
        config = self._config
        fitted = fit_examples(examples, seq_len=seq_len, too_long=cast(TooLong, config.too_long), drop_empty=config.drop_empty)
        source = PackedSource(
            fitted.rows,
            seq_len=seq_len,
            seed=config.seed,
            data_hash=self._digest,
            pad_id=next((i for i in (self._base.plain.pad_id, self._base.plain.eos_id) if i is not None), 0),
            shuffle=split == "train",
        )
        if fitted.num_too_long:
            fate = "were cut" if fitted.num_cut else "were left out"
            yield Warned(
                message=f"{fitted.num_too_long:,} {split} rows are longer than --seq-len {seq_len}"
                f" and {fate} (--too-long {config.too_long})"
            )
        if fitted.num_empty:
            yield Warned(message=f"{fitted.num_empty:,} {split} rows had no answer token within --seq-len {seq_len} and were left out")
        yield RowsRead(
            split=split,
            num_rows=num_rows,
            num_skipped=num_bad,
            num_examples=fitted.num_examples,
            num_cut=fitted.num_cut,
            num_dropped=fitted.num_too_long - fitted.num_cut + fitted.num_empty,
            num_tokens=fitted.num_tokens,
            num_learned=fitted.num_learned,
            num_sequences=source.samples_per_epoch,
            seq_len=seq_len,
        )
        return source, fitted

    def _prepare(self, fitted: Fitted, seq_len: int) -> Prepared:
        config, source = self._config, self._source
        assert config.learning_rate is not None
        rows_per_sequence = fitted.num_examples / source.samples_per_epoch
        batch_size = config.batch_size or max(1, round(_ROWS_PER_STEP / rows_per_sequence))
        batch_size = min(batch_size, source.samples_per_epoch)
        micro = micro_batch_size(config.micro_batch_size, batch_size=batch_size, seq_len=seq_len, most_tokens=_MICRO_BATCH_TOKENS)
        return Prepared(
            sizes=Sizes(seq_len=seq_len, batch_size=batch_size, micro_batch_size=micro),
            samples_per_epoch=source.samples_per_epoch,
            data_tokens=fitted.num_tokens,
            architecture=self._base.architecture,
            family=self._base.loaded.family,
            learning_rate=config.learning_rate,
            default_epochs=DEFAULT_EPOCHS,
            default_warmup=lambda num_steps: round(_WARMUP_SHARE * num_steps),
            num_adapted=None if self._adapters is None else self._adapters.num_parameters,
        )

    def make_job(self, run: RunFolder, where: Machine, checkpoint: checkpoints.Checkpoint | None) -> TrainJob:
        """See plan.Subject."""
        config, base, prepared = self._config, self._base, self.prepared
        architecture, tokenizer, family = base.architecture, self._saved_tokenizer, base.loaded.family
        generation = {**base.loaded.generation, "eos_token_id": list(_end_ids(tokenizer, base.loaded.eos_ids))}
        if self.bad_rows and run.writes:
            _list_skipped(run.path / SKIPPED_NAME, self.bad_rows)
        torch.manual_seed(config.seed)
        shaping = SHAPING if self._adapters is None else (*SHAPING, *LORA_SHAPING)
        settings = settings_of(config, prepared.sizes, where) | {name: _plain(getattr(config, name)) for name in shaping}
        card = checkpoint_card(
            run_dir=run.path,
            verb="finetune",
            family=family,
            architecture=architecture,
            tokenizer=tokenizer,
            data={", ".join(path.name for path in config.data): self._source.data_hash},
            settings=settings,
            base=base.loaded.path,
            adapter=None if self._adapters is None else self._adapters.described,
        )
        output: Output
        objective: Objective = NextToken()
        if self._adapters is None:
            model = grown(base.loaded.model.float(), architecture)
            model = model if where.mesh.shards else model.to(where.device)
            output = WholeModel(config=architecture, family=family, tokenizer=tokenizer, generation=generation, card=card)
        else:
            model = base.loaded.model.to(None if where.mesh.shards else where.device, where.dtype)
            dropout = add_adapters(model, self._adapters.groups, self._adapters.lora, seed=config.seed)
            if config.lora_dropout:
                objective = AdapterNextToken(dropout=dropout, rate=config.lora_dropout, seed=config.seed)
            output = AdapterOnly(
                config=architecture,
                family=family,
                lora=self._adapters.lora,
                targets=config.target_names,
                base=base.reference,
                fingerprint=base.fingerprint,
                tokenizer=tokenizer,
                generation=generation,
                card=card,
            )
        model.train()
        template = tokenizer.chat_template or ""
        return TrainJob(
            run=run,
            model=model,
            source=self._source,
            objective=objective,
            optim=optim_of(config),
            schedule=schedule_of(config),
            loop=loop_of(config, prepared.sizes),
            compute_dtype=where.dtype,
            device=where.device,
            output=output,
            settings=settings,
            identity={
                "data": self._digest,
                "tokenizer": tokenizer.fingerprint,
                "chat_template": hashlib.sha256(template.encode()).hexdigest(),
                "model": json.loads(json.dumps(dataclasses.asdict(architecture))),
                "base_model": base.fingerprint,
            },
            resume_command=resume_command("finetune", config),
            hidden_matrices=tuple(n for n, p in model.named_parameters() if p.requires_grad and is_hidden_matrix(n, p.ndim)),
            held_out=self._evaluation(),
            resume=checkpoint,
            allow_change=config.allow_change,
            flops_per_token=prepared.flops_per_token,
            matmul_peak=where.matmul_peak,
            threads=where.threads,
        )

    def _evaluation(self) -> HeldOut | None:
        if self._held_out is None:
            return None
        token_bytes = torch.from_numpy(self._base.plain.token_bytes()).long()
        return HeldOut(self._held_out, self.prepared.sizes.micro_batch_size, token_bytes)


def _telling(loading: Generator[int, None, Loaded]) -> Generator[Event, None, Loaded]:
    """Turns the counts that loading yields into events."""
    while True:
        try:
            yield RowsReading(num_rows=next(loading))
        except StopIteration as done:
            return cast(Loaded, done.value)


def _end_ids(tokenizer: Tokenizer, eos_ids: tuple[int, ...]) -> tuple[int, ...]:
    """The ids that end a text of the result: what ends an answer, then what ended one before."""
    first = sorted(tokenizer.end_of_turn_ids) if tokenizer.chat_template is not None else []
    own = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    return tuple(dict.fromkeys([*first, *(eos_ids or own)]))


def _plain(setting: Any) -> Any:
    """A setting as JSON gives it back."""
    return list(setting) if isinstance(setting, tuple) else setting


def _list_skipped(path: Path, bad_rows: list[BadRow]) -> None:
    with atomic_write(path) as file:
        for bad in bad_rows:
            line = {"file": str(bad.file), "row": bad.number, "rule": bad.rule}
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
