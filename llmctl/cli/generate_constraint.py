"""What --json-schema, --regex, --choice and --grammar ask for, read and checked. Knows flags and files; knows no grammar."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.cli.streams import decode_utf8
from llmctl.core.config.generate import STRUCTURES, GenerateConfig
from llmctl.core.errors import InputError, NotFoundError, UsageError

if TYPE_CHECKING:
    from llmctl.core.infer.constrain import Constraint
    from llmctl.core.infer.generator import Generator

_MAX_BYTES = 4 << 20


def read_constraint(config: GenerateConfig, generator: "Generator") -> "Constraint | None":
    """The constraint of the flags, understood by the tokenizer. Raises UsageError for a wrong flag, InputError for a wrong file."""
    from llmctl.core.infer.constrain import Constraint

    for kind in STRUCTURES:
        value = getattr(config, kind)
        if value in (None, ()):
            continue
        flag, path = "--" + kind.replace("_", "-"), None
        if kind in ("json_schema", "grammar"):
            value, path = _read(value, flag)
        try:
            constraint = Constraint.of(kind, value)  # type: ignore[arg-type]  # STRUCTURES are its kinds
            generator.constrainer.start(constraint)
        except InputError as error:
            what = str(error).removeprefix(f"{kind}: ")
            if path is not None:
                raise InputError(f"{flag} {path}: {what}") from error
            raise UsageError(f"{flag}: {what}") from error
        return constraint
    return None


def _read(value: str, flag: str) -> tuple[str, Path | None]:
    """The text that a flag holds or names, and the file that it came from."""
    if value.lstrip().startswith("{") or "\n" in value or "::=" in value or ": " in value or value.strip() in ("true", "false"):
        return value, None
    path = Path(value)
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise NotFoundError(f"{flag} {value}: no such file, and it does not look like {_LIKE[flag]}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag} {value}: {(getattr(error, 'strerror', None) or str(error)).lower()}") from error
    if len(data) > _MAX_BYTES:
        raise InputError(f"{flag} {path}: more than {_MAX_BYTES:,} bytes, the limit")
    return decode_utf8(data, where=f"{flag} {path}"), path


_LIKE: dict[str, Any] = {"--json-schema": "a schema, which begins with {", "--grammar": "a grammar, whose rules have a colon and a space"}


def recorded(constraint: "Constraint | None") -> dict[str, Any]:
    """What the sidecar of a result file says of a constraint."""
    return {} if constraint is None else {constraint.kind: constraint.text}
