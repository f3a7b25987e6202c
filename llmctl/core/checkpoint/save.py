"""Writing a model directory that transformers loads. Knows families and tensors."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmctl.core.checkpoint.adapter import FINGERPRINT_KEY, WEIGHTS_NAME, adaptable_modules, adapter_config, choose_modules, peft_arrays
from llmctl.core.checkpoint.folder import ADAPTER_CONFIG, and_more, bindings_of, token_ids
from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError, write_error
from llmctl.core.families import Family, family_named
from llmctl.core.families.base import Binding
from llmctl.core.files import write_json
from llmctl.core.model.decoder import sinusoidal_table
from llmctl.core.model.facts import tensor_shapes
from llmctl.core.model.lora import LoraConfig
from llmctl.core.tensorfile import INDEX_NAME, SINGLE_NAME

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5 << 30
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}


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
            raise InputError(f"tensor {min(names)!r} is {what}{and_more(sorted(names))}")
    result = {}
    for binding in bindings_of(family, config):
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
    share: tuple[int, int] = (0, 1),
) -> None:
    """Write a model directory that transformers loads: config, weights, generation config, tokenizer.

    `tensors` have the decoder's names; `dtype` None keeps that of the embeddings. `directory` exists and is usually a
    temporary one that the caller renames: nothing here is atomic or fsynced. Raises WriteError when the disk is full.

    `share` (rank, ranks): several processes call it together, and each writes some of the weight files. They look up all
    of `tensors` in the same order, so that a look-up may gather a tensor from them all; none holds more than a file. What
    `names_in_share` leaves out may be on the meta device.
    """
    record = family_named(family)
    dtype = tensors["embed.weight"].dtype if dtype is None else dtype
    if share[0] == 0:
        write_around(directory, family=record, config=config, dtype=dtype, tokenizer=tokenizer, generation=generation)
    if share[1] > 1:
        _write_share(directory, config, record, tensors, dtype, max_shard_bytes, share)
        return
    write_weights(directory, hf_tensors(config, record, tensors, dtype=dtype), max_shard_bytes)


def write_around(
    directory: Path,
    *,
    family: Family,
    config: ModelConfig,
    dtype: torch.dtype,
    tokenizer: "Tokenizer | None",
    generation: Mapping[str, Any] | None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write all of a model directory but its weights. `extra` are further keys of config.json."""
    bos, eos, pad = _special_ids(tokenizer, generation or {})
    described = family.write_config(config, dtype=_DTYPE_NAMES[dtype], bos_id=bos, eos_ids=eos, pad_id=pad)
    write_json(directory / "config.json", {**described, **(extra or {})})
    _write_words(directory, tokenizer, generation or {})


def _write_words(directory: Path, tokenizer: "Tokenizer | None", generation: Mapping[str, Any]) -> None:
    """The generation config and the tokenizer."""
    bos, eos, pad = _special_ids(tokenizer, generation)
    ids = {"bos_token_id": bos, "eos_token_id": (eos[0] if len(eos) == 1 else list(eos)) if eos else None, "pad_token_id": pad}
    known = {key: value for key, value in ids.items() if value is not None}
    write_json(directory / "generation_config.json", {"_from_model_config": True, **generation, **known})
    if tokenizer is not None:
        tokenizer.save(directory)


