"""What a model's files say apart from its weights: config, generation config, tokenizer, and which tensors belong. No torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError, NotFoundError
from llmctl.core.families import Family, family_of, is_known
from llmctl.core.families.base import Binding, Shape
from llmctl.core.files import read_json
from llmctl.core.model.facts import tensor_shapes
from llmctl.core.quant import GROUP, LAYOUTS, Layout

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

MAX_CONFIG_BYTES = 4 << 20
ADAPTER_CONFIG = "adapter_config.json"
QUANT_METHOD, QUANT_FORMAT = "llmctl", 1
"""The `quant_method` and `format` in the quantization_config of directories with quantised weights of our own; see quantised.py."""


def load_config(path: Path) -> tuple[ModelConfig, Family, dict[str, Any]]:
    """Facts, family and raw config.json of a model directory, or of a config.json. Raises NotFoundError or InputError."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    raw = read_object(file)
    if raw is None:
        raise NotFoundError(f"{file}: no such file; a model directory has a config.json")
    readable = raw if own_layout(raw, where=file) is None else {k: v for k, v in raw.items() if k != "quantization_config"}
    family = family_of(readable, where=str(file))
    try:
        return family.config_from_hf(raw), family, raw
    except InputError as error:
        raise InputError(f"{file}: {str(error).removeprefix('config.json: ')}") from error


def own_layout(raw: Mapping[str, Any], *, where: object) -> Layout | None:
    """The layout of a quantised directory of ours, from its config.json; None for any other. Raises InputError."""
    table = raw.get("quantization_config")
    if not isinstance(table, dict) or table.get("quant_method") != QUANT_METHOD:
        return None
    if table.get("format") != QUANT_FORMAT or table.get("group_size") != GROUP or table.get("layout") not in LAYOUTS:
        raise InputError(
            f"{where}: quantization_config {table!r} is of another version; format {QUANT_FORMAT} in groups of {GROUP} is read"
        )
    layout: Layout = table["layout"]
    return layout


def is_adapter(path: Path) -> bool:
    """Whether `path` is a directory with an adapter (adapter.py) rather than a model."""
    return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").exists()


def check_trainable(path: Path) -> None:
    """Raise InputError when `path` is an adapter, or its weights are quantised: too coarse for a training step to change them."""
    if is_adapter(path):
        raise InputError(f"{path} is an adapter, and training starts from a model; merge it into one: llmctl export {path} -o FOLDER")
    raw = read_object(path / "config.json") if path.is_dir() else None
    if raw is not None and own_layout(raw, where=path) is not None:
        raise InputError(f"{path}: the weights are quantised and cannot be trained; take the model that they were made from")


def unknown_architecture(path: Path) -> dict[str, Any] | None:
    """The config.json of a model directory whose architecture no family covers; None for all others, missing ones included."""
    raw = read_object(Path(path) / "config.json")
    return None if raw is None or not isinstance(raw.get("model_type"), str) or is_known(raw) else raw


def read_object(file: Path) -> dict[str, Any] | None:
    """The JSON object in `file`, or None when there is no such file."""
    if not file.is_file():
        return None
    raw = read_json(file, max_bytes=MAX_CONFIG_BYTES)
    if not isinstance(raw, dict):
        raise InputError(f"{file}: a JSON object is wanted")
    return raw


def read_generation(folder: Path) -> dict[str, Any]:
    """generation_config.json, or {}."""
    return read_object(folder / "generation_config.json") or {}


def stated_license(path: Path) -> str | None:
    """The licence that a model's card, or a GGUF file's metadata, states; None where there is none."""
    if path.suffix == ".gguf":
        from llmctl.core.gguf import GgufFile

        found = GgufFile(path).metadata.get("general.license")
        return found[:100] if isinstance(found, str) else None
    card = path / "README.md"
    try:
        if card.is_file() and card.stat().st_size <= MAX_CONFIG_BYTES:
            from llmctl.core.card import license_of

            return license_of(card.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        pass
    return None


def token_ids(value: Any) -> tuple[int, ...]:
    """The ids of an entry such as `eos_token_id`, which is a number, a list of them, or null."""
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0)


def load_tokenizer(path: Path, *, adapter: Path | None = None, quickly: bool = False) -> "Tokenizer":
    """The tokenizer of a model directory or of a `.gguf` file; that of `adapter` where it has one.

    `quickly` takes the tables that are kept of a large one, and has them made where there are none.
    """
    path = adapter if adapter is not None and (adapter / "tokenizer.json").is_file() else Path(path)
    if path.suffix == ".gguf":
        from llmctl.core.families.gguf_tokenizer import tokenizer_from_gguf
        from llmctl.core.gguf import GgufFile

        return tokenizer_from_gguf(GgufFile(path).metadata, where=str(path))
    if quickly and path.is_dir():
        from llmctl.core.checkpoint.kepttokens import tokenizer_of

        return tokenizer_of(path)
    from llmctl.core.tokenizer import Tokenizer

    return Tokenizer.load(path)


def check_tokenizer(tokenizer: "Tokenizer", config: ModelConfig, *, where: object) -> None:
    """Raise InputError when the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids, the model has embeddings for {config.vocab_size}; "
            "they do not belong together"
        )


def bindings_of(family: Family, config: ModelConfig) -> list[Binding]:
    """The tensors of a checkpoint of this config. Raises InputError when the family cannot express the config."""
    try:
        return list(family.bindings(config, tensor_shapes(config)))
    except LookupError as error:
        raise InputError(f"a {family.name} model cannot have what this config asks for: {error.args[0]}") from error


def check_names(found: Mapping[str, Shape], bindings: Sequence[Binding], *, what: str) -> None:
    """Compare the tensors of a file (name -> shape) with those that a model wants. Raises InputError that names the first."""
    wanted = {binding.theirs for binding in bindings}
    extra = sorted(found.keys() - wanted)
    if extra:
        raise InputError(f"tensor {extra[0]!r} has no place in this {what}{and_more(extra)}")
    missing = [binding.theirs for binding in bindings if binding.theirs not in found]
    if missing:
        raise InputError(f"tensor {missing[0]!r} is missing{and_more(missing)}")
    for binding in bindings:
        shape = found[binding.theirs]
        if shape != binding.their_shape:
            raise InputError(f"tensor {binding.theirs!r} has the shape {list(shape)}, the config asks for {list(binding.their_shape)}")


def and_more(names: Sequence[str]) -> str:
    """How many more than the first there are."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
