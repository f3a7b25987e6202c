"""Presets: a system message and a template for a kind of task, as small TOML files. Knows files and text; knows no model.

    description = "A text in another language"
    system = "You translate into {to}."
    template = "Translate: {input}"

    [parameters]          # names for --set, with what holds when nothing is said
    to = "English"

    [sampling]            # wherever no flag says otherwise
    temperature = 0.3

A {name} in braces stands for the input or a parameter; other braces are text. The name `summarize` is looked up in the
user's folder first, then among those that come with llmctl; a reference with a slash or ending in .toml is a path.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llmctl.core.config.generate import ROW_PARAMETERS
from llmctl.core.errors import InputError, NotFoundError, UsageError
from llmctl.core.infer.defaults import merged
from llmctl.core.infer.sampler import SamplingParams

BUILT_IN = Path(__file__).parent / "presets"
_KEYS = ("description", "system", "template", "parameters", "sampling")
_MAX_BYTES = 1 << 20
_NAME = re.compile(r"\{([a-z_][a-z0-9_]*)\}")
_PARAMETER = re.compile(r"[a-z_][a-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A kind of task, with all its parameters filled in."""

    name: str
    description: str = ""
    system: str | None = None
    template: str = "{input}"
    parameters: Mapping[str, str] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def system_text(self) -> str | None:
        """The system message."""
        return None if self.system is None else _filled(self.system, self.parameters)

    def user_text(self, text: str) -> str:
        """The user's message for an input; braces in the input are left alone."""
        return _filled(self.template, {**self.parameters, "input": text})

    def plain_text(self, text: str) -> str:
        """The prompt for a model without a chat template: both, with an empty line between."""
        system = self.system_text()
        return self.user_text(text) if system is None else f"{system}\n\n{self.user_text(text)}"


def user_folder() -> Path:
    """Where a user's own presets lie: $XDG_CONFIG_HOME/llmctl/presets, by default below ~/.config."""
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path("~/.config").expanduser()) / "llmctl" / "presets"


def load_preset(reference: str, settings: tuple[str, ...] = ()) -> Preset:
    """The preset with `settings` ("to=German") in place of its own.

    Raises NotFoundError that names those there are, InputError for a bad file, UsageError for a setting it does not have.
    """
    path = _find(reference)
    preset = _read(path)
    parameters = dict(preset.parameters)
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: NAME=VALUE is wanted, for instance --set to=German")
        if name not in parameters:
            known = f"its parameters are {', '.join(sorted(parameters))}" if parameters else "it has no parameters"
            raise UsageError(f"--set {name}: the preset {preset.name} has no such parameter; {known}")
        parameters[name] = value
    return Preset(
        name=preset.name,
        description=preset.description,
        system=preset.system,
        template=preset.template,
        parameters=parameters,
        sampling=preset.sampling,
    )


def preset_names() -> list[str]:
    """The names that can be given without a path, sorted."""
    return sorted({path.stem for folder in (user_folder(), BUILT_IN) if folder.is_dir() for path in folder.glob("*.toml")})


def _find(reference: str) -> Path:
    if "/" in reference or reference.endswith(".toml"):
        if not Path(reference).is_file():
            raise NotFoundError(f"--preset {reference}: no such file")
        return Path(reference)
    for folder in (user_folder(), BUILT_IN):
        if (folder / f"{reference}.toml").is_file():
            return folder / f"{reference}.toml"
    names = preset_names()
    close = get_close_matches(reference, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
    raise NotFoundError(f"--preset {reference}: no such preset; {hint} Your own go into {user_folder()}")


def _read(path: Path) -> Preset:
    where = f"preset {path}"
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise InputError(f"{where}: more than {_MAX_BYTES:,} bytes, the limit of a preset")
        table = tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where}: not valid TOML: {error}") from error
    for key in table:
        if key not in _KEYS:
            raise InputError(f"{where}: unknown key {key!r}; the keys are {', '.join(_KEYS)}")
    for key in ("description", "system", "template"):
        if not isinstance(table.get(key, ""), str):
            raise InputError(f"{where}: {key}: text is wanted")
    for key in ("parameters", "sampling"):
        if not isinstance(table.get(key, {}), dict):
            raise InputError(f"{where}: {key}: a table is wanted")
    preset = Preset(
        name=path.stem,
        description=table.get("description", ""),
        system=table.get("system"),
        template=table.get("template", "{input}").removeprefix("\n"),
        parameters=_parameters(table.get("parameters", {}), where),
        sampling=_sampling(table.get("sampling", {}), where),
    )
    _check_names(preset, where)
    return preset


def _parameters(table: Mapping[str, Any], where: str) -> dict[str, str]:
    for name, value in table.items():
        if not _PARAMETER.fullmatch(name) or name == "input":
            raise InputError(f"{where}: parameters.{name}: a name has small letters, digits and _, and is not `input`")
        if not isinstance(value, str):
            raise InputError(f"{where}: parameters.{name}: text is wanted")
    return dict(table)


def _sampling(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    for name in table:
        if name not in ROW_PARAMETERS:
            raise InputError(f"{where}: sampling.{name}: unknown; the settings are {', '.join(ROW_PARAMETERS)}")
    try:
        merged(SamplingParams(), table)
    except UsageError as error:
        raise InputError(f"{where}: sampling.{error}") from error
    return dict(table)


def _check_names(preset: Preset, where: str) -> None:
    if "input" not in _NAME.findall(preset.template):
        raise InputError(f"{where}: template: {{input}} must stand in it, where the prompt goes")
    for key, text, known in (
        ("template", preset.template, {"input", *preset.parameters}),
        ("system", preset.system or "", set(preset.parameters)),
    ):
        for name in _NAME.findall(text):
            if name not in known:
                raise InputError(f"{where}: {key}: {{{name}}} is not among the parameters ({', '.join(sorted(known)) or 'there are none'})")


def _filled(text: str, values: Mapping[str, str]) -> str:
    """`text` with each {name} replaced, in one pass, so that braces in a value stay."""
    return _NAME.sub(lambda found: values[found[1]], text)
