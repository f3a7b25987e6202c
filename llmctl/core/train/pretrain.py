"""Pre-training: from PretrainConfig to a plan and a job for the loop. Knows packed data and models; knows no command line."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from llmctl.core.checkpoint import check_tokenizer, check_trainable, load_config, load_model, resolve_model
from llmctl.core.config.mixture import parse_mixture
from llmctl.core.config.model import ModelConfig
from llmctl.core.config.pretrain import PretrainConfig
from llmctl.core.data.loader import EvalSource, PretrainSource, SampleSource
from llmctl.core.data.mixture import InterleavedSource, MixtureSource, whole_parts
from llmctl.core.data.shards import TokenDataset
from llmctl.core.errors import InputError, NotFoundError, UsageError
from llmctl.core.files import check_manifest
from llmctl.core.model import Decoder
from llmctl.core.model.decoder import drawn_weights
from llmctl.core.model.facts import flops_per_token
from llmctl.core.model.shapes import learning_rate_for_width, shape_for_depth
from llmctl.core.runlog import RunFolder
from llmctl.core.tokenizer import Tokenizer
from llmctl.core.train import state as checkpoints
from llmctl.core.train.cards import checkpoint_card
from llmctl.core.train.evaluation import HeldOut
from llmctl.core.train.events import Event, Warned
from llmctl.core.train.job import Stop, TrainJob
from llmctl.core.train.objectives import NextToken, Penalty
from llmctl.core.train.outputs import WholeModel
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
from llmctl.core.train.sampling import sampler
from llmctl.core.train.vectors import Vectors

SHAPING = ("label_smoothing", "z_loss", "dropout", "ema", "on_spike")
"""Settings that shape a run of this kind, beside those of any run."""

_SPLITS: tuple[Literal["val"], Literal["train"]] = ("val", "train")
_MICRO_BATCH_TOKENS = 8192
_MANY_DOCUMENTS = 100
_HASHED_BYTES = 4 << 30
"""Data up to this size is checked against its hashes at each start; beyond, `llmctl tokenize verify` does it."""


def train(config: PretrainConfig, *, stop: Stop = lambda: None, save_requested: Callable[[], bool] = lambda: False) -> Iterator[Event]:
    """Pre-train as `config` says, or go on with a run; yields events and ends with Finished (or Planned, for a dry run).

    Raises LlmctlError of many kinds, each before anything is lost; see the loop's Trainer.events.
    """
    yield from train_subject(config, _Pretrain(config), stop=stop, save_requested=save_requested)


@dataclass(frozen=True)
class _Opened:
    """Data and architecture, opened and checked, without weights."""

    datasets: tuple[TokenDataset, ...]
    source: PretrainSource | MixtureSource
    tokenizer: Tokenizer
    architecture: ModelConfig
    family: str
    base: Path | None
    generation: dict[str, Any]
    held_out: tuple[TokenDataset, ...]
    vectors: Vectors | None


class _Pretrain:
    """The Subject of pre-training; see plan.Subject."""

    def __init__(self, config: PretrainConfig) -> None:
        self._config = config
        self._opened: _Opened | None = None

    def open(self, stop: Stop) -> Iterator[Event]:
        """Open and check data, tokenizer and architecture. Nothing is written."""
        if not self._config.data:
            raise UsageError("--data is missing: the folder of token shards made by `llmctl tokenize pack`")
        self._opened = _open(self._config)
        if self._config.learning_rate is None:
            rate = learning_rate_for_width(self._opened.architecture.hidden_size)
            self._config = dataclasses.replace(self._config, learning_rate=rate)
        vectors = self._opened.vectors
        if vectors is not None and len(vectors.ids) < vectors.num_tokens:
            share = f"{len(vectors.ids):,} of {vectors.num_tokens:,}"
            yield Warned(message=f"--init-embeddings: {share} tokens have a vector there; the others start at random")

    @property
    def prepared(self) -> Prepared:
        """What `open` found."""
        config, opened = self._config, self._opened
        assert opened is not None
        assert config.learning_rate is not None
        micro = micro_batch_size(
            config.micro_batch_size, batch_size=config.batch_size, seq_len=config.seq_len, most_tokens=_MICRO_BATCH_TOKENS
        )
        return Prepared(
            sizes=Sizes(seq_len=config.seq_len, batch_size=config.batch_size, micro_batch_size=micro),
            samples_per_epoch=opened.source.samples_per_epoch,
            data_tokens=sum(dataset.num_tokens for dataset in opened.datasets),
            architecture=opened.architecture,
            family=opened.family,
            learning_rate=config.learning_rate,
            default_epochs=1.0,
            default_warmup=lambda num_steps: min(200, num_steps // 50),
            uses=opened.source.uses if isinstance(opened.source, MixtureSource) else lambda num_samples: (),
        )

    def make_job(self, run: RunFolder, where: Machine, checkpoint: checkpoints.Checkpoint | None) -> TrainJob:
        """See plan.Subject."""
        config, opened, sizes = self._config, self._opened, self.prepared.sizes
        assert opened is not None
        architecture = opened.architecture
        torch.manual_seed(config.seed)
        settings = settings_of(config, sizes, where) | {name: getattr(config, name) for name in SHAPING}
        card = checkpoint_card(
            run_dir=run.path,
            verb="pretrain",
            family=opened.family,
            architecture=architecture,
            tokenizer=opened.tokenizer,
            data=_data_of_card(opened),
            settings=settings,
            base=opened.base,
        )

        output = WholeModel(config=architecture, family=opened.family, tokenizer=opened.tokenizer, generation=opened.generation, card=card)
        weights: Callable[[], Iterator[tuple[str, Tensor]]] | None = None
        if where.mesh.shards and opened.base is None:
            with torch.device("meta"):
                model = Decoder(architecture)
            weights = partial(_drawn, config, opened)
        else:
            model = _weights(config, opened, checkpoint)
            model = model if where.mesh.shards else model.to(where.device)
        model.train()
        model.recomputes = config.gradient_checkpointing
        return TrainJob(
            run=run,
            model=model,
            weights=weights,
            source=opened.source,
            objective=NextToken(
                penalty=Penalty(label_smoothing=config.label_smoothing, z_loss=config.z_loss), dropout=config.dropout, seed=config.seed
            ),
            optim=dataclasses.replace(optim_of(config), ema=config.ema or None),
            schedule=schedule_of(config),
            loop=dataclasses.replace(
                loop_of(config, sizes),
                on_spike=cast(Literal["ignore", "rewind"], config.on_spike),
                profile=config.profile,
                async_save=config.async_save,
            ),
            compile=cast(Literal["auto", "on", "off"], config.compile),
            compute_dtype=where.dtype,
            device=where.device,
            output=output,
            settings=settings,
            identity={
                "data": opened.source.data_hash,
                "tokenizer": opened.tokenizer.fingerprint,
                "model": json.loads(json.dumps(dataclasses.asdict(architecture))),
                "base_model": os.path.abspath(opened.base) if opened.base is not None else None,
                "init_embeddings": os.path.abspath(config.init_embeddings) if config.init_embeddings is not None else None,
            },
            resume_command=resume_command("pretrain", config),
            hidden_matrices=tuple(n for n, p in model.named_parameters() if is_hidden_matrix(n, p.ndim)),
            held_out=_held_out(config, opened, sizes),
            sample=sampler(
                opened.tokenizer,
                prompt=config.sample_prompt,
                max_new_tokens=config.sample_tokens,
                seed=config.seed,
                documents=sum(dataset.num_documents for dataset in opened.datasets) >= _MANY_DOCUMENTS,
            ),
            resume=checkpoint,
            allow_change=config.allow_change,
            flops_per_token=flops_per_token(architecture, config.seq_len),
            matmul_peak=where.matmul_peak,
            threads=where.threads,
        )


def _open(config: PretrainConfig) -> _Opened:
    datasets, source = _open_sources(config)
    dataset, where = datasets[0], " ".join(map(str, config.data))
    tokenizer = dataset.tokenizer()
    if source.samples_per_epoch < config.batch_size:
        num_tokens = sum(dataset.num_tokens for dataset in datasets)
        raise InputError(
            f"{where}: {num_tokens:,} tokens make {source.samples_per_epoch} sequences of {config.seq_len},"
            f" fewer than --batch-size {config.batch_size}; give more data, or a smaller --seq-len or --batch-size"
        )
    base: Path | None = None
    generation: dict[str, Any] = {}
    if config.model is not None:
        base = resolve_model(config.model)
        if base.suffix == ".gguf":
            raise UsageError(f"--model {config.model}: go on from a model directory; a GGUF file has lost precision")
        check_trainable(base)
        architecture, record, _ = load_config(base)
        family = record.name
    elif config.model_config is not None:
        architecture, record, _ = load_config(config.model_config)
        family = record.name
    else:
        family = config.family
        architecture = shape_for_depth(config.depth or 4, tokenizer.vocab_size, config.seq_len, family)
    check_tokenizer(tokenizer, architecture, where=where)
    if config.seq_len > architecture.max_positions and architecture.positions == "learned":
        raise UsageError(f"--seq-len {config.seq_len}: the model has {architecture.max_positions} positions")
    held_out = _open_held_out(config, datasets)
    vectors = None
    if config.init_embeddings is not None and not config.resume and config.resume_from is None:  # a resumed run has its own by now
        vectors = Vectors(config.init_embeddings, tokenizer, architecture)
    return _Opened(datasets, source, tokenizer, architecture, family, base, generation, held_out, vectors)


def _open_sources(config: PretrainConfig) -> tuple[tuple[TokenDataset, ...], PretrainSource | MixtureSource]:
    """The corpora of --data, and the samples that they make together."""
    parts = parse_mixture(config.data)
    datasets = tuple(TokenDataset.open(part.path, split="train") for part in parts)
    for dataset in datasets:
        if dataset.tokenizer_fingerprint != datasets[0].tokenizer_fingerprint:
            raise InputError(f"--data {dataset.directory}: was made with another tokenizer than {datasets[0].directory}; pack it again")
        _check_hashes(dataset)
    sources = [PretrainSource(dataset, config.seq_len, config.seed) for dataset in datasets]
    if len(sources) == 1:
        return datasets, sources[0]
    weights = [part.weight or dataset.num_tokens for part, dataset in zip(parts, datasets, strict=True)]
    return datasets, MixtureSource(sources, whole_parts(weights), config.seed)


def _data_of_card(opened: _Opened) -> dict[str, str]:
    """Name -> hash of what is trained on, with its part where there are several."""
    if not isinstance(opened.source, MixtureSource):
        return {opened.datasets[0].directory.name: opened.source.data_hash}
    uses = opened.source.uses(0)
    return {f"{use.name} ({use.share:.2%})": dataset.data_hash for use, dataset in zip(uses, opened.datasets, strict=True)}


def _check_hashes(dataset: TokenDataset) -> None:
    """Compare the folder's files with its manifest, where that takes seconds; sizes are checked in any case."""
    if sum(path.stat().st_size for path in dataset.directory.iterdir()) <= _HASHED_BYTES:
        check_manifest(dataset.directory, hashes=True)


