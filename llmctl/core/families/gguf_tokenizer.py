"""The tokenizer inside a GGUF file, rebuilt. Knows GGUF's metadata and `tokenizers`; knows no tensor.

The table of pre-tokenizers is that of llama.cpp's src/llama-vocab.cpp, which names them and holds no rules in the file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmctl.core.errors import InputError
from llmctl.core.families.gguf_sentencepiece import sentencepiece_backend
from llmctl.core.tokenizer import Tokenizer

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_CONTROL, _USER_DEFINED = 3, 4


@dataclass(frozen=True)
class _PreTokenizer:
    """`pattern` None is GPT-2's, which `tokenizers` has built in; `digits` splits off single digits before it."""

    pattern: str | None = None
    digits: bool = False
    normal_form: bool = False
    """Unicode's NFC first."""
    ignore_merges: bool = False
    """A piece that is a token by itself is taken whole."""
    adds_bos: bool = False


_GPT2_LIKE, _SINGLE_DIGITS = _PreTokenizer(), _PreTokenizer(digits=True)
_LLAMA3_LIKE = _PreTokenizer(_LLAMA3, ignore_merges=True, adds_bos=True)
PRE_TOKENIZERS: dict[str, _PreTokenizer] = {
    **dict.fromkeys(("default", "gpt-2", "gpt2", "olmo", "jais", "phi-2", "mpt", "roberta-bpe", "gigachat"), _GPT2_LIKE),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _SINGLE_DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3_LIKE),
    **dict.fromkeys(("dbrx", "smaug-bpe", "gpt-4"), _PreTokenizer(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "hunyuan"), _PreTokenizer(_QWEN2, normal_form=True)),
    "stablelm2": _PreTokenizer(_QWEN2),
}


def tokenizer_from_gguf(metadata: Mapping[str, Any], *, where: str) -> Tokenizer:
    """The tokenizer that `metadata` describes, with its chat template. Raises InputError for a kind that is not supported."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{where}: the tokenizer is of kind {kind!r}; supported are byte-level BPE ('gpt2') and SentencePiece ('llama')")
    tokens = _strings(metadata, "tokenizer.ggml.tokens", where)
    special = {key: _token(metadata, f"tokenizer.ggml.{key}_token_id", tokens, where) for key in ("bos", "eos", "padding")}
    if kind == "llama":
        backend = sentencepiece_backend(metadata, tokens, where=where)
        adds_bos = metadata.get("tokenizer.ggml.add_bos_token", True)
    else:
        name = metadata.get("tokenizer.ggml.pre", "default")
        if name not in PRE_TOKENIZERS:
            raise InputError(f"{where}: the pre-tokenizer {name!r} is not supported; the supported ones are {', '.join(PRE_TOKENIZERS)}")
        rule = PRE_TOKENIZERS[name]
        backend = _byte_level_bpe(tokens, _merges(metadata, where), rule, where)
        adds_bos = metadata.get("tokenizer.ggml.add_bos_token", rule.adds_bos)
    _add_special(backend, tokens, metadata.get("tokenizer.ggml.token_type"))
    _set_post_processor(backend, special["bos"] if adds_bos is True else None, byte_level=kind == "gpt2")
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer.from_parts(
        backend,
        bos=special["bos"],
        eos=special["eos"],
        pad=special["padding"],
        chat_template=template if isinstance(template, str) else None,
        model_max_length=None,
    )


def eos_ids_of(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a text: end of text and, where a chat model has its own, end of turn."""
    found = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    return tuple(dict.fromkeys(value for value in found if isinstance(value, int)))


def _strings(metadata: Mapping[str, Any], key: str, where: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InputError(f"{where}: {key} is missing or not a list of strings")
    return values


def _token(metadata: Mapping[str, Any], key: str, tokens: list[str], where: str) -> str | None:
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < len(tokens):
        raise InputError(f"{where}: {key} is {value!r}; there are {len(tokens)} tokens")
    return tokens[value]


def _merges(metadata: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    pairs = []
    for merge in _strings(metadata, "tokenizer.ggml.merges", where):
        left, space, right = merge[1:].partition(" ")  # a token may begin with a space, but is not empty
        if not space or not right:
            raise InputError(f"{where}: {merge[:40]!r} in tokenizer.ggml.merges is not two tokens")
        pairs.append((merge[0] + left, right))
    return pairs


def _byte_level_bpe(tokens: list[str], pairs: list[tuple[str, str]], rule: _PreTokenizer, where: str) -> Any:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    vocab: dict[str, int] = {}
    for i, token in enumerate(tokens):
        vocab.setdefault(token, i)  # of two equal tokens the first is the one that text gives
    try:
        backend = Backend(models.BPE(vocab=vocab, merges=pairs, fuse_unk=False, byte_fallback=False, ignore_merges=rule.ignore_merges))
    except Exception as error:  # tokenizers raises bare Exception, e.g. for a merge of tokens that the vocabulary lacks
        raise InputError(f"{where}: the tokenizer's merges do not fit its tokens: {error}") from error
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.digits else []
    if rule.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(rule.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    if rule.normal_form:
        backend.normalizer = normalizers.NFC()
    return backend


def _add_special(backend: Any, tokens: list[str], types: Any) -> None:
    """Control tokens are special; user-defined ones are matched whole, where the vocabulary spells them as the file does."""
    from tokenizers import AddedToken

    if not isinstance(types, list) or len(types) != len(tokens):
        return
    named = {kind: [token for token, t in zip(tokens, types, strict=True) if t == kind] for kind in (_CONTROL, _USER_DEFINED)}
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in named[_CONTROL]])
    known = [token for token in named[_USER_DEFINED] if backend.token_to_id(token) is not None]
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in known])


def _set_post_processor(backend: Any, bos: str | None, *, byte_level: bool) -> None:
    from tokenizers import processors

    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)] if byte_level else []
    if bos is not None:
        template = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
        )
        steps.append(template)
    if steps:
        backend.post_processor = processors.Sequence(steps) if len(steps) > 1 else steps[0]
