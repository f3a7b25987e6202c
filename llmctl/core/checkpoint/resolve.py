"""What `--model` means: a path, a built-in model, a hub id. No torch."""

from pathlib import Path

from llmctl.core.errors import InputError, NotFoundError
from llmctl.core.tensorfile import PICKLES

BUILT_IN = Path(__file__).parents[2] / "models"
"""The models that come with the package, one folder each."""


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
