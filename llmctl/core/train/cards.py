"""The card that goes with a checkpoint. Knows what a run is about; knows no loop."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmctl import __version__
from llmctl.core.card import CardFacts
from llmctl.core.checkpoint import stated_license
from llmctl.core.config.model import ModelConfig
from llmctl.core.model.facts import num_parameters
from llmctl.core.tokenizer import Tokenizer


def checkpoint_card(
    *,
    run_dir: Path,
    verb: str,
    family: str,
    architecture: ModelConfig,
    tokenizer: Tokenizer,
    data: Mapping[str, str],
    settings: Mapping[str, Any],
    base: Path | None,
    adapter: str | None = None,
) -> CardFacts:
    """What a checkpoint's README.md says: the same at every step, so that saves stay reproducible.

    `data` are names and hashes of what it is trained on, `base` the model that it started from, `adapter` what is said of
    adapters on it. Scores come later (outputs.write_scores): a checkpoint is saved before it is evaluated.
    """
    return CardFacts(
        name=run_dir.resolve().name,
        family=family,
        num_parameters=num_parameters(architecture).total,
        num_format="float32",
        architecture={
            "layers": architecture.num_layers,
            "hidden_size": architecture.hidden_size,
            "vocabulary": architecture.vocab_size,
        },
        tokenizer_fingerprint=tokenizer.fingerprint,
        parent=None if base is None else base.stem if base.suffix == ".gguf" else base.resolve().name,
        license=None if base is None else stated_license(base),
        data=data,
        recipe={name: value for name, value in settings.items() if value is not None},
        versions={"llmctl": __version__, "torch": torch.__version__, "python": platform.python_version()},
        made_by=f"A checkpoint of `llmctl {verb}`.",
        adapter=adapter,
    )
