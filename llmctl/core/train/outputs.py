"""What a checkpoint holds of a model, written and read back: the whole of it, or an adapter. Knows directories; knows no loop."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llmctl.core.card import CardFacts, model_card
from llmctl.core.checkpoint import load_model, save_adapter, save_model
from llmctl.core.checkpoint.adapter import adaptable_modules, choose_modules, our_arrays, read_adapter
from llmctl.core.checkpoint.save import names_in_share
from llmctl.core.config.model import ModelConfig
from llmctl.core.families import family_named
from llmctl.core.families.base import Binding
from llmctl.core.files import CARD_NAME, read_manifest, write_text
from llmctl.core.model.lora import A_NAME, B_NAME, LoraConfig, adapter_tensors
from llmctl.core.tokenizer import Tokenizer


class Output(Protocol):
    """The model's part of a checkpoint."""

    @property
    def holds_frozen(self) -> bool:
        """Whether what is not trained is written too."""
        ...

    def write(self, folder: Path, tensors: Mapping[str, Tensor], share: tuple[int, int] = (0, 1)) -> None:
        """Write it into `folder`, which exists, from float32 tensors by decoder name; several ranks each a `share` (see save_model)."""
        ...

    def names_of(self, share: tuple[int, int]) -> Collection[str]:
        """The tensors that `write` looks into with such a `share`; of the others it wants the shapes."""
        ...

    def read(self, folder: Path) -> Mapping[str, Tensor]:
        """Read back, by decoder name, at least what is trained."""
        ...

    @property
    def card(self) -> CardFacts:
        """What the card of it says, scores apart."""
        ...


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """A model directory, in float32."""

    config: ModelConfig
    family: str
    tokenizer: Tokenizer
    generation: Mapping[str, Any]
    card: CardFacts
    holds_frozen = True

    def write(self, folder: Path, tensors: Mapping[str, Tensor], share: tuple[int, int] = (0, 1)) -> None:
        """See Output."""
        save_model(
            folder,
            config=self.config,
            family=self.family,
            tensors=tensors,
            dtype=torch.float32,
            tokenizer=self.tokenizer,
            generation=self.generation,
            share=share,
        )
        if share[0] == 0:
            write_text(folder / CARD_NAME, model_card(self.card))

    def names_of(self, share: tuple[int, int]) -> Collection[str]:
        """See Output."""
        return names_in_share(self.config, self.family, share, dtype=torch.float32)

    def read(self, folder: Path) -> Mapping[str, Tensor]:
        """See Output."""
        return load_model(folder, dtype=torch.float32).model.state_dict()


@dataclass(frozen=True, kw_only=True)
class AdapterOnly:
    """An adapter's directory; `base` is the model's name as --model takes it, with the fingerprint of its weights."""

    config: ModelConfig
    family: str
    lora: LoraConfig
    targets: Sequence[str]
    base: str
    fingerprint: str
    tokenizer: Tokenizer
    generation: Mapping[str, Any]
    card: CardFacts
    holds_frozen = False

    def write(self, folder: Path, tensors: Mapping[str, Tensor], share: tuple[int, int] = (0, 1)) -> None:
        """See Output."""
        if share[0]:
            return
        save_adapter(
            folder,
            config=self.config,
            family=self.family,
            tensors=adapter_tensors(tensors),
            lora=self.lora,
            targets=self.targets,
            base=self.base,
            fingerprint=self.fingerprint,
            tokenizer=self.tokenizer,
            generation=self.generation,
        )
        write_text(folder / CARD_NAME, model_card(self.card))

    def names_of(self, share: tuple[int, int]) -> Collection[str]:
        """See Output. An adapter is small: rank 0 writes all of it."""
        names = (name for module in self._chosen.values() for name in module.ours)
        return () if share[0] else {f"{name.removesuffix('.weight')}.{part}" for name in names for part in (A_NAME, B_NAME)}

    @property
    def _chosen(self) -> dict[str, Binding]:
        return choose_modules(adaptable_modules(self.config, family_named(self.family)), self.targets)

    def read(self, folder: Path) -> Mapping[str, Tensor]:
        """See Output."""
        arrays = our_arrays(self._chosen, read_adapter(folder, self.config, family_named(self.family)))
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def write_scores(checkpoint: Path, output: Output, scores: Mapping[str, float], *, folder: Path | None = None) -> None:
    """Put scores into the card of a checkpoint, or of the model in `folder` of it. Raises WriteError.

    Whether a checkpoint is whole does not hang on its card; one of before that was so is left alone.
    """
    folder = checkpoint if folder is None else folder
    if (folder / CARD_NAME).relative_to(checkpoint).as_posix() not in read_manifest(checkpoint)["files"]:
        write_text(folder / CARD_NAME, model_card(dataclasses.replace(output.card, scores=scores)))
