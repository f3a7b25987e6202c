"""The settings of `llmctl tokenize train`, `encode`, `decode`, `count` and `inspect`. Stdlib only. What pack has too is declared there."""

from dataclasses import dataclass
from pathlib import Path

from llmctl.core.config.fields import check_fields, flag_of, option, option_like, options_of
from llmctl.core.config.pack import PackConfig
from llmctl.core.errors import MissingSettingError, UsageError

_CORPUS, _VOCABULARY = "Corpus", "Vocabulary"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What `llmctl tokenize train` does."""

    inputs: tuple[str, ...] = option_like(PackConfig, "inputs")
    out_dir: Path | None = option(None, "Folder for the tokenizer; made if its parent exists.", "-o", "--output-dir", metavar="DIR")
    overwrite: bool = option(False, "Replace a tokenizer that is in --out-dir already.")
    from_model: str | None = option(
        None,
        "Extend this tokenizer instead (a folder, a tokenizer.json, a model): its ids and merges stay, those learnt from the text"
        " come after them.",
        "--from",
        metavar="REF",
        panel=_VOCABULARY,
    )
    vocab_size: int = option(
        8192, "Number of ids, the 256 bytes and the special tokens included.", minimum=257, maximum=1 << 24, panel=_VOCABULARY
    )
    kind: str = option(
        "bpe", "bpe: byte-pair encoding; word: whole words, and bytes for every other word.", choices=("bpe", "word"), panel=_VOCABULARY
    )
    pattern: str = option(
        "llama3",
        "How text is cut into words first: as for Llama 3 (numbers in threes, line breaks together) or as for GPT-2.",
        choices=("llama3", "gpt2"),
        panel=_VOCABULARY,
    )
    special_token: tuple[str, ...] = option((), "A special token beside <|endoftext|>; repeatable.", metavar="TOKEN", panel=_VOCABULARY)
    chat: bool = option(False, "Add <|im_start|> and <|im_end|> and the ChatML template that uses them.", panel=_VOCABULARY)
    chat_template: Path | None = option(None, "Chat template (jinja2) to save with the tokenizer.", metavar="FILE", panel=_VOCABULARY)
    min_frequency: int = option(2, "How often a pair or a word must occur to get an id.", minimum=1, panel=_VOCABULARY)
    format: str | None = option_like(PackConfig, "format")
    field: str = option_like(PackConfig, "field")
    on_error: str = option_like(PackConfig, "on_error")
    max_line_bytes: int = option_like(PackConfig, "max_line_bytes")
    sample_bytes: int | None = option(
        None,
        "Learn from a random sample of so many bytes where there is more. [default: all the text; 33554432 where tokenizers learns]",
        minimum=1,
        panel=_CORPUS,
    )
    seed: int = option(0, "Seed of the sample.", minimum=0, panel=_CORPUS)
    threads: int | None = option(None, "Threads to use; the result is the same for any number. [default: all cores]", minimum=1)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.inputs:
            raise MissingSettingError("INPUT is missing: name files, folders, patterns, or - for stdin")
        if self.out_dir is None:
            raise MissingSettingError("--out-dir is missing: the folder for the tokenizer")
        if self.from_model is not None:
            for field in options_of(type(self)):
                if field.name in ("kind", "pattern") and getattr(self, field.name) != field.default:
                    raise UsageError(f"{flag_of(field)} does not go with --from: the tokenizer that is extended decides")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """What `llmctl tokenize encode` does."""

    files: tuple[Path, ...] = option((), "Text files; stdin when there is none, or for -.", metavar="FILE...", positional=True)
    tokenizer: str | None = option(None, "A folder, a tokenizer.json, or a model: .gguf file, hub id, built-in name.", metavar="REF")
    allow_special: bool = option_like(PackConfig, "allow_special")
    add_bos: bool = option(False, "Begin each line's ids with BOS.")
    on_error: str = option("stop", "At a line that is not UTF-8: stop, or leave it out and list it.", choices=("stop", "skip"))
    max_line_bytes: int = option(64_000_000, "Longest line, in bytes.", minimum=1024, metavar="N")

    def __post_init__(self) -> None:
        check_fields(self)
        _need_tokenizer(self.tokenizer)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """What `llmctl tokenize decode` does."""

    files: tuple[Path, ...] = option(
        (), "Files of ids as `encode` writes them; stdin when there is none, or for -.", metavar="FILE...", positional=True
    )
    tokenizer: str | None = option_like(EncodeConfig, "tokenizer")
    skip_special: bool = option(False, "Leave special tokens out of the text.")
    on_error: str = option("stop", "At a line that is not ids: stop, or leave it out and list it.", choices=("stop", "skip"))
    max_line_bytes: int = option_like(EncodeConfig, "max_line_bytes")

    def __post_init__(self) -> None:
        check_fields(self)
        _need_tokenizer(self.tokenizer)


@dataclass(frozen=True, kw_only=True)
class CountConfig:
    """What `llmctl tokenize count` does."""

    inputs: tuple[str, ...] = option(
        (), "Files, folders, glob patterns; stdin when there is none, or for -.", positional=True, metavar="INPUT..."
    )
    tokenizer: str | None = option_like(EncodeConfig, "tokenizer")
    format: str | None = option_like(PackConfig, "format")
    field: str = option_like(PackConfig, "field")
    allow_special: bool = option_like(PackConfig, "allow_special")
    on_error: str = option_like(PackConfig, "on_error")
    max_line_bytes: int = option_like(PackConfig, "max_line_bytes")

    def __post_init__(self) -> None:
        check_fields(self)
        _need_tokenizer(self.tokenizer)


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What `llmctl tokenize inspect` does."""

    inputs: tuple[str, ...] = option_like(CountConfig, "inputs")
    tokenizer: tuple[str, ...] = option((), "A folder, a tokenizer.json, or a model; repeatable, to compare.", metavar="REF")
    show_chars: int = option(600, "Characters of the text to show token by token.", minimum=0, metavar="N")
    sample_bytes: int = option(4 << 20, "Look at so much of the text.", minimum=1, metavar="N")
    format: str | None = option_like(PackConfig, "format")
    field: str = option_like(PackConfig, "field")
    max_line_bytes: int = option_like(PackConfig, "max_line_bytes")

    def __post_init__(self) -> None:
        check_fields(self)
        _need_tokenizer(self.tokenizer[0] if self.tokenizer else None)


def _need_tokenizer(reference: str | None) -> None:
    if reference is None:
        raise MissingSettingError("--tokenizer is missing: a folder, a tokenizer.json, or a model; make one with `llmctl tokenize train`")
