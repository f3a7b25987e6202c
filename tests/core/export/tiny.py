"""A tiny random model with a trained byte-level tokenizer, as transformers writes it."""

from pathlib import Path
from typing import Any

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_TEXT = ["the cat sat on the mat and looked at the moon", "it's 1234 cats; don't count 12 dogs", "a line\n\n  another   line\t end"] * 3


def make_model(
    folder: Path,
    *,
    model_type: str = "llama",
    split: str = "llama3",
    backend: Any = None,
    names: tuple[str, str] = ("<s>", "</s>"),
    **changes: Any,
) -> Path:
    """Write a two-layer model whose rows are whole groups of 32, and its tokenizer (or `backend`), into `folder`."""
    import torch
    import transformers

    begin, end = ("<|endoftext|>", "<|im_end|>") if backend is None else names
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_trained(split) if backend is None else backend, bos_token=begin, eos_token=end
    )
    words.chat_template = TEMPLATE
    settings = {
        "vocab_size": len(words) + 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "initializer_range": 0.1,
    }
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**settings, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def _trained(split: str) -> Any:
    import tokenizers
    from tokenizers import Regex, pre_tokenizers

    from llmctl.core.families.gguf_tokenizer import PRE_TOKENIZERS

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    if split == "gpt2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif split == "spaces":  # nothing that llama.cpp knows
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(" +"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        pattern = PRE_TOKENIZERS["dbrx"].pattern
        assert pattern is not None
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(_TEXT, trainer)
    backend.add_tokens([tokenizers.AddedToken("two words", special=False, normalized=False)])
    return backend
