"""Models in and out: Hugging Face directories and GGUF files. Knows families and files; knows no training and no command.

Weights are mapped, not read: a tensor that is stored as the model wants it stays in the page cache until it is used.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError, NotFoundError, write_error
from llmctl.core.families import Family, family_named, family_of
from llmctl.core.families.base import Binding, bind
from llmctl.core.files import read_json, write_json
from llmctl.core.model.decoder import Decoder, sinusoidal_table
from llmctl.core.model.facts import tensor_shapes
from llmctl.core.tensorfile import INDEX_NAME, SINGLE_NAME, TensorFile, weight_files

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
MAX_SHARD_BYTES = 5 << 30


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, in eval mode, and what its files say of it."""

    model: Decoder
    config: ModelConfig
    family: str
    dtype: torch.dtype
    path: Path
    eos_ids: tuple[int, ...]
    """The ids that end a text: generation_config.json's, else config.json's."""
    generation: dict[str, Any]
    """generation_config.json, or {}."""


def load_config(path: Path) -> tuple[ModelConfig, Family, dict[str, Any]]:
    """Facts, family and raw config.json of a model directory, or of a config.json. Raises NotFoundError or InputError."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise NotFoundError(f"{file}: no such file; a model directory has one")
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise InputError(f"{file}: not a JSON object")
    family = family_of(raw, where=str(file))
    try:
        return family.config_from_hf(raw), family, raw
    except InputError as error:
        raise InputError(f"{file}: {str(error).removeprefix('config.json: ')}") from error


def load_model(path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> LoadedModel:
    """Load a model directory or a `.gguf` file. `dtype` None keeps what is stored (float32 for a quantised GGUF).

    Raises NotFoundError when the files are not there, InputError when they are bad, unsafe or do not fit each other.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype=dtype, device=device)
    config, family, raw = load_config(path)
    generation = _read_generation(path)
    tensors = dict(_our_tensors(path, config, family, dtype=dtype))
    model = assemble(config, tensors, device=device)
    eos_ids = _ids(generation.get("eos_token_id")) or _ids(raw.get("eos_token_id"))
    return LoadedModel(model, config, family.name, model.dtype, path, eos_ids, generation)


def assemble(config: ModelConfig, tensors: dict[str, Tensor], *, device: torch.device | str) -> Decoder:
    """A decoder in eval mode around `tensors` (the decoder's names, all of them), without a copy where none is needed."""
    with torch.device("meta"):
        model = Decoder(config)
    target = torch.device(device)
    model.load_state_dict({name: tensor.to(target) for name, tensor in tensors.items()}, assign=True)
    return model.eval()


def _read_generation(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise InputError(f"{file}: not a JSON object")
    return raw


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0)


def _our_tensors(folder: Path, config: ModelConfig, family: Family, *, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """The decoder's tensors, one after the other, so that only one at a time needs room for a conversion."""
    found = _open_tensors(folder)
    bindings = _bindings(family, config)
    wanted = {binding.theirs for binding in bindings}
    found = _with_prefix(found, family, wanted)
    extra = sorted(name for name in set(found) - wanted if not name.endswith(family.ignored))
    if config.tie_embeddings:
        extra = [name for name in extra if not (name in family.head_names and _is_copy(found, name, bindings[0].theirs))]
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items() if name in wanted or name in extra}
    try:
        _check_names(shapes, bindings, what=f"{family.name} model")
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    stored = found[bindings[0].theirs].dtype if dtype is None else dtype
    for binding in bindings:
        parts = binding.rule.to_ours(found[binding.theirs], binding.our_shapes)
        for name, part in zip(binding.ours, parts, strict=True):
            yield name, part.to(stored).contiguous()


def _check_names(found: Mapping[str, tuple[int, ...]], bindings: Sequence[Binding], *, what: str) -> None:
    """Compare the tensors of a file (name -> shape) with those that a model wants. Raises InputError that names the first."""
    wanted = {binding.theirs for binding in bindings}
    extra = sorted(found.keys() - wanted)
    if extra:
        raise InputError(f"tensor {extra[0]!r} has no place in this {what}{_and_more(extra)}")
    missing = [binding.theirs for binding in bindings if binding.theirs not in found]
    if missing:
        raise InputError(f"tensor {missing[0]!r} is missing{_and_more(missing)}")
    for binding in bindings:
        shape = found[binding.theirs]
        if shape != binding.their_shape:
            raise InputError(f"tensor {binding.theirs!r} has the shape {list(shape)}, the config asks for {list(binding.their_shape)}")


def _bindings(family: Family, config: ModelConfig) -> list[Binding]:
    try:
        return list(family.bindings(config, tensor_shapes(config)))
    except LookupError as error:
        raise InputError(f"a {family.name} model cannot have what this config asks for: {error.args[0]}") from error


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _with_prefix(found: dict[str, Tensor], family: Family, wanted: set[str]) -> dict[str, Tensor]:
    """A checkpoint of the bare trunk (GPT-2 on the hub) leaves the prefix off; put it back."""
    if any(name.startswith(family.trunk_prefix) for name in found):
        return found
    return {name if name in wanted else family.trunk_prefix + name: tensor for name, tensor in found.items()}


