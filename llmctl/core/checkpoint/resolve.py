"""What `--model` means: a path, a built-in model, a hub id. No torch."""

from pathlib import Path

from llmctl.core.checkpoint.folder import ADAPTER_CONFIG, is_adapter
from llmctl.core.errors import InputError, NotFoundError, UsageError
from llmctl.core.tensorfile import PICKLES

BUILT_IN = Path(__file__).parents[2] / "models"
"""The models that come with the package, one folder each."""
DEFAULT_MODEL = "storyteller"
"""The one that commands take when none is named."""


def resolve_model(reference: str) -> Path:
    """The directory or `.gguf` file that `reference` stands for.

    In this order: a path, a built-in model's name, a hub id ORG/NAME[@revision]. Raises InputError for a file of another
    kind, and NotFoundError when there is no such thing here and the hub does not have it or cannot be reached.
    """
    path = Path(reference).expanduser() if reference.startswith("~") else Path(reference)
    try:
        if reference and path.exists():
            check_kind(path)
            return path
        if reference.isidentifier() and len(reference) <= 64 and (BUILT_IN / reference / "config.json").is_file():
            return BUILT_IN / reference
    except OSError:  # a name too long for a file
        pass
    from llmctl.core.hub import fetch_model, is_hub_id

    if is_hub_id(reference):
        return fetch_model(reference)
    shown = reference if len(reference) <= 200 else reference[:200] + "..."
    raise NotFoundError(f"model {shown!r} not found: no such directory or file, no built-in model, and not a hub id (ORG/NAME)")


def is_portable(reference: str, path: Path) -> bool:
    """Whether `reference`, which was resolved to `path`, means the same from any folder: a built-in name or a hub id."""
    return path == BUILT_IN / reference or ("snapshots" in path.parts and not Path(reference).exists())


def resolve_adapted(reference: str | None, adapter: str | None) -> tuple[Path, Path | None]:
    """What `--model` and `--adapter` stand for together: the model, and the adapter to merge into it.

    An adapter names its base, so either may be missing, and --model may name the adapter; without either it is the default
    model. Raises as `resolve_model` does, InputError for an adapter that is none, UsageError for two of them.
    """
    if adapter is None:
        path = resolve_model(DEFAULT_MODEL if reference is None else reference)
        if not is_adapter(path):
            return path, None
        folder, reference = path, None
    else:
        folder = resolve_model(adapter)
        if not is_adapter(folder):
            raise InputError(f"--adapter {adapter}: is no adapter (a folder with {ADAPTER_CONFIG}); a model is given by --model")
    if reference is None:
        from llmctl.core.checkpoint.adapter import base_reference

    base = base_reference(folder) if reference is None else reference
    try:
        path = resolve_model(base)
    except NotFoundError as error:
        if reference is not None:
            raise
        raise NotFoundError(f"{folder}: its base model is not there ({error}); say where by --model BASE --adapter {folder}") from error
    if is_adapter(path):
        raise UsageError(f"{path} is an adapter too, and {folder} needs a model; merge the first: llmctl export {path} -o FOLDER")
    return path, folder


def check_kind(path: Path) -> None:
    """Raise InputError when `path` is a file that is not read as a model, NotFoundError when it is a run folder."""
    if path.is_dir():
        steps = [] if (path / "config.json").exists() else sorted(path.glob("step-????????"))
        if steps:
            raise NotFoundError(f"{path} is a run folder, not a model; its newest checkpoint is {steps[-1]}")
        return
    if path.suffix == ".gguf":
        return
    if path.suffix in PICKLES:
        raise InputError(f"{path}: pickle refused, since reading one can run any code; a directory with model.safetensors is wanted")
    raise InputError(f"{path}: a model is a directory (config.json, model.safetensors, tokenizer.json) or a .gguf file")
