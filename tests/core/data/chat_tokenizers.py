"""Small real tokenizers for tests of chat data: bytes, a few merges, and the control tokens that are asked for."""

from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from llmctl.core.tokenizer import CHATML_TEMPLATE, Tokenizer

CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = [("h", "e"), ("t", "he"), ("Ġ", "the"), ("i", "n"), ("e", "r"), ("l", "l"), ("Ċ", "Ċ"), ("Ġ", "Ġ")]


def backend(specials: tuple[str, ...]) -> tokenizers.Tokenizer:
    """A byte-level BPE whose special tokens come after the 256 bytes and the merges."""
    vocabulary = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in MERGES:
        vocabulary[left + right] = len(vocabulary)
    result = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return result


def byte_tokenizer(
    specials: tuple[str, ...] = CHATML_TOKENS, *, chat_template: str | None = CHATML_TEMPLATE, bos: str | None = None
) -> Tokenizer:
    """Ours; the first special token is EOS (None without any)."""
    eos = specials[0] if specials else None
    return Tokenizer.from_parts(backend(specials), bos=bos, eos=eos, pad=None, chat_template=chat_template)


def reference_tokenizer(specials: tuple[str, ...] = CHATML_TOKENS, *, chat_template: str | None = CHATML_TEMPLATE) -> Any:
    """The same by transformers."""
    from transformers import PreTrainedTokenizerFast

    result = PreTrainedTokenizerFast(tokenizer_object=backend(specials), eos_token=specials[0])
    result.chat_template = chat_template
    return result
