"""One export from its config to a verified result under its name. Knows formats; draws nothing.

The result is made under a temporary name, read back, and only then renamed: what stands there is whole and was verified.
"""

import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from llmctl import __version__
from llmctl.core.card import CardFacts, Told, model_card, told_by
from llmctl.core.checkpoint import (
    LoadedModel,
    check_tokenizer,
    load_model,
    load_tokenizer,
    resolve_adapted,
    save_model,
    save_quantised,
    stated_license,
)
from llmctl.core.checkpoint.load import assemble
from llmctl.core.checkpoint.quantweight import QuantWeight
from llmctl.core.checkpoint.save import write_around
from llmctl.core.config.export import ExportConfig, shard_bytes
from llmctl.core.data.wordvectors import read_vectors, vector_names, write_vectors
from llmctl.core.errors import InputError, LlmctlError, NotFoundError, UsageError
from llmctl.core.export import gguf, onnx
from llmctl.core.export.events import Event, Opened, Verified, Warned, Written
from llmctl.core.export.gguf_tokenizer import tokenizer_metadata
from llmctl.core.export.verify import Compared, compare, logits_of, probe, read_by_transformers, read_by_us
from llmctl.core.families import family_named
from llmctl.core.families.gguf import family_record
from llmctl.core.files import CARD_NAME, atomic_dir, atomic_path, check_out_dir, check_out_file, read_json, write_text
from llmctl.core.gguf import GgufFile
from llmctl.core.model.facts import num_parameters
from llmctl.core.quant import Layout
from llmctl.core.tokenizer import Tokenizer

_MAX_CARD_BYTES = 4 << 20
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(config: ExportConfig) -> Iterator[Event]:
    """Export as `config` says; the last event is Written. Raises LlmctlError of every kind that DESIGN's table names."""
    if config.model is None and config.adapter is None:
        raise UsageError("MODEL is missing: the folder, .gguf file, hub id or built-in name of the model to export")
    if config.output is None:
        raise UsageError("--output is missing: where to put the result")
    _check_output(config)
    if config.format == "gguf":
        gguf.need_package()
    if config.format == "onnx":
        onnx.need_packages()
    path, adapter = resolve_adapted(config.model, config.adapter)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        tokenizer = load_tokenizer(path, adapter=adapter)
    except NotFoundError as error:
        if config.format in ("gguf", "word2vec"):
            raise
        tokenizer = None
        yield Warned(message=f"{error}; the result has none either")
    layout = cast(Layout, config.quant or "int8") if config.format == "quant" else None
    loaded = load_model(path, quant=layout)
    stored = loaded.dtype
    if adapter is not None:  # merged in float32, so that what rounding costs is seen, and spared where float32 is asked for
        loaded = load_model(path, quant=layout, adapter=adapter, dtype=torch.float32)
    if tokenizer is not None:
        check_tokenizer(tokenizer, loaded.config, where=path)
    yield Opened(path=str(path), family=loaded.family, num_parameters=num_parameters(loaded.config).total, num_format=loaded.number_format)
    job = _Job(config, config.output, loaded, tokenizer, stored)
    yield from {"hf": job.hf, "gguf": job.gguf, "quant": job.quant, "word2vec": job.word2vec, "onnx": job.onnx}[config.format]()


def _check_output(config: ExportConfig) -> None:
    assert config.output is not None
    if config.format in ("gguf", "word2vec"):
        check_out_file(config.output)
        if config.output.exists() and not config.overwrite:
            raise UsageError(f"--output {config.output}: exists; choose another name, or replace it by --overwrite")
        return
    check_out_dir(config.output, flag="--output")
    if config.output.is_symlink() or (config.output.exists() and any(config.output.iterdir())):
        raise UsageError(f"--output {config.output}: is there already and holds something; choose another folder, or remove it")