def save_adapter(
    directory: Path,
    *,
    config: ModelConfig,
    family: str,
    tensors: Mapping[str, Tensor],
    lora: LoraConfig,
    targets: Sequence[str],
    base: str,
    fingerprint: str,
    tokenizer: "Tokenizer | None" = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter that PEFT loads: config, weights in float32, and the tokenizer and generation config that go with it.

    `tensors` hold the decoder's `<module>.lora_a` and `.lora_b`; `base` is the model's name as --model takes it. Else as
    `save_model`.
    """
    chosen = choose_modules(adaptable_modules(config, family_named(family)), targets)
    name, _, revision = base.partition("@") if not Path(base).exists() else (base, "", "")
    described = adapter_config(
        chosen=chosen, targets=targets, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, base=name, revision=revision or None
    )
    write_json(directory / ADAPTER_CONFIG, described)
    _write_words(directory, tokenizer, generation or {})
    arrays = {key: tensor.detach().to("cpu", torch.float32).contiguous() for key, tensor in peft_arrays(chosen, tensors).items()}
    write_file(directory / WEIGHTS_NAME, arrays, metadata={FINGERPRINT_KEY: fingerprint})


def _special_ids(tokenizer: "Tokenizer | None", generation: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...], int | None]:
    """Ids of begin, end (several, when the generation config knows more than the tokenizer) and padding."""
    first = {key: (token_ids(generation.get(f"{key}_token_id")) or (None,))[0] for key in ("bos", "pad")}
    eos = token_ids(generation.get("eos_token_id"))
    if tokenizer is None:
        return first["bos"], eos, first["pad"]
    if not eos and tokenizer.eos_id is not None:
        eos = (tokenizer.eos_id,)
    bos = tokenizer.bos_id if tokenizer.bos_id is not None else first["bos"]
    return bos, eos, tokenizer.pad_id if tokenizer.pad_id is not None else first["pad"]


def _write_share(
    directory: Path,
    config: ModelConfig,
    family: Family,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    max_shard_bytes: int,
    share: tuple[int, int],
) -> None:
    """The weight files number rank, rank + ranks, ...; and on rank 0 the index. What is in which file follows from shapes."""
    rank, ranks = share
    files, total_bytes = _files_of(family, config, dtype, max_shard_bytes, ranks)
    names = _file_names(len(files))
    for number, (name, members) in enumerate(zip(names, files, strict=True)):
        held = {}
        for binding in members:
            ours = [_tensor_of(our_name, tensors, config) for our_name in binding.ours]
            if number % ranks == rank:
                held[binding.theirs] = binding.rule.to_theirs(ours).to(device="cpu", dtype=dtype).contiguous()
        if held:
            write_file(directory / name, held)
    if rank == 0 and len(files) > 1:
        table = {binding.theirs: name for name, members in zip(names, files, strict=True) for binding in members}
        write_json(directory / INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": table})


def _files_of(family: Family, config: ModelConfig, dtype: torch.dtype, max_shard_bytes: int, ranks: int) -> tuple[list[list[Binding]], int]:
    """What is in which file when so many ranks write them, and the bytes of all."""
    bindings = bindings_of(family, config)
    sizes = [sum(math.prod(shape) for shape in binding.our_shapes) * dtype.itemsize for binding in bindings]
    limit = min(max_shard_bytes, -(-sum(sizes) // ranks))
    files: list[list[Binding]] = [[]]
    filled = 0
    for binding, num_bytes in zip(bindings, sizes, strict=True):
        if files[-1] and filled + num_bytes > limit:
            files.append([])
            filled = 0
        files[-1].append(binding)
        filled += num_bytes
    return files, sum(sizes)


def names_in_share(
    config: ModelConfig, family: str, share: tuple[int, int], *, dtype: torch.dtype, max_shard_bytes: int = MAX_SHARD_BYTES
) -> set[str]:
    """The decoder's tensors that `save_model` writes with such a `share`; those of others may be on the meta device then."""
    rank, ranks = share
    files, _ = _files_of(family_named(family), config, dtype, max_shard_bytes, ranks)
    return {name for members in files[rank::ranks] for binding in members for name in binding.ours}


def _tensor_of(name: str, tensors: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
    if name == "positions.weight" and config.positions == "sinusoidal":
        return sinusoidal_table(config.max_positions, config.hidden_size)
    return tensors[name].detach()


def _file_names(count: int) -> list[str]:
    return [SINGLE_NAME] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def write_weights(directory: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + num_bytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += num_bytes
    names = _file_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        write_file(directory / name, shard)
    if len(shards) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        table = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(directory / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": table})


def write_file(path: Path, tensors: dict[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file. Raises WriteError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
        if metadata:
            _sort_metadata(path)
    except OSError as error:
        raise write_error(error, path=path) from error
    except SafetensorError as error:  # it tells an i/o error only in words
        raise _as_write_error(error, path) from error


def _sort_metadata(path: Path) -> None:
    """Put the header's metadata in order, which safetensors writes in a random one: equal models are to be equal files."""
    with open(path, "r+b") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(num_bytes))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(num_bytes))


def _as_write_error(error: Exception, path: Path) -> Exception:
    number = re.search(r"os error (\d+)", str(error))
    return write_error(OSError(int(number.group(1)), str(error)), path=path) if number else write_error(OSError(0, str(error)), path=path)
