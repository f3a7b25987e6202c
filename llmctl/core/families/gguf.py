"""Families in GGUF's terms: which architecture is which, and how its tensors differ from ours. No torch, no file.

The conversions are those of llama.cpp's convert_hf_to_gguf.py. Facts are in gguf_facts.py, names in gguf_names.py.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError
from llmctl.core.families import gguf_facts as facts
from llmctl.core.families import gguf_names as names
from llmctl.core.families import gguf_rope as rope
from llmctl.core.families.base import Rule, Shape
from llmctl.core.families.gguf_metadata import Metadata


@dataclass(frozen=True)
class GgufFamily:
    """How an architecture of GGUF maps to a family of ours."""

    architecture: str
    family: str
    config: Callable[[Metadata, Mapping[str, Shape], int], ModelConfig]
    """The facts, from the metadata, the shapes of the file's tensors, and the size of the vocabulary."""
    rules: tuple[Rule, ...]
    own_keys: Callable[[ModelConfig], dict[str, Any]] = facts.no_keys
    """What to write beyond the keys that every architecture has."""
    also: tuple[str, ...] = ()
    """Further families that are written so, and read as `family`."""
    interleaved: bool = False
    """Rows of q and k are reordered so that the two dimensions of a rotary pair lie side by side."""
    norms_hold_one: bool = False
    """The weights of norms have the one added that `ModelConfig.norm_plus_one` leaves to the decoder."""
    holds_windows: bool = False
    """There is a key for sliding windows."""
    head_always: bool = False
    """llama.cpp reads no file without a head, so that a tied one is there as a copy of the embeddings."""

    def norm_shift(self, name: str) -> float:
        """What to take off the decoder's tensor `name`, as the file has it."""
        return 1.0 if self.norms_hold_one and name.endswith("norm.weight") else 0.0

    def reorders(self, name: str) -> bool:
        """Whether the rows of the decoder's tensor `name` are in llama.cpp's order in the file."""
        return self.interleaved and name.rpartition(".")[0].endswith(("attn.q", "attn.k"))

    def keys(self, config: ModelConfig) -> dict[str, Any]:
        """The metadata of the architecture: what `config` reads back."""
        found = {**facts.common_keys(config), **self.own_keys(config), **rope.scaling_keys(config)}
        return {"general.architecture": self.architecture, **{f"{self.architecture}.{key}": value for key, value in found.items()}}

    def as_held(self, config: ModelConfig) -> ModelConfig:
        """`config` as a file can say it: the same model, within a context that may be shorter.

        A window that GGUF has no key for makes no difference within its length, which becomes the context.
        """
        config = rope.as_gguf_has_it(config)
        if config.positions == "sinusoidal":  # a table like any other, but for training
            config = dataclasses.replace(config, positions="learned")
        shortest = min((window for window in config.windows or () if window is not None), default=None)
        if shortest is not None and not self.holds_windows:
            config = dataclasses.replace(config, windows=None, max_positions=min(config.max_positions, shortest))
        return config


_MIXTRAL = "llama with experts"
"""Our key for what llama.cpp calls llama too, and tells by its experts."""

_ALL = (
    GgufFamily("llama", "llama", facts.llama, names.LLAMA, also=("mistral",), interleaved=True),
    GgufFamily("llama", "mixtral", facts.mixtral, names.LLAMA_EXPERTS, facts.experts_keys, interleaved=True),
    GgufFamily("qwen2", "qwen2", facts.qwen2, names.QWEN2),
    GgufFamily("qwen3", "qwen3", facts.qwen3, names.QWEN3),
    GgufFamily("qwen3moe", "qwen3_moe", facts.qwen3_moe, names.QWEN3_MOE, facts.experts_keys),
    GgufFamily("gemma", "gemma", facts.gemma, names.GEMMA, norms_hold_one=True),
    GgufFamily("gemma2", "gemma2", facts.gemma2, names.GEMMA2, facts.gemma2_keys, norms_hold_one=True, holds_windows=True),
    GgufFamily("gemma3", "gemma3", facts.gemma3, names.GEMMA3, facts.gemma3_keys, norms_hold_one=True, holds_windows=True),
    GgufFamily("phi3", "phi3", facts.phi3, names.PHI3, facts.phi3_keys, holds_windows=True),
    GgufFamily("granite", "granite", facts.granite, names.LLAMA, facts.granite_keys, interleaved=True),
    GgufFamily("smollm3", "smollm3", facts.smollm3, names.QWEN2, interleaved=True),
    GgufFamily("olmo2", "olmo2", facts.olmo2, names.OLMO2, head_always=True),
    GgufFamily("gptneox", "gpt_neox", facts.gpt_neox, names.GPT_NEOX, facts.gpt_neox_keys, head_always=True),
    GgufFamily("gpt2", "gpt2", facts.gpt2, names.GPT2),
)
GGUF_FAMILIES = {(_MIXTRAL if family.family == "mixtral" else family.architecture): family for family in _ALL}


def gguf_family(meta: Metadata) -> GgufFamily:
    """The record of an architecture. Raises InputError that lists those that there are."""
    if meta.architecture not in GGUF_FAMILIES or meta.architecture == _MIXTRAL:
        known = ", ".join(sorted({family.architecture for family in _ALL}))
        raise InputError(f"GGUF architecture {meta.architecture[:80]!r} is not supported; the supported ones are {known}")
    has_experts = meta.architecture == "llama" and meta.integer("expert_count", 0) > 0
    return GGUF_FAMILIES[_MIXTRAL if has_experts else meta.architecture]


def family_record(family: str) -> GgufFamily:
    """How GGUF has models of one of our families. Raises InputError that lists those that there are."""
    for record in _ALL:
        if family == record.family or family in record.also:
            return record
    known = ", ".join(name for record in _ALL for name in (record.family, *record.also))
    raise InputError(f"models of the family {family} cannot be written as GGUF; the families that can are {known}")


def halves_from_pairs(array: Any, head_dim: int) -> Any:
    """Undo llama.cpp's reordering of the rows of q or k: pairs side by side become two halves. Works on any array type."""
    rest = array.shape[1:]
    return array.reshape(-1, head_dim // 2, 2, *rest).swapaxes(1, 2).reshape(-1, *rest)


def pairs_from_halves(array: Any, head_dim: int) -> Any:
    """llama.cpp's reordering of the rows of q or k, the inverse of `halves_from_pairs`."""
    rest = array.shape[1:]
    return array.reshape(-1, 2, head_dim // 2, *rest).swapaxes(1, 2).reshape(-1, *rest)
