"""What is done when nothing was said: the model's recommended sampling, else ours. Knows generation_config.json; no model."""

from collections.abc import Mapping
from typing import Any

from llmctl.core.errors import InputError, UsageError
from llmctl.core.infer.sampler import SamplingParams

TEMPERATURE, TOP_P = 0.8, 0.95
MAX_NEW_TOKENS = 256

_FILTERS = ("temperature", "top_k", "top_p", "min_p")


def recommended(generation: Mapping[str, Any]) -> SamplingParams:
    """The sampling that a generation_config.json asks for; ours where it says nothing about sampling.

    As `transformers` reads it: `do_sample` false, said in so many words, means greedy; where any of temperature, top_k,
    top_p, min_p or `do_sample` true is given, those that are not given are neutral. Raises InputError for nonsense.
    """
    said = {name: generation[name] for name in (*_FILTERS, "repetition_penalty") if generation.get(name) is not None}
    if said.get("top_k") == 0:  # how transformers writes "off"
        del said["top_k"]
    if generation.get("do_sample") is False:
        said["temperature"] = 0.0
    elif generation.get("do_sample") is not True and not any(name in said for name in _FILTERS):
        said |= {"temperature": TEMPERATURE, "top_p": TOP_P}
    try:
        return SamplingParams(**said)
    except UsageError as error:
        raise InputError(f"generation_config.json of the model: {error}; correct the file") from error


def merged(base: SamplingParams, given: Mapping[str, Any]) -> SamplingParams:
    """`base` with the given settings in place of its own. Raises UsageError that names a bad one."""
    unchanged = {name: getattr(base, name) for name in SamplingParams.__dataclass_fields__ if name not in given}
    return SamplingParams(**unchanged, **given)
