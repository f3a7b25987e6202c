"""What fine-tuning starts from: the model with its tokenizer and chat template, and the adapters that may go on it. Knows no rows."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from llmctl.core.checkpoint import LoadedModel, check_trainable, load_model, load_tokenizer, resolve_model
from llmctl.core.checkpoint.adapter import adaptable_modules, choose_modules
from llmctl.core.checkpoint.resolve import is_portable
from llmctl.core.config.finetune import FinetuneConfig
from llmctl.core.config.model import ModelConfig
from llmctl.core.data.supervised import default_chat_template, with_template
from llmctl.core.errors import InputError, NotFoundError, UsageError
from llmctl.core.families import family_named
from llmctl.core.model import Decoder
from llmctl.core.model.lora import LoraConfig, num_adapter_parameters
from llmctl.core.tokenizer import Tokenizer

_MAX_TEMPLATE_BYTES = 1 << 20


@dataclass(frozen=True)
class Base:
    """The model to start from, and its tokenizer with the template that conversations go through."""

    loaded: LoadedModel
    architecture: ModelConfig
    """The model's facts, with a vocabulary that has grown if it was to."""
    reference: str
    """The model as --model takes it from anywhere: a hub id, a built-in name, or a whole path."""
    plain: Tokenizer
    chat: Tokenizer
    has_template: bool
    """Whether `chat`'s template is the model's own or was given, rather than a default."""

    @property
    def fingerprint(self) -> str:
        """The weights'."""
        assert self.loaded.fingerprint is not None
        return self.loaded.fingerprint


@dataclass(frozen=True)
class Adapters:
    """What LoRA trains: adapters on the decoder's matrices, which are named group by group."""

    lora: LoraConfig
    groups: list[tuple[str, ...]]
    num_parameters: int

    @property
    def described(self) -> str:
        """For the model card."""
        return f"rank {self.lora.rank}, alpha {self.lora.alpha:g}, {self.num_parameters:,} parameters"

    @classmethod
    def of(cls, config: FinetuneConfig, base: Base) -> "Adapters":
        """Raises InputError for a target that the model does not have."""
        assert config.lora_alpha is not None
        lora = LoraConfig(rank=config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout)
        chosen = choose_modules(adaptable_modules(base.architecture, family_named(base.loaded.family)), config.target_names)
        groups = [tuple(name.removesuffix(".weight") for name in binding.ours) for binding in chosen.values()]
        least = min(min(shape) for binding in chosen.values() for shape in binding.our_shapes)
        if lora.rank > least:
            raise UsageError(f"--lora-rank {lora.rank}: the smallest matrix to adapt has rank {least}; an adapter is to be smaller")
        shapes = [[(shape[0], shape[1]) for shape in binding.our_shapes] for binding in chosen.values()]
        return cls(lora, groups, num_adapter_parameters(shapes, lora.rank))


def open_base(config: FinetuneConfig) -> Base:
    """Open the model and its tokenizer. Raises NotFoundError, InputError, UsageError."""
    assert config.model is not None
    path = resolve_model(config.model)
    check_trainable(path)
    plain = load_tokenizer(path)
    loaded = load_model(path, identify=True)
    reference = config.model if is_portable(config.model, path) else str(path.resolve())
    architecture = loaded.config
    if plain.vocab_size > architecture.vocab_size:
        if not config.resize_vocab:
            raise InputError(
                f"{path}: the tokenizer has {plain.vocab_size:,} ids, the model has {architecture.vocab_size:,} embeddings;"
                " --resize-vocab lets the embeddings grow, if the two belong together"
            )
        architecture = dataclasses.replace(architecture, vocab_size=plain.vocab_size)
    template = _read_template(config.chat_template) if config.chat_template is not None else plain.chat_template
    if template is not None:
        return Base(loaded, architecture, reference, plain, with_template(plain, template), has_template=True)
    if plain.eos_id is None:
        return Base(loaded, architecture, reference, plain, plain, has_template=False)  # conversations will be refused, completions too
    return Base(loaded, architecture, reference, plain, with_template(plain, default_chat_template(plain)), has_template=False)


def _read_template(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(f"--chat-template {path}: no such file") from error
    except OSError as error:
        raise UsageError(f"--chat-template {path}: {error.strerror}") from error
    if len(data) > _MAX_TEMPLATE_BYTES:
        raise InputError(f"--chat-template {path}: {len(data):,} bytes, more than the {_MAX_TEMPLATE_BYTES:,} that a template may have")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--chat-template {path}: not UTF-8 at byte {error.start}") from error


def grown(model: Decoder, architecture: ModelConfig) -> Decoder:
    """`model` with embeddings (and head) for `architecture.vocab_size` ids; new rows are the mean of the old ones.

    The mean keeps what the model says of known ids nearly as it was (Hewitt 2021, "Initializing new word embeddings").
    """
    num_new = architecture.vocab_size - model.config.vocab_size
    if num_new == 0:
        return model
    tensors = dict(model.state_dict())
    for name in ("embed.weight", "head.weight", "head.bias"):
        if name in tensors:
            old = tensors[name]
            tensors[name] = torch.cat([old, old.mean(0, keepdim=True).expand(num_new, *old.shape[1:])])
    with torch.device("meta"):
        result = Decoder(architecture)
    result.load_state_dict(tensors, assign=True)
    return result
