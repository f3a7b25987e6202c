"""A model that says the alphabet: each letter is followed by the next one, with logits so far apart that any kernel agrees.

Its embeddings are unit vectors, attention and mlp add nothing, and the head maps each token to the one that follows it.
After z, Z and 9 the text ends; after a space, a line break and anything else comes a.
"""

from pathlib import Path

from tests.cli.tiny_model import TEMPLATE, byte_tokenizer

_LOGIT = 60.0
"""The probability of the next token is then 1 in float32, at any temperature that is used."""


def follower(byte: int) -> int | None:
    """The byte that follows, or None for the end of the text."""
    if chr(byte) in "zZ9":
        return None
    return byte + 1 if chr(byte).isascii() and chr(byte).isalnum() else ord("a")


def make_alphabet_model(folder: Path, *, template: bool = False, context: int = 1 << 17) -> Path:
    """Write it into `folder`: one layer, single bytes as tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words, id_of_byte = byte_tokenizer(template=TEMPLATE if template else None)
    hidden_size = 320
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=context,
        bos_token_id=256,
        eos_token_id=256,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, :259] = torch.eye(259)
        for byte, id in id_of_byte.items():
            next_byte = follower(byte)
            # the norm makes a unit vector sqrt(hidden_size) long
            model.lm_head.weight[256 if next_byte is None else id_of_byte[next_byte], id] = _LOGIT / hidden_size**0.5
        for id in (256, 257, 258):
            model.lm_head.weight[id_of_byte[ord("a")], id] = _LOGIT / hidden_size**0.5
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
