"""What a family is: a config read both ways, and rules that name and reshape its tensors, used both ways. No torch.

The transforms work on numpy arrays and on torch tensors alike: they slice, transpose and join, no more.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from llmctl.core.config.model import ModelConfig, RopeScaling
from llmctl.core.errors import InputError

Shape = tuple[int, ...]
LAYER, EXPERT = "{i}", "{e}"
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Rule:
    """One tensor of a checkpoint, `theirs`, and the decoder's tensors that it holds, `ours`.

    `{i}` stands for the layer, `{e}` for the expert. Several of `ours` are joined along their first dimension; with `{e}` in
    `ours` alone, the experts' matrices are stacked, (E, rows, columns). `transposed` says that the checkpoint stores the
    matrix as (inputs, outputs), as GPT-2's Conv1D does. `by_head` says that what is joined takes turns head by head, as
    GPT-NeoX stores queries, keys and values; `head_dim` is filled in for the model at hand.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    by_head: bool = False
    head_dim: int | None = None

    @property
    def stacks(self) -> bool:
        """Whether the checkpoint's tensor holds the matrices of all experts, one after the other."""
        return EXPERT not in self.theirs and any(EXPERT in name for name in self.ours)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Shape of the checkpoint's tensor, from those of ours."""
        if self.stacks:
            return (len(shapes), *shapes[0])
        joined = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return joined[::-1] if self.transposed else joined

    def to_ours(self, array: Any, shapes: Sequence[Shape]) -> list[Any]:
        """Take the checkpoint's tensor apart. `shapes` are those of ours; the results are views where they can be."""
        if self.stacks:
            return list(array)
        array = array.T if self.transposed else array
        if len(shapes) == 1:
            return [array]
        if self.by_head:
            heads = array.reshape(-1, len(shapes), self.head_dim, *array.shape[1:])  # (H, parts, D, ...)
            return [heads[:, part].reshape(shape) for part, shape in enumerate(shapes)]
        parts, start = [], 0
        for shape in shapes:
            parts.append(array[start : start + shape[0]])
            start += shape[0]
        return parts

    def to_theirs(self, arrays: Sequence[Any]) -> Any:
        """Put ours together again. The inverse of `to_ours`, bit for bit."""
        if self.stacks:
            return _concatenate([array[None] for array in arrays])
        if self.by_head and len(arrays) > 1:
            rest = arrays[0].shape[1:]
            heads = _concatenate([array.reshape(-1, 1, self.head_dim, *rest) for array in arrays], axis=1)  # (H, parts, D, ...)
            return heads.reshape(-1, *rest)
        joined = arrays[0] if len(arrays) == 1 else _concatenate(arrays)
        return joined.T if self.transposed else joined


def _concatenate(arrays: Sequence[Any], *, axis: int = 0) -> Any:
    import numpy as np

    if isinstance(arrays[0], np.ndarray):
        return np.concatenate(arrays, axis=axis)
    import torch

    return torch.cat(list(arrays), dim=axis)


@dataclass(frozen=True)
class Binding:
    """A rule applied to one layer of one model: names and shapes on both sides."""

    rule: Rule
    theirs: str
    ours: tuple[str, ...]
    our_shapes: tuple[Shape, ...]

    @property
    def their_shape(self) -> Shape:
        """Shape that the checkpoint's tensor must have."""
        return self.rule.shape(self.our_shapes)


def bind(rules: Sequence[Rule], num_layers: int, shapes: Mapping[str, Shape]) -> Iterator[Binding]:
    """The rules that apply to a model whose decoder has the tensors `shapes`, for every layer, in order.

    A rule applies where the model has the rule's tensors, so that biases, norms and a free head need no conditions.
    Raises LookupError when a tensor of ours is left over: then the rules do not cover the model.
    """
    covered: set[str] = set()
    for rule in rules:
        for i in range(num_layers) if LAYER in rule.theirs else range(1):
            theirs = rule.theirs.replace(LAYER, str(i))
            pattern = tuple(name.replace(LAYER, str(i)) for name in rule.ours)
            for expert, ours in _expand(rule, pattern, shapes):
                covered.update(ours)
                yield Binding(rule, theirs.replace(EXPERT, str(expert)), ours, tuple(shapes[name] for name in ours))
    left = [name for name in shapes if name not in covered]
    if left:
        raise LookupError(f"there is no name for {', '.join(left[:5])}")


