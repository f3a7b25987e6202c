"""Tokenizers of every kind in use, small, trained by `tokenizers` itself, as directories that transformers loads."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llmctl.core.tokenizer import Tokenizer, TokenizerTrained, train_tokenizer

ENGLISH = (
    "Once upon a time there lived a king who had three daughters. The youngest was so beautiful that the sun itself, which has "
    "seen so much, wondered whenever it shone upon her face.\n\nI'm sure you're right; we'll see, don't they? It costs $12,345.67!\n"
)
CHINESE = (
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。白日依山尽，黄河入海流。欲穷千里目，更上一层楼。\n"
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。红豆生南国，春来发几枝。愿君多采撷，此物最相思。\n"
)
CODE = 'def f(x: int) -> str:\n\t"""Doc."""\n    if x>=10:\n        return f"{x!r}  # {x**2}"\n    return None\n'
CORPUS = [ENGLISH, CHINESE, CODE] * 4

TEXTS = [
    "",
    " ",
    "Once upon a time",
    "  leading and trailing  ",
    "tabs\tand\r\nlines\n\n\nand \u00a0\u3000\u2003 odd spaces",
    "I'M you're WE'LL don't 'S 's",
    "12345 1 12 123 1234 ½ ² Ⅷ ١٢٣",
    "疑是地上霜。春眠不觉晓,hello世界",
    "日本語のテキスト 한국어 العربية हिन्दी ไทย",
    "🤗👩‍👩‍👧‍👦🏳️‍🌈 ☃",
    "e\u0301 é ﬁ Å İ ß",
    CODE,
    "zero\u200bwidth \ufeff mark \u2028 sep \x00 nul \x7f",
    "a" * 300,
    " " * 100 + "\n" * 20 + "x",
    "<0x0A> ▁under Ġ Ċ ##ing",
]


def trained(**settings: Any) -> Tokenizer:
    """One of ours, trained on CORPUS."""
    *_, last = train_tokenizer(CORPUS, **{"vocab_size": 400, "chat": True, **settings})
    assert isinstance(last, TokenizerTrained)
    return last.tokenizer


def write_kind(folder: Path, kind: str) -> None:
    """Write a tokenizer of `kind` (a name of KINDS) into `folder`, as the hub holds them."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    backend, more = KINDS[kind]()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **more}))


def _llama2() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """SentencePiece-like BPE with byte fallback and BOS, as Llama 2 has it."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False))
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _wordpiece() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    specials = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, backend.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    )
    return backend, {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def _unigram() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """SentencePiece's unigram with NFKC, as T5 has it: it can reach its control tokens from plain text."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=250, special_tokens=specials, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def _words() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Whole words between blanks, which finds `<s>` in its table as any other word."""
    backend = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    return backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _incomplete_bytes() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Byte-level BPE without ids for some bytes, as SmolLM2 has it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False))
    return backend, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}


def _flags_of_the_config() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """BOS asked for in tokenizer_config.json alone, and special tokens that tokenizer.json does not have."""
    backend, _ = _incomplete_bytes()
    return backend, {
        "bos_token": {"__type": "AddedToken", "content": "<bos>", "lstrip": False, "rstrip": False, "normalized": False, "special": True},
        "eos_token": "<|endoftext|>",
        "add_bos_token": True,
        "add_eos_token": False,
        "model_max_length": 512,
        "additional_special_tokens": ["<more>"],
    }


KINDS = {
    "llama2": _llama2,
    "wordpiece": _wordpiece,
    "unigram": _unigram,
    "words": _words,
    "incomplete bytes": _incomplete_bytes,
    "flags of the config": _flags_of_the_config,
}
