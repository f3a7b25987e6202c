"""Typed reading of a GGUF file's metadata. Knows keys and values; knows no architecture, tensor or file."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmctl.core.errors import InputError


def shortest_decimal(number: float) -> float:
    """The shortest decimal that gives the same float32, so that 1e-05 is 1e-05 again."""
    return float(str(np.float32(number)))


class Metadata:
    """Typed reading of GGUF metadata. Every error is an InputError that names the key."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.architecture = self.text("general.architecture")

    def text(self, key: str) -> str:
        """A string that must be there."""
        value = self.values.get(key)
        if not isinstance(value, str):
            raise InputError(f"GGUF metadata: {key} is {'missing' if value is None else repr(value)[:80]}; a string is wanted")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number below `<architecture>.`; a list of equal ones (a value per layer) counts as one."""
        value = self.values.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool):
            what = "missing" if value is None else repr(value)[:80]
            raise InputError(f"GGUF metadata: {self.architecture}.{key} is {what}; a whole number is wanted")
        return value

    def number(self, key: str, default: float) -> float:
        """A number below `<architecture>.`, as `shortest_decimal` has it."""
        value = self.values.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
            raise InputError(f"GGUF metadata: {self.architecture}.{key} is {str(value)[:80]}; a number is wanted")
        return shortest_decimal(value)

    def positive(self, key: str, default: float) -> float:
        """A number above 0."""
        value = self.number(key, default)
        if not value > 0:
            raise InputError(f"GGUF metadata: {self.architecture}.{key} is {value}; a number above 0 is wanted")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, bool):
            raise InputError(f"GGUF metadata: {self.architecture}.{key} is {str(value)[:80]}; true or false is wanted")
        return value

    def layers(self, num_layers: int) -> range:
        """The layers to list; a number beyond all reason is cut, and refused by ModelConfig later."""
        return range(max(0, min(num_layers, 1 << 16)))

    def windowed(self, num_layers: int, *, period: int) -> list[bool]:
        """For each layer, whether its attention has a window: all but every `period`-th, where the file says nothing else."""
        key = f"{self.architecture}.attention.sliding_window_pattern"
        given = self.values.get(key)
        if isinstance(given, list):
            if len(given) != num_layers or not all(isinstance(flag, bool | int) for flag in given):
                raise InputError(f"GGUF metadata: {key} has {len(given)} values; a flag for each of the {num_layers} layers is wanted")
            return [bool(flag) for flag in given]
        period = self.integer("attention.sliding_window_pattern", period)
        if period < 0:
            raise InputError(f"GGUF metadata: {key} is {period}; a number of layers is wanted")
        return [period == 0 or i % period < period - 1 for i in self.layers(num_layers)]