def _expand(rule: Rule, pattern: tuple[str, ...], shapes: Mapping[str, Shape]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The names that `pattern` stands for in the model: one set, one for each expert, or one that holds all experts."""
    if not any(EXPERT in name for name in pattern):
        if all(name in shapes for name in pattern):
            yield 0, pattern
        return
    sets: list[tuple[str, ...]] = []
    while all(name.replace(EXPERT, str(len(sets))) in shapes for name in pattern):
        sets.append(tuple(name.replace(EXPERT, str(len(sets))) for name in pattern))
    if not rule.stacks:
        yield from enumerate(sets)
    elif sets:
        yield 0, tuple(name for names in sets for name in names)


@dataclass(frozen=True)
class Family:
    """Models of one kind in Hugging Face's terms.

    `config_to_hf` gives the keys of config.json that are the family's own; `write_config` adds the common ones. A
    checkpoint of the bare trunk leaves `trunk_prefix` off its names, and names that match `ignored` (endings) are
    tables that older versions saved and that nobody needs.
    """

    name: str
    model_types: tuple[str, ...]
    architecture: str
    config_from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    rules: tuple[Rule, ...]
    trunk_prefix: str
    head_names: tuple[str, ...] = ("lm_head.weight",)
    """The names of a head in a checkpoint, which a tied one may hold as a copy of the embeddings."""
    ignored: tuple[str, ...] = field(default=())

    def bindings(self, config: ModelConfig, shapes: Mapping[str, Shape]) -> Iterator[Binding]:
        """Every tensor of a checkpoint, in order; see `bind`. `shapes` are the decoder's (facts.tensor_shapes)."""
        rules = [replace(rule, head_dim=config.head_dim) if rule.by_head else rule for rule in self.rules]
        return bind(rules, config.num_layers, shapes)

    def write_config(
        self, config: ModelConfig, *, dtype: str, bos_id: int | None, eos_ids: Sequence[int], pad_id: int | None
    ) -> dict[str, Any]:
        """The whole of config.json, as transformers 5 writes it. `dtype` is "float32" or "bfloat16".

        Raises InputError when the family cannot say what the config holds, so that no fact is lost by saving.
        """
        written = {
            "architectures": [self.architecture],
            "model_type": self.model_types[0],
            **self.config_to_hf(config),
            "vocab_size": config.vocab_size,
            "tie_word_embeddings": config.tie_embeddings,
            "initializer_range": config.initializer_range,
            "use_cache": True,
            "dtype": dtype,
            "bos_token_id": bos_id,
            "eos_token_id": (eos_ids[0] if len(eos_ids) == 1 else list(eos_ids)) if eos_ids else None,
            "pad_token_id": pad_id,
        }
        again = self.config_from_hf(written)
        lost = [f.name for f in fields(config) if getattr(again, f.name) != getattr(config, f.name)]
        if lost:
            raise InputError(f"a {self.name} model cannot have {lost[0]} = {getattr(config, lost[0])!r}")
        return written


_ACTIVATIONS_FROM_HF = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}


