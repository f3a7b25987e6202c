"""What packing tells while it is at work. Knows numbers and names; knows no files."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PackPlanned:
    """Before the first byte is read. `num_bytes` of the input's files, None when stdin is among them."""

    num_sources: int
    num_bytes: int | None
    num_workers: int
    split_kind: str
    val_fraction: float
    dtype: str
    vocab_size: int
    num_shards_kept: int
    """Shards that an interrupted run had finished."""


@dataclass(frozen=True)
class PackProgress:
    """After each batch. Counts of documents and ids are of this corpus so far, resumed parts included."""

    num_bytes_done: int
    num_bytes: int | None
    num_documents: int
    num_tokens: int


@dataclass(frozen=True)
class ShardWritten:
    """A shard is on the disk for good."""

    name: str
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True)
class PackWarned:
    """Something that a person should know; packing goes on."""

    message: str


@dataclass(frozen=True)
class SplitSummary:
    """One split. `num_bytes` of text."""

    num_documents: int
    num_tokens: int
    num_bytes: int
    num_shards: int


@dataclass(frozen=True)
class Packed:
    """The folder is complete. `num_special_names` counts names of special tokens found in the text."""

    directory: str
    train: SplitSummary
    val: SplitSummary | None
    num_errors: int
    errors_file: str | None
    num_special_names: int
    quality: dict[str, int]
    """How many documents, or matches, each quality tool changed or left out."""
    encoder: str | None = None
    """"gigatoken" or "tokenizers"; None where nothing had to be encoded."""
    encoder_reason: str | None = None
    """Why it was not gigatoken."""
    num_checked_bytes: int = 0
    """Text that both encoded, and whose ids were found equal."""
    elapsed_s: float = 0.0
    already_complete: bool = False


PackEvent = PackPlanned | PackProgress | ShardWritten | PackWarned | Packed