def _open_held_out(config: PretrainConfig, datasets: tuple[TokenDataset, ...]) -> tuple[TokenDataset, ...]:
    """--val-data, or the validation splits of --data, as far as there are any."""
    if config.val_data is not None:
        for split in _SPLITS:
            try:
                held_out = TokenDataset.open(config.val_data, split=split)
                break
            except NotFoundError:
                if split == "train":
                    raise
        if held_out.tokenizer_fingerprint != datasets[0].tokenizer_fingerprint:
            raise InputError(f"--val-data {config.val_data}: was made with another tokenizer than --data")
        return (held_out,)
    found = []
    for dataset in datasets:
        with contextlib.suppress(NotFoundError):
            found.append(TokenDataset.open(dataset.directory, split="val"))
    return tuple(found)


def _weights(config: PretrainConfig, opened: _Opened, checkpoint: checkpoints.Checkpoint | None) -> Decoder:
    """The decoder in float32: at random from the seed, or from --model. A resumed run's weights come later, from its masters."""
    if opened.base is not None and checkpoint is None:
        return load_model(opened.base, dtype=torch.float32).model
    model = Decoder(opened.architecture)
    # Drawn on the CPU whatever the device, so that a seed means the same weights everywhere.
    model.init_weights(torch.Generator().manual_seed(config.seed))
    if opened.vectors is not None:
        opened.vectors.put_into(model)
    return model


def _drawn(config: PretrainConfig, opened: _Opened) -> Iterator[tuple[str, Tensor]]:
    """What `_weights` makes at random, a tensor at a time."""
    for name, tensor in drawn_weights(opened.architecture, torch.Generator().manual_seed(config.seed)):
        if name == "embed.weight" and opened.vectors is not None:
            tensor[opened.vectors.ids] = opened.vectors.numbers.to(tensor)
        yield name, tensor


def _held_out(config: PretrainConfig, opened: _Opened, sizes: Sizes) -> HeldOut | None:
    if not opened.held_out:
        return None
    token_bytes = torch.from_numpy(opened.tokenizer.token_bytes()).long()
    sources = [EvalSource(dataset, config.seq_len) for dataset in opened.held_out]
    source: SampleSource = sources[0] if len(sources) == 1 else InterleavedSource(sources)
    return HeldOut(source, sizes.micro_batch_size, token_bytes)