class _Job:
    """One export under way."""

    def __init__(self, config: ExportConfig, output: Path, loaded: LoadedModel, tokenizer: Tokenizer | None, stored: torch.dtype) -> None:
        self._stored = stored
        self._config, self._output, self._loaded, self._tokenizer = config, output, loaded, tokenizer
        self._tokens = probe(loaded.config.vocab_size, loaded.config.max_positions)

    def hf(self) -> Iterator[Event]:
        """A Hugging Face directory."""
        loaded, name = self._loaded, self._config.float_dtype
        dtype = self._stored if name is None else _DTYPES[name]
        tensors = {key: _numbers(tensor) for key, tensor in loaded.model.state_dict().items()}
        _check_range(tensors, dtype)
        shown = str(dtype).removeprefix("torch.")
        with atomic_dir(self._output) as temp:
            save_model(
                temp,
                config=loaded.config,
                family=loaded.family,
                tensors=tensors,
                dtype=dtype,
                tokenizer=self._tokenizer,
                generation=self._generation(),
                max_shard_bytes=shard_bytes(self._config.max_shard_size),
            )
            write_text(temp / "README.md", model_card(self._card(shown)))
            if self._config.verify:
                found = read_by_transformers(temp, self._tokens, self._tokenizer)
                yield self._verified("transformers", found, lambda _, tensor: tensor.to(dtype))
        yield self._written(shown)

    def quant(self) -> Iterator[Event]:
        """A directory with quantised weights."""
        loaded, layout = self._loaded, self._loaded.quant
        assert layout is not None
        shown = f"{layout} in groups of 32"
        with atomic_dir(self._output) as temp:
            save_quantised(
                temp,
                config=loaded.config,
                family=loaded.family,
                tensors=loaded.model.state_dict(),
                layout=layout,
                tokenizer=self._tokenizer,
                generation=self._generation(),
                max_shard_bytes=shard_bytes(self._config.max_shard_size),
            )
            write_text(temp / "README.md", model_card(self._card(shown)))
            if self._config.verify:
                found = read_by_us(temp, self._tokens, self._tokenizer)
                intended = logits_of(loaded.model, self._tokens)
                source = logits_of(load_model(loaded.path, dtype=torch.float32, adapter=loaded.adapter).model, self._tokens)
                yield self._told("llmctl", compare(found, intended, source, reader="llmctl"))
        yield self._written(shown)

    def gguf(self) -> Iterator[Event]:
        """A GGUF file."""
        loaded, config, tokenizer = self._loaded, self._loaded.config, self._tokenizer
        assert tokenizer is not None
        stored = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
        kind = self._config.gguf_type or stored[self._stored]
        record = family_record(loaded.family)
        gguf.metadata(config, record)  # refused before the tokenizer is tried
        held = record.as_held(config)
        if held.max_positions < config.max_positions:
            yield Warned(
                message=f"GGUF's {record.architecture} has no sliding window: the context of {config.max_positions:,} tokens"
                f" becomes {held.max_positions:,}, within which the model is the same"
            )
        self._tokens = probe(held.vocab_size, held.max_positions)
        words = tokenizer_metadata(tokenizer, architecture=record.architecture, vocab_size=config.vocab_size, eos_ids=loaded.eos_ids)
        state = loaded.model.state_dict()
        arrays = {name: _numbers(tensor).float().numpy() for name, tensor in state.items()}
        narrow = sorted(n for n, a in arrays.items() if kind.startswith("Q") and gguf.kind_of(n, a.shape, kind) == "F16")
        if narrow:
            yield Warned(
                message=f"{len(narrow)} matrices have rows that are no multiple of 32 and are written as F16, {narrow[0]} the first"
            )
        card = self._card(kind)
        general = {"general.name": card.name, "general.license": card.license, "general.description": f"Written by llmctl {__version__}"}
        extra = {**{key: value for key, value in general.items() if value}, **words, "llmctl.card": model_card(card)}
        with atomic_path(self._output) as temp:
            gguf.write(temp, config=config, record=record, tensors=arrays, kind=kind, extra=extra)
            if self._config.verify:
                found = read_by_us(temp, self._tokens, tokenizer)
                yield self._verified("llmctl", found, lambda name, tensor: _as_gguf(name, tensor, kind))
        yield self._written(kind)

    def onnx(self) -> Iterator[Event]:
        """A folder with an ONNX graph."""
        loaded = self._loaded
        onnx.check_expressible(loaded.config, family=loaded.family)
        with atomic_dir(self._output) as temp:
            write_around(
                temp,
                family=family_named(loaded.family),
                config=loaded.config,
                dtype=torch.float32,
                tokenizer=self._tokenizer,
                generation=self._generation(),
            )
            onnx.write(temp, loaded.model)
            write_text(temp / "README.md", model_card(self._card("float32")))
            if self._config.verify:
                found = onnx.logits_by_runtime(temp, self._tokens, loaded.config)
                yield self._verified("onnxruntime", found, lambda _, tensor: tensor)
        yield self._written("float32")

    def word2vec(self) -> Iterator[Event]:
        """The token embeddings in word2vec's format."""
        assert self._tokenizer is not None
        names = {i: name for i, name in vector_names(self._tokenizer).items() if i < self._loaded.config.vocab_size}
        table = _numbers(self._loaded.model.state_dict()["embed.weight"]).float().numpy()
        with atomic_path(self._output) as temp:
            with open(temp, "wb") as file:
                write_vectors(file, names, table, binary=self._config.binary)
            if self._config.verify:
                largest, count = 0.0, 0
                for (i, name), (found, numbers) in zip(names.items(), read_vectors(temp), strict=True):
                    if name != found or not np.array_equal(numbers, table[i]):
                        raise LlmctlError(f"verification failed: the vector of {name!r} did not come back as it was; nothing was kept")
                    largest, count = max(largest, float(np.abs(numbers - table[i]).max())), count + 1
                yield self._told("llmctl", Compared(largest, 0.0, 1.0), num_tokens=count)
        yield self._written("binary float32" if self._config.binary else "text")

    def _generation(self) -> dict[str, Any]:
        """generation_config.json, with the ids that end a text where they come from elsewhere (a GGUF file)."""
        ids = list(self._loaded.eos_ids)
        known = {"eos_token_id": ids[0] if len(ids) == 1 else ids} if ids else {}
        return {**known, **self._loaded.generation}

    def _verified(self, reader: str, found: Tensor, rounded: Callable[[str, Tensor], Tensor]) -> Verified:
        """`rounded` does to a tensor of ours what the format does to its numbers."""
        state = {name: _numbers(tensor) for name, tensor in self._loaded.model.state_dict().items()}
        source = logits_of(assemble(self._loaded.config, {n: t.float() for n, t in state.items()}, device="cpu"), self._tokens)
        kept = {name: rounded(name, tensor).float() for name, tensor in state.items()}
        intended = logits_of(assemble(self._loaded.config, kept, device="cpu"), self._tokens)
        return self._told(reader, compare(found, intended, source, reader=reader))

    def _told(self, reader: str, compared: Compared, *, num_tokens: int | None = None) -> Verified:
        return Verified(
            reader=reader,
            num_tokens=self._tokens.shape[1] if num_tokens is None else num_tokens,
            largest_difference=compared.largest,
            rounding_difference=compared.rounding,
            same_argmax=compared.same_argmax,
            tokenizer_checked=self._tokenizer is not None,
        )

    def _written(self, num_format: str) -> Written:
        output = self._output
        files = [p for p in output.rglob("*") if p.is_file()] if output.is_dir() else [output]
        size = sum(p.stat().st_size for p in files)
        return Written(path=str(output), format=self._config.format, num_format=num_format, num_files=len(files), num_bytes=size)

    def _card(self, num_format: str) -> CardFacts:
        loaded, config = self._loaded, self._loaded.config
        source = loaded.adapter or loaded.path
        trained, told = _training_state(source), _told_by_card(source)
        identity: dict[str, Any] = trained.get("identity") or {}
        settings: dict[str, Any] = trained.get("settings") or {}
        is_own_checkpoint = bool(trained)
        parent = told.parent if is_own_checkpoint else _public_name(self._config.adapter or self._config.model, source)
        measured = "" if num_format == "float32" else ", of the weights before rounding"
        recipe = settings | {key: trained[key] for key in ("step", "tokens_seen") if key in trained}
        return CardFacts(
            name=self._output.stem if self._output.suffix == ".gguf" else self._output.resolve().name,
            family=loaded.family,
            num_parameters=num_parameters(config).total,
            num_format=num_format,
            architecture={"layers": config.num_layers, "hidden_size": config.hidden_size, "vocabulary": config.vocab_size},
            tokenizer_fingerprint=None if self._tokenizer is None else self._tokenizer.fingerprint,
            parent=parent,
            license=stated_license(source) or stated_license(loaded.path),
            data=told.data or ({"training data": identity["data"]} if isinstance(identity.get("data"), str) else {}),
            scores={name + measured: value for name, value in told.scores.items()},
            recipe={name: value for name, value in recipe.items() if value is not None},
            versions={"llmctl": __version__, "torch": torch.__version__, "python": platform.python_version()},
            made_by=f"Exported by `llmctl export --format {self._config.format}`.",
        )


