"""Families of models as data: how Hugging Face writes their config and names their tensors. No torch, no file.

To add one: a module with a `Family`, and a line in `FAMILIES`.
"""

from collections.abc import Mapping
from typing import Any

from llmctl.core.errors import InputError
from llmctl.core.families.base import Family
from llmctl.core.families.gemma import GEMMA, GEMMA2, GEMMA3
from llmctl.core.families.gpt2 import GPT2
from llmctl.core.families.gpt_neox import GPT_NEOX
from llmctl.core.families.granite import GRANITE
from llmctl.core.families.llama import LLAMA
from llmctl.core.families.mistral import MISTRAL, MIXTRAL
from llmctl.core.families.olmo2 import OLMO2
from llmctl.core.families.phi3 import PHI3
from llmctl.core.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from llmctl.core.families.smollm3 import SMOLLM3

__all__ = ["FAMILIES", "Family", "family_named", "family_of", "is_known", "refuse_code"]

_ALL = (
    GPT2,
    GPT_NEOX,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    GEMMA,
    GEMMA2,
    GEMMA3,
    PHI3,
    OLMO2,
    GRANITE,
    SMOLLM3,
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}

_CODE_KEYS = (
    "auto_map",
    "custom_pipelines",
    "trust_remote_code",
    "_attn_implementation_internal",
    "_experts_implementation_internal",
    "use_kernels",
    "kernel_config",
    "hub_kernels",
)
"""Keys by which a config makes transformers fetch or run code: modelling files, pipelines, kernels."""


def is_known(hf_config: Mapping[str, Any]) -> bool:
    """Whether a family reads models of this `model_type`."""
    return any(hf_config.get("model_type") in family.model_types for family in FAMILIES.values())


def refuse_code(hf_config: Mapping[str, Any], *, where: str, deep: bool = False) -> None:
    """Raise InputError for a config that wants code run; `deep` looks into the configs inside it too."""
    for key in _CODE_KEYS:
        if hf_config.get(key):
            raise InputError(f"{where}: {key!r} asks to run code that comes with the model; refused (remove the key if it works without)")
    for value in hf_config.values() if deep else ():
        if isinstance(value, Mapping):
            refuse_code(value, where=where, deep=True)


def family_named(name: str) -> Family:
    """The family called `name`. Raises InputError that lists the names."""
    if name not in FAMILIES:
        raise InputError(f"the model family {name!r} is not known; the families are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(hf_config: Mapping[str, Any], *, where: str = "config.json") -> Family:
    """The family that reads `hf_config`, by its `model_type`. Raises InputError, also for a config that wants code run."""
    for key in _CODE_KEYS:
        if hf_config.get(key):
            raise InputError(f"{where}: {key!r} asks to run code that comes with the model; refused (remove the key if it works without)")
    if hf_config.get("quantization_config"):
        raise InputError(f"{where}: quantization_config: such weights cannot be read yet; take the unquantised model or a GGUF file")
    model_type = hf_config.get("model_type")
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(t for family in FAMILIES.values() for t in family.model_types))
    raise InputError(f"{where}: model_type {model_type!r} is not supported; the supported ones are {known}")