def _is_copy(found: dict[str, Tensor], name: str, original: str) -> bool:
    return original in found and found[name].shape == found[original].shape and torch.equal(found[name], found[original])


def _open_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the weight files of `folder`, mapped. Raises InputError for a tensor that is there twice."""
    found: dict[str, Tensor] = {}
    for path, listed in weight_files(folder).items():
        file = TensorFile(path)
        if listed is not None and listed != file.entries.keys():
            odd = sorted(listed ^ file.entries.keys())[0]
            says = "lists a tensor that is not in it" if odd in listed else "does not list its tensor"
            raise InputError(f"{path}: {INDEX_NAME} {says}: {odd!r}")
        for name, entry in file.entries.items():
            if name in found:
                raise InputError(f"{path}: tensor {name!r} is in another file too")
            if entry.dtype not in _TORCH_DTYPES:
                raise InputError(f"{path}: tensor {name!r} has the dtype {entry.dtype}, weights are {', '.join(_TORCH_DTYPES)}")
            found[name] = _mapped(file, entry)
    return found


def _mapped(file: TensorFile, entry: Any) -> Tensor:
    dtype = _TORCH_DTYPES[entry.dtype]
    count = math.prod(entry.shape)
    if count == 0:
        return torch.empty(entry.shape, dtype=dtype)
    if entry.start % dtype.itemsize:  # the format does not promise alignment, vector loads need it
        raw = bytearray(file.buffer[entry.start : entry.start + entry.num_bytes])
        return torch.frombuffer(raw, dtype=dtype).view(entry.shape)
    return torch.frombuffer(file.buffer, dtype=dtype, count=count, offset=entry.start).view(entry.shape)


def _load_gguf(path: Path, *, dtype: torch.dtype | None, device: torch.device | str) -> LoadedModel:
    """A model from a GGUF file: weights dequantised, rows of q and k put back into Hugging Face's order."""
    from llmctl.core.families.gguf import ROPE_FACTORS, Metadata, gguf_family, halves_from_pairs, llama3_scaling
    from llmctl.core.families.gguf_tokenizer import eos_ids_of
    from llmctl.core.gguf import GgufFile

    file = GgufFile(path)
    try:
        meta = Metadata(file.metadata)
        record = gguf_family(meta)
        if "token_embd.weight" not in file.tensors:
            raise InputError("tensor 'token_embd.weight' is missing")
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        config = record.config(meta, shapes, shapes["token_embd.weight"][0])
        if ROPE_FACTORS in file.tensors:
            config = dataclasses.replace(config, rope_scaling=llama3_scaling(file.array(file.tensors[ROPE_FACTORS]), config))
        bindings = list(bind(record.rules, config.num_layers, tensor_shapes(config)))
        _check_names({name: shape for name, shape in shapes.items() if name != ROPE_FACTORS}, bindings, what=f"{record.family} model")
    except (InputError, LookupError) as error:
        raise InputError(f"{path}: {error.args[0]}") from error
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    stored = kinds.get(file.tensors["token_embd.weight"].kind, torch.float32) if dtype is None else dtype
    tensors = {}
    for binding in bindings:
        array = file.array(file.tensors[binding.theirs])
        for name, part in zip(binding.ours, binding.rule.to_ours(array, binding.our_shapes), strict=True):
            if record.interleaved and name.rpartition(".")[0].endswith(("attn.q", "attn.k")):
                part = halves_from_pairs(part, config.head_dim)
            tensors[name] = torch.from_numpy(part).to(stored).contiguous()
    model = assemble(config, tensors, device=device)
    return LoadedModel(model, config, record.family, model.dtype, path, eos_ids_of(file.metadata), {})


def load_tokenizer(path: Path) -> "Tokenizer":
    """The tokenizer of a model directory or of a `.gguf` file."""
    path = Path(path)
    if path.suffix == ".gguf":
        from llmctl.core.families.gguf_tokenizer import tokenizer_from_gguf
        from llmctl.core.gguf import GgufFile

        return tokenizer_from_gguf(GgufFile(path).metadata, where=str(path))
    from llmctl.core.tokenizer import Tokenizer

    return Tokenizer.load(path)