def _numbers(tensor: Tensor) -> Tensor:
    """An ordinary tensor of the same numbers."""
    return tensor.numbers() if isinstance(tensor, QuantWeight) else tensor.detach()


def _as_gguf(name: str, tensor: Tensor, kind: str) -> Tensor:
    chosen = gguf.kind_of(name, tuple(tensor.shape), kind)
    return torch.from_numpy(gguf.decode(gguf.encode(tensor.float().numpy(), chosen), chosen).copy())


def _check_range(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    if dtype != torch.float16:
        return
    for name, tensor in tensors.items():
        if float(tensor.abs().max()) > torch.finfo(torch.float16).max:
            raise InputError(f"tensor {name!r} holds numbers beyond 65504, which float16 cannot; choose --dtype bf16 or f32")


def _told_by_card(path: Path) -> Told:
    """What the card of the model in `path` says, of those cards that llmctl writes."""
    try:
        if path.suffix == ".gguf":
            card = GgufFile(path).metadata.get("llmctl.card")
            return told_by(card if isinstance(card, str) else "")
        card_file = path / CARD_NAME
        is_small = card_file.is_file() and card_file.stat().st_size <= _MAX_CARD_BYTES
        return told_by(card_file.read_text(encoding="utf-8", errors="replace") if is_small else "")
    except OSError:
        return told_by("")


def _training_state(path: Path) -> dict[str, Any]:
    """What a training checkpoint says of itself; {} for any other model."""
    file = path / "trainer" / "state.json"
    if not path.is_dir() or not file.is_file():
        return {}
    state = read_json(file)
    return state if isinstance(state, dict) else {}


def _public_name(reference: str | None, path: Path) -> str | None:
    """The model's name without the folders that it lies in, which say nothing to others; a hub id whole."""
    if reference is not None and reference.count("/") == 1 and not path.as_posix().endswith(reference):
        return reference.partition("@")[0]
    return path.stem if path.suffix == ".gguf" else path.resolve().name
