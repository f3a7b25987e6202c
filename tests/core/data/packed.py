"""Builds a packed folder by hand, so that shards and loader are tested without the packer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmctl.core.data.shards import MANIFEST_KIND, ShardWriter, id_dtype, shard_name
from llmctl.core.files import write_manifest

FINGERPRINT = "ab" * 32


def write_packed(directory: Path, documents: Sequence[Sequence[int]], *, vocab_size: int = 1000, shard_tokens: int = 64) -> list[int]:
    """A train split of `documents` cut into shards of `shard_tokens`; returns the whole stream."""
    directory.mkdir()
    stream = [i for document in documents for i in document]
    ends = set(np.cumsum([len(d) for d in documents]).tolist())
    names = []
    for index, start in enumerate(range(0, len(stream), shard_tokens)):
        names.append(shard_name("train", index))
        writer = ShardWriter(directory / names[-1], vocab_size=vocab_size, fingerprint=FINGERPRINT)
        for position in range(start, min(start + shard_tokens, len(stream))):
            writer.write(np.array([stream[position]]))
            if position + 1 in ends:
                writer.end_document()
        writer.finish()
    train = {"shards": names, "num_tokens": len(stream), "num_documents": len(documents), "num_bytes": 4 * len(stream)}
    write_manifest(
        directory,
        extra={
            "kind": MANIFEST_KIND,
            "dtype": id_dtype(vocab_size).name,
            "vocab_size": vocab_size,
            "tokenizer_fingerprint": FINGERPRINT,
            "splits": {"train": train},
        },
    )
    return stream