def check_tokenizer(tokenizer: "Tokenizer", config: ModelConfig, *, where: object) -> None:
    """Raise InputError when the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids, the model has embeddings for {config.vocab_size}; "
            "they do not belong together"
        )


def load_model_and_tokenizer(
    path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[LoadedModel, "Tokenizer"]:
    """Both, checked against each other before the weights are opened."""
    tokenizer = load_tokenizer(path)
    if Path(path).suffix != ".gguf":
        check_tokenizer(tokenizer, load_config(path)[0], where=path)
    loaded = load_model(path, dtype=dtype, device=device)
    check_tokenizer(tokenizer, loaded.config, where=path)
    return loaded, tokenizer


def hf_tensors(config: ModelConfig, family: Family, tensors: Mapping[str, Tensor], *, dtype: torch.dtype) -> dict[str, Tensor]:
    """`tensors` (the decoder's names) under Hugging Face's names and layouts, contiguous, in `dtype`.

    Raises InputError that names what is left over or missing.
    """
    given = dict(tensors)
    if config.positions == "sinusoidal" and "positions.weight" not in given:
        given["positions.weight"] = sinusoidal_table(config.max_positions, config.hidden_size)
    shapes = tensor_shapes(config)
    for what, names in (("missing", shapes.keys() - given.keys()), ("not one of this model's", given.keys() - shapes.keys())):
        if names:
            raise InputError(f"tensor {min(names)!r} is {what}{_and_more(sorted(names))}")
    result = {}
    for binding in _bindings(family, config):
        for name, shape in zip(binding.ours, binding.our_shapes, strict=True):
            if tuple(given[name].shape) != shape:
                raise InputError(f"tensor {name!r} has the shape {list(given[name].shape)}, {list(shape)} is wanted")
        joined = binding.rule.to_theirs([given[name].detach() for name in binding.ours])
        result[binding.theirs] = joined.to(device="cpu", dtype=dtype).contiguous()
    return result


def save_model(
    directory: Path,
    *,
    config: ModelConfig,
    family: str,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    tokenizer: "Tokenizer | None" = None,
    generation: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model directory that transformers loads: config, weights, generation config, tokenizer.

    `tensors` have the decoder's names; `dtype` None keeps that of the embeddings. `directory` exists and is usually a
    temporary one that the caller renames: nothing here is atomic or fsynced. Raises WriteError when the disk is full.
    """
    record = family_named(family)
    dtype = tensors["embed.weight"].dtype if dtype is None else dtype
    generation = dict(generation or {})
    bos, eos, pad = _special_ids(tokenizer, generation)
    write_json(directory / "config.json", record.write_config(config, dtype=_DTYPE_NAMES[dtype], bos_id=bos, eos_ids=eos, pad_id=pad))
    ids = {"bos_token_id": bos, "eos_token_id": (eos[0] if len(eos) == 1 else list(eos)) if eos else None, "pad_token_id": pad}
    known = {key: value for key, value in ids.items() if value is not None}
    write_json(directory / "generation_config.json", {"_from_model_config": True, **generation, **known})
    _write_weights(directory, hf_tensors(config, record, tensors, dtype=dtype), max_shard_bytes)
    if tokenizer is not None:
        tokenizer.save(directory)


def _special_ids(tokenizer: "Tokenizer | None", generation: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...], int | None]:
    """Ids of begin, end (several, when the generation config knows more than the tokenizer) and padding."""
    first = {key: (_ids(generation.get(f"{key}_token_id")) or (None,))[0] for key in ("bos", "pad")}
    eos = _ids(generation.get("eos_token_id"))
    if tokenizer is None:
        return first["bos"], eos, first["pad"]
    if not eos and tokenizer.eos_id is not None:
        eos = (tokenizer.eos_id,)
    bos = tokenizer.bos_id if tokenizer.bos_id is not None else first["bos"]
    return bos, eos, tokenizer.pad_id if tokenizer.pad_id is not None else first["pad"]


def _write_weights(directory: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + num_bytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += num_bytes
    names = [SINGLE_NAME] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        try:
            save_file(shard, directory / name, metadata={"format": "pt"})
        except OSError as error:
            raise write_error(error, path=directory / name) from error
        except SafetensorError as error:  # it tells an i/o error only in words
            raise _as_write_error(error, directory / name) from error
    if len(shards) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        table = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(directory / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": table})


def _as_write_error(error: Exception, path: Path) -> Exception:
    import re

    number = re.search(r"os error (\d+)", str(error))
    return write_error(OSError(int(number.group(1)), str(error)), path=path) if number else write_error(OSError(0, str(error)), path=path)


def resolve_model(reference: str) -> Path:
    """The directory or `.gguf` file that `reference` stands for.

    In this order: a path, a built-in model's name, a hub id ORG/NAME[@revision]. Raises NotFoundError when there is no
    such thing here and the hub does not have it or cannot be reached.
    """
    path = Path(reference).expanduser()
    if path.exists():
        return path
    built_in = Path(__file__).parent.parent / "models" / reference
    if reference and "/" not in reference and "." not in reference and (built_in / "config.json").is_file():
        return built_in
    from llmctl.core.hub import fetch_model, is_hub_id

    if is_hub_id(reference):
        return fetch_model(reference)
    raise NotFoundError(f"model {reference!r} not found: no such directory or file, no built-in model, and not a hub id (ORG/NAME)")
