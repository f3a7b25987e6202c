"""What a family is: a config read both ways, and rules that name and reshape its tensors, used both ways. No torch.

The transforms work on numpy arrays and on torch tensors alike: they slice, transpose and join, no more.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmctl.core.config.model import ModelConfig, RopeScaling
from llmctl.core.errors import InputError

Shape = tuple[int, ...]
LAYER = "{i}"


@dataclass(frozen=True)
class Rule:
    """One tensor of a checkpoint, `theirs`, and the decoder's tensors that it holds, `ours`; `{i}` stands for the layer.

    Several of `ours` are joined along their first dimension. `transposed` says that the checkpoint stores the matrix as
    (inputs, outputs), as GPT-2's Conv1D does.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Shape of the checkpoint's tensor, from those of ours."""
        joined = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return joined[::-1] if self.transposed else joined

    def to_ours(self, array: Any, shapes: Sequence[Shape]) -> list[Any]:
        """Take the checkpoint's tensor apart. `shapes` are those of ours; the results are views where they can be."""
        array = array.T if self.transposed else array
        if len(shapes) == 1:
            return [array]
        parts, start = [], 0
        for shape in shapes:
            parts.append(array[start : start + shape[0]])
            start += shape[0]
        return parts

    def to_theirs(self, arrays: Sequence[Any]) -> Any:
        """Put ours together again. The inverse of `to_ours`, bit for bit."""
        joined = arrays[0] if len(arrays) == 1 else _concatenate(arrays)
        return joined.T if self.transposed else joined


def _concatenate(arrays: Sequence[Any]) -> Any:
    import numpy as np

    if isinstance(arrays[0], np.ndarray):
        return np.concatenate(arrays)
    import torch

    return torch.cat(list(arrays))


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
            ours = tuple(name.replace(LAYER, str(i)) for name in rule.ours)
            if all(name in shapes for name in ours):
                covered.update(ours)
                yield Binding(rule, rule.theirs.replace(LAYER, str(i)), ours, tuple(shapes[name] for name in ours))
    left = [name for name in shapes if name not in covered]
    if left:
        raise LookupError(f"there is no name for {', '.join(left[:5])}")


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
        return bind(self.rules, config.num_layers, shapes)

    def write_config(
        self, config: ModelConfig, *, dtype: str, bos_id: int | None, eos_ids: Sequence[int], pad_id: int | None
    ) -> dict[str, Any]:
        """The whole of config.json, as transformers 5 writes it. `dtype` is "float32" or "bfloat16"."""
        return {
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

    def rope(self, *, default_theta: float = 10_000.0) -> tuple[float, RopeScaling | None, float]:
        """Theta, scaling and rotated share of a head: `rope_parameters` of transformers 5, or the keys of version 4."""
        table = self._config.get("rope_parameters")
        table = table if table is not None else self._config.get("rope_scaling")
        table = {} if table is None else table
        if not isinstance(table, Mapping):
            raise InputError(f"config.json: the rope parameters are {table!r}; an object is wanted")
        if any(isinstance(value, Mapping) for value in table.values()):
            raise InputError("config.json: rope parameters that differ by layer are not supported for this model_type")
        inner = Reader(table)
        theta = inner.number("rope_theta", self.number("rope_theta", default_theta))
        if theta <= 0:
            raise InputError(f"config.json: rope_theta is {theta}; a number above 0 is wanted")
        share = inner.number("partial_rotary_factor", self.number("partial_rotary_factor", 1.0))
        kind = inner.text("rope_type", inner.text("type", "default"))
        if kind == "default":
            return theta, None, share
        if kind not in _ROPE_NEEDS:
            raise InputError(f"config.json: rope_type {kind!r} is not supported; the supported ones are default, {', '.join(_ROPE_NEEDS)}")
        skipped = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        parameters = {key: value for key, value in table.items() if key not in skipped and value is not None}
        if kind in ("llama3", "yarn"):
            parameters.setdefault("original_max_position_embeddings", self.integer("max_position_embeddings"))
        for key in _ROPE_NEEDS[kind]:
            if key not in parameters:
                raise InputError(f"config.json: the rope parameters of type {kind!r} lack {key}")
        for key, value in parameters.items():
            if key != "truncate" and not (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12):
                raise InputError(f"config.json: rope parameter {key} is {value!r}; a number above 0 is wanted")
        return theta, RopeScaling(kind=kind, parameters=parameters), share


def rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 reads them."""
    scaling = config.rope_scaling
    table: dict[str, Any] = {"rope_type": "default" if scaling is None else scaling.kind, "rope_theta": config.rope_theta}
    return {**table, **({} if scaling is None else scaling.parameters)}


def activation_to_hf(name: str) -> str:
    """Our activation's name in Hugging Face's terms."""
    return {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}[name]
