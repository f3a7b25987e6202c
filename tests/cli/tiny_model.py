"""A tiny random model directory with a byte-level tokenizer, for tests of commands. Made with transformers, fast to run."""

from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(*, template: str | None = None) -> tuple[Any, dict[int, int]]:
    """transformers' tokenizer over single bytes and three control tokens (256 to 258), and the ids of the ASCII bytes."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    ascii_ids = {byte: backend.token_to_id(backend.pre_tokenizer.pre_tokenize_str(chr(byte))[0][0]) for byte in range(128)}
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    if template is not None:
        words.chat_template = template
    return words, ascii_ids


def make_model(folder: Path, *, template: str | None = None, seed: int = 0, context: int = 256) -> Path:
    """Write a two-layer Llama over single bytes and three control tokens into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words, _ = byte_tokenizer(template=template)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
