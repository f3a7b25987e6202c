"""Models of architectures that no family covers, loaded by transformers itself. Knows their files; knows no decoder's tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmctl.core.checkpoint.folder import and_more
from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError
from llmctl.core.families import refuse_code
from llmctl.core.model.adapted import AdaptedModel, adapted_config
from llmctl.core.tensorfile import TensorFile, weight_files

FALLBACK_POSITIONS = 4096
"""The longest text for an architecture that knows no limit, such as a recurrent one."""
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx", "seq_length", "context_length")


def note_of(raw: Mapping[str, Any]) -> str:
    """What people are told, once, of a model that runs this way."""
    return (
        f"the architecture {raw.get('model_type')!r} is not one of llmctl's own: it runs through transformers, more slowly,"
        " for generate and eval only"
    )


def load_adapted(
    folder: Path, raw: Mapping[str, Any], *, dtype: torch.dtype | None, device: torch.device | str
) -> tuple[AdaptedModel, ModelConfig]:
    """The model in `folder`, whose config.json is `raw`, in eval mode. `dtype` None is as the config says.

    Runs no code that comes with the model and reads no pickle. Raises InputError when transformers does not know the
    architecture or the files do not fit it.
    """
    where = folder / "config.json"
    refuse_code(raw, where=str(where), deep=True)
    if raw.get("quantization_config"):
        raise InputError(f"{where}: quantization_config: such weights cannot be read yet; take the unquantised model or a GGUF file")
    for path in weight_files(folder):  # checks names that leave the folder, and each header
        TensorFile(path)
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its notes would stand among ours
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    inner: Any
    info: dict[str, Any]
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
            raise InputError(f"{where}: model_type {raw.get('model_type')!r} is no causal language model")
        inner, info = transformers.AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            folder,
            config=config,
            dtype="auto" if dtype is None else dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except InputError:
        raise
    except Exception as error:  # transformers raises of every kind for a config or a file it cannot use
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{folder}: transformers cannot load this model ({words[0][:200]})") from error
    for what in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info.get(what) or ())
        if names:
            raise InputError(f"{folder}: tensor {names[0]!r} is {what.removesuffix('_keys')}{and_more(names)}")
    return _adapted(inner.to(device).eval(), config, where=where)


def _adapted(inner: Any, config: Any, *, where: Path) -> tuple[AdaptedModel, ModelConfig]:
    text = config.get_text_config()
    longest = next((value for key in _LENGTH_KEYS if isinstance(value := getattr(text, key, None), int) and value > 0), FALLBACK_POSITIONS)
    embeddings = inner.get_input_embeddings()
    try:
        facts = adapted_config(vocab_size=int(text.vocab_size), hidden_size=int(embeddings.weight.shape[-1]), max_positions=longest)
        with torch.no_grad():
            return AdaptedModel(inner, facts), facts
    except InputError:
        raise
    except Exception as error:  # an architecture that does not run on token ids alone
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{where}: this architecture does not run on text alone ({words[0][:200]})") from error