class Reader:
    """Typed reading of a config.json. Every error is an InputError that names the key."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; without a default, the key must be there."""
        value = self._config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(f"config.json: {key} is {'missing' if value is None else repr(value)}; a whole number is wanted")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        value = self._config.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
            raise InputError(f"config.json: {key} is {value!r}; a number is wanted")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._config.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise InputError(f"config.json: {key} is {value!r}; true or false is wanted")
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._config.get(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise InputError(f"config.json: {key} is {value!r}; a string is wanted")
        return value

    def activation(self, key: str, default: str) -> Any:
        """The activation under our name."""
        name = self.text(key, default)
        if name not in _ACTIVATIONS_FROM_HF:
            raise InputError(f"config.json: {key} {name!r} is not supported; the supported ones are {', '.join(_ACTIVATIONS_FROM_HF)}")
        return _ACTIVATIONS_FROM_HF[name]

    def refuse(self, key: str, *, unless: Any = False) -> None:
        """Raise when a feature that the decoder does not have is switched on."""
        value = self._config.get(key)
        if value is not None and value != unless:
            raise InputError(f"config.json: {key} = {value!r} is not supported")

    def optional_integer(self, key: str, default: int | None) -> int | None:
        """A whole number, or None where the config says null; `default` where it says nothing."""
        return None if self._config.get(key, default) is None else self.integer(key, default)

    def optional_number(self, key: str, default: float | None) -> float | None:
        """A number above 0, or None where the config says null; `default` where it says nothing."""
        value = self._config.get(key, default)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise InputError(f"config.json: {key} is {value!r}; a number above 0 or null is wanted")
        return float(value)

    def positive(self, key: str, default: float) -> float:
        """A number above 0."""
        value = self.number(key, default)
        if not value > 0:
            raise InputError(f"config.json: {key} is {value}; a number above 0 is wanted")
        return value

    def windows(self, num_layers: int, *, window: int | None, kinds: Sequence[str]) -> tuple[int | None, ...] | None:
        """The window of each layer by `layer_types`, or by `kinds` where the config does not say; None without any window."""
        given = self._config.get("layer_types")
        if isinstance(given, list) and len(given) == num_layers:
            kinds = given
        for kind in kinds:
            if kind not in (SLIDING, FULL):
                raise InputError(f"config.json: layer_types has {str(kind)[:80]!r}; supported are {SLIDING} and {FULL}")
        if window is None or SLIDING not in kinds:
            return None
        return tuple(window if kind == SLIDING else None for kind in kinds)

    def rope(
        self,
        *,
        default_theta: float = 10_000.0,
        theta_key: str = "rope_theta",
        default_share: float = 1.0,
        share_key: str = "partial_rotary_factor",
    ) -> tuple[float, RopeScaling | None, float]:
        """Theta, scaling and rotated share of a head: `rope_parameters` of transformers 5, or the keys of version 4."""
        table = self._config.get("rope_parameters")
        table = table if table is not None else self._config.get("rope_scaling")
        table = {} if table is None else table
        if not isinstance(table, Mapping):
            raise InputError(f"config.json: the rope parameters are {table!r}; an object is wanted")
        if any(isinstance(value, Mapping) for value in table.values()):
            raise InputError("config.json: rope parameters that differ by layer are not supported for this model_type")
        return self.rope_table(table, theta=self.number(theta_key, default_theta), share=self.number(share_key, default_share))

    def rope_table(self, table: Mapping[str, Any], *, theta: float, share: float) -> tuple[float, RopeScaling | None, float]:
        """What one table of rope parameters says; `theta` and `share` where it says nothing of them."""
        inner = Reader(table)
        theta, share = inner.number("rope_theta", theta), inner.number("partial_rotary_factor", share)
        if theta <= 0:
            raise InputError(f"config.json: rope_theta is {theta}; a number above 0 is wanted")
        if not 0 < share <= 1:
            raise InputError(f"config.json: the rotated share of a head is {share}; above 0 and up to 1 is wanted")
        kind = inner.text("rope_type", inner.text("type", "default"))
        if kind == "default":
            return theta, None, share
        if kind not in _ROPE_NEEDS:
            raise InputError(f"config.json: rope_type {kind!r} is not supported; the supported ones are default, {', '.join(_ROPE_NEEDS)}")
        skipped = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        parameters = {key: value for key, value in table.items() if key not in skipped and value is not None}
        if kind in ("llama3", "yarn", "longrope"):
            longest = self.integer("original_max_position_embeddings", self.integer("max_position_embeddings"))
            parameters.setdefault("original_max_position_embeddings", longest)
        for key in _ROPE_NEEDS[kind]:
            if key not in parameters:
                raise InputError(f"config.json: the rope parameters of type {kind!r} lack {key}")
        for key, value in parameters.items():
            numbers = value if key in ("short_factor", "long_factor") and isinstance(value, list) else [value]
            if key != "truncate" and not all(_is_positive(number) for number in numbers):
                raise InputError(f"config.json: rope parameter {key} is {str(value)[:80]}; a number above 0 is wanted")
            if (key in ("short_factor", "long_factor")) != isinstance(value, list):
                raise InputError(f"config.json: rope parameter {key} is {str(value)[:80]}; only long and short factors are lists")
        return theta, RopeScaling(kind=kind, parameters=parameters), share


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12


def rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 reads them."""
    scaling = config.rope_scaling
    table: dict[str, Any] = {"rope_type": "default" if scaling is None else scaling.kind, "rope_theta": config.rope_theta}
    if config.rotary_dim is not None:
        table["partial_rotary_factor"] = _share(config.rotary_dim, config.head_dim)
    return {**table, **({} if scaling is None else scaling.parameters)}


def _share(part: int, whole: int) -> float:
    """The number whose product with `whole` is `part` or a little above: transformers rounds the product down."""
    share = part / whole
    return share if int(whole * share) == part else math.nextafter(share, 2.0)


def rotary_dim(head_dim: int, share: float) -> int | None:
    """`ModelConfig.rotary_dim` for a rotated share of each head."""
    size = int(head_dim * share)
    return None if size == head_dim else size


def layer_types(config: ModelConfig) -> list[str]:
    """Hugging Face's name for each layer's kind of attention."""
    return [FULL if config.window(i) is None else SLIDING for i in range(config.num_layers)]


def one_window(config: ModelConfig) -> int | None:
    """The window of the layers that have one; Hugging Face's configs hold one for all."""
    return next((window for window in config.windows or () if window is not None), None)


def inverse(value: float, exponent: float) -> float:
    """The short decimal that `value` is the power of, for facts that Hugging Face writes as divisors or squares."""
    exact = float(value ** (1 / exponent))
    rounded = round(exact, 9)
    return rounded if rounded > 0 and rounded**exponent == value else exact


def activation_to_hf(name: str) -> str:
    """Our activation's name in Hugging Face's terms."""
    return {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}[name]
