"""Tiny random models of transformers, loaded by us, and a tokenizer whose ids are bytes."""

import codecs
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from llmctl.core.checkpoint import LoadedModel, load_model

VOCAB = 256


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id % 256]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """Id i stands for byte i % 256."""

    def __init__(self, vocab_size: int = VOCAB, special_ids: frozenset[int] = frozenset()) -> None:
        self.vocab_size, self.special_ids = vocab_size, special_ids

    def stream(self) -> _ByteStream:
        return _ByteStream()


def make_theirs(family: str, *, vocab_size: int = VOCAB, seed: int = 0) -> Any:
    """A random model of transformers, with weights large enough that its choices vary."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {"vocab_size": vocab_size, "initializer_range": 0.3}
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=None, **common))
    elif family == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=128, bos_token_id=0, eos_token_id=None, **sizes, **common))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = Qwen3ForCausalLM(Qwen3Config(max_position_embeddings=128, head_dim=8, bos_token_id=0, eos_token_id=None, **sizes, **common))
    return model.eval()


@cache
def pair(family: str, *, vocab_size: int = VOCAB, seed: int = 0) -> tuple[Any, LoadedModel]:
    """The same random model, theirs and ours."""
    theirs = make_theirs(family, vocab_size=vocab_size, seed=seed)
    with TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_model(Path(folder), dtype=torch.float32)
    return theirs, ours
