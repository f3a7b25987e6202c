"""Settings of `llmctl tokenize pack` and `llmctl tokenize verify`."""

from dataclasses import dataclass
from pathlib import Path

from llmctl.core.config.fields import check_fields, option, shard_of
from llmctl.core.errors import MissingSettingError, UsageError

_INPUT, _SPLIT, _OUTPUT, _QUALITY = "Input", "Validation split", "Output", "Quality"


@dataclass(frozen=True)
class PackConfig:
    """What to pack, with which tokenizer, into which folder."""

    inputs: tuple[str, ...] = option((), "Files, folders, glob patterns, or - for stdin.", positional=True, metavar="INPUT")
    tokenizer: str | None = option(None, "A folder, a tokenizer.json, or a model: .gguf file, hub id, built-in name.", metavar="REF")
    out_dir: Path | None = option(None, "Folder for the shards; made if its parent exists.", "-o", "--output-dir", metavar="DIR")
    format: str | None = option(
        None,
        "How the input falls into documents: text (a file each), lines (a line each), paragraphs (blank lines between), jsonl. "
        "[default: by file name]",
        choices=("text", "lines", "paragraphs", "jsonl"),
        panel=_INPUT,
    )
    field: str = option("text", "Field of a JSON record that holds its text.", panel=_INPUT, metavar="NAME")
    separator: str | None = option(
        None, "A line that is exactly this ends a document of a text file, for instance '<|endoftext|>'.", panel=_INPUT, metavar="LINE"
    )
    allow_special: bool = option(False, "Turn special tokens' names in the text into those tokens.", panel=_INPUT)
    add_bos: bool | None = option(None, "Begin each document with BOS. [default: as the tokenizer does]", panel=_INPUT)
    on_error: str = option(
        "stop", "What to do with a record that cannot be read: stop, or skip it and list it.", choices=("stop", "skip"), panel=_INPUT
    )
    max_line_bytes: int = option(64_000_000, "Longest line or uncut document, in bytes.", minimum=1024, panel=_INPUT, metavar="N")
    val_fraction: float | None = option(
        None,
        "Part held out for validation; 0 for none. [default: 0.01 of the documents, 0.1 of a tail]",
        minimum=0,
        below=1,
        panel=_SPLIT,
        metavar="X",
    )
    val_by: str | None = option(
        None,
        "Hold out documents by a hash of their content, or the tail of each. [default: tail if the input is one text file, else hash]",
        choices=("hash", "tail"),
        panel=_SPLIT,
    )
    val_data: tuple[str, ...] = option(
        (), "Input that is validation as a whole; then nothing else is held out.", panel=_SPLIT, metavar="INPUT"
    )
    split_seed: int = option(0, "Key of the hash that holds documents out.", minimum=0, panel=_SPLIT, metavar="N")
    shard_tokens: int = option(1 << 25, "Ids in a full shard.", minimum=16, maximum=1 << 40, panel=_OUTPUT, metavar="N")
    workers: int | None = option(
        None,
        "Threads or processes that encode; the result is the same for any number. [default: by cores and input]",
        minimum=1,
        maximum=1024,
        metavar="N",
    )
    encoder: str = option(
        "auto",
        "auto: gigatoken where its ids are proven equal to those of tokenizers on a sample as it goes, else tokenizers.",
        choices=("auto", "tokenizers"),
    )
    normalize: str | None = option(
        None, "Repair text: Unicode's composed form (NFC), or what ftfy mends (an extra).", choices=("nfc", "ftfy"), panel=_QUALITY
    )
    min_chars: int | None = option(None, "Leave out documents with fewer characters.", minimum=1, panel=_QUALITY, metavar="N")
    max_chars: int | None = option(None, "Leave out documents with more characters.", minimum=1, panel=_QUALITY, metavar="N")
    script: tuple[str, ...] = option(
        (),
        "Keep documents most of whose letters are of this script (Latin, Cyrillic, CJK, ...); repeatable.",
        panel=_QUALITY,
        metavar="NAME",
    )
    redact: Path | None = option(
        None, "TOML file of names and regular expressions; what matches becomes [NAME].", panel=_QUALITY, metavar="FILE"
    )
    dedupe: str | None = option(
        None, "Leave out documents that came before: to the byte, or nearly (MinHash; an extra).", choices=("exact", "near"), panel=_QUALITY
    )
    decontaminate: tuple[str, ...] = option(
        (),
        "Leave out documents that share 13 words in a row with an evaluation set: tasks of `llmctl eval` by name, or files (.jsonl or"
        " text), with commas between; repeatable.",
        panel=_QUALITY,
        metavar="TASK,FILE",
    )
    eval_data: Path | None = option(
        None, "Folder of the data of the tasks that --decontaminate names, as --data of `llmctl eval`.", panel=_QUALITY, metavar="DIR"
    )
    shard: str | None = option(
        None,
        "Pack part I of N, on one of N machines; `llmctl tokenize merge` joins the parts into what one would have packed.",
        panel=_INPUT,
        metavar="I/N",
    )
    overwrite: bool = option(False, "Replace what an earlier, different packing left in the folder.", panel=_OUTPUT)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.inputs:
            raise MissingSettingError("INPUT is missing: name files, folders, patterns, or - for stdin")
        if self.tokenizer is None:
            raise MissingSettingError("--tokenizer is missing: a model folder or a tokenizer.json; make one with `llmctl tokenize train`")
        if self.out_dir is None:
            raise MissingSettingError("--out-dir is missing: the folder for the token shards")
        _ = self.shard_numbers
        if self.min_chars is not None and self.max_chars is not None and self.min_chars > self.max_chars:
            raise UsageError(f"--min-chars {self.min_chars} is more than --max-chars {self.max_chars}")
        if self.separator is not None:
            if self.format not in (None, "text"):
                raise UsageError(f"--separator goes with --format text, not with --format {self.format}")
            if not self.separator.strip() or "\n" in self.separator:
                raise UsageError(
                    "--separator: one line that is not blank is wanted; for blank lines between documents use --format paragraphs"
                )
        if self.val_data and (self.val_fraction or self.val_by):
            raise UsageError("--val-data names the validation text, so --val-fraction and --val-by cannot be given too")
        if self.val_by == "tail" and self.val_fraction == 0:
            raise UsageError("--val-by tail needs a --val-fraction above 0")

    @property
    def shard_numbers(self) -> tuple[int, int] | None:
        """--shard I/N as (I - 1, N)."""
        if self.shard is None:
            return None
        number, count = shard_of(self.shard)
        return number - 1, count


@dataclass(frozen=True)
class MergeConfig:
    """Which packed folders to join."""

    directories: tuple[Path, ...] = option((), "Folders that `llmctl tokenize pack` wrote.", positional=True, metavar="DIR...")
    out_dir: Path | None = option(None, "Folder to make.", "-o", "--output-dir", metavar="DIR")

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.directories:
            raise UsageError("DIR is missing: the packed folders to join")
        if self.out_dir is None:
            raise UsageError("--out-dir is missing: the folder to make")


@dataclass(frozen=True)
class VerifyConfig:
    """Which packed folder to check."""

    directory: Path | None = option(None, "Folder that `llmctl tokenize pack` wrote.", positional=True, metavar="DIR")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.directory is None:
            raise MissingSettingError("DIR is missing: the packed folder to check")
