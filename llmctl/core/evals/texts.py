"""Texts to score: files of documents, stdin, and folders of token shards. Knows files and shards; knows no model."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from llmctl.core.config.evaluate import EvaluateConfig
from llmctl.core.data import sources
from llmctl.core.data.shards import STATE_NAME, TokenDataset
from llmctl.core.errors import InputError, UsageError
from llmctl.core.evals.perplexity import Document
from llmctl.core.evals.tokens import Prefix
from llmctl.core.files import MANIFEST_NAME, parse_json
from llmctl.core.tokenizer import Tokenizer

_MAX_LINE_BYTES = 64 << 20
_MAX_TEXT_BYTES = 1 << 30
"""A document is tokenised whole, which takes many times its size in memory."""
_READ_BYTES = 1 << 20
_READ_TOKENS = 1 << 20


class Text(Protocol):
    """One text to score."""

    name: str
    whole_stream: bool

    def documents(self, tokenizer: Tokenizer, *, prefix: Prefix) -> Iterator[Document]:
        """Its documents as tokens, in order. Raises InputError with file and line."""
        ...

    def warnings(self) -> list[str]:
        """What was noticed on the way, once the documents are through."""
        ...


def open_texts(config: EvaluateConfig, *, stdin: IO[bytes] | None) -> list[Text]:
    """The texts that `config` names; a folder with a manifest is taken for token shards. Raises NotFoundError or UsageError."""
    found: list[Text] = []
    if stdin is None and Path(sources.STDIN) in config.texts:
        raise UsageError("stdin is closed, but `-` names it as a text; pipe something in or name a file")
    for path in config.texts:
        if path.is_dir() and ((path / MANIFEST_NAME).exists() or (path / STATE_NAME).exists()):
            found.append(ShardText(path, config))
        else:
            found += [FileText(source, config, stdin=stdin) for source in sources.find_sources([str(path)])]
    return found


class FileText:
    """A file of documents: a whole .txt, or each object of a .jsonl; .gz and .zst too."""

    whole_stream = False

    def __init__(self, source: sources.Source, config: EvaluateConfig, *, stdin: IO[bytes] | None) -> None:
        self.name = source.name
        self._source = source
        self._stdin = stdin
        self._field = config.field
        self._limit = config.limit
        self._num_lost_chars = 0

    def documents(self, tokenizer: Tokenizer, *, prefix: Prefix) -> Iterator[Document]:
        """Each document's tokens behind the prefix. Without one the first token is context only, and its bytes do not count."""
        lengths = tokenizer.token_bytes()
        for number, text in enumerate(self._read()):
            if number == self._limit:
                break
            ids = [*prefix.ids, *tokenizer.encode(text, add_bos=False)]
            num_bytes = len(text.encode("utf-8"))
            if not prefix.ids and ids:
                num_bytes -= int(lengths[ids[0]])
            self._num_lost_chars += tokenizer.count_lost(text)
            yield Document(self.name, ids, num_bytes)

    def _read(self) -> Iterator[str]:
        with sources.OpenSource(self._source, self._stdin) as opened:
            if self._source.format == "text":
                data = bytearray()
                while block := opened.read(_READ_BYTES):
                    data += block
                    if len(data) > _MAX_TEXT_BYTES:
                        raise InputError(f"{self.name}: more than {_MAX_TEXT_BYTES:,} bytes in one document; cut it, or use .jsonl")
                if data.strip():
                    yield self._decode(bytes(data), line=1)
                return
            for line, data_of_line in _lines(opened, self.name):
                row = parse_json(data_of_line, where=f"{self.name}:{line}")
                text = row.get(self._field) if isinstance(row, dict) else None
                if not isinstance(text, str):
                    found = "no JSON object" if not isinstance(row, dict) else f"no text in the field {self._field!r}"
                    hint = f"; its fields are {', '.join(sorted(row))}" if isinstance(row, dict) and self._field not in row else ""
                    raise InputError(f"{self.name}:{line}: {found}; name another with --field{hint}")
                yield self._checked(text, line)

    def _decode(self, data: bytes, *, line: int) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            at = line + data.count(b"\n", 0, error.start)
            raise InputError(f"{self.name}:{at}: not valid UTF-8 at byte {error.start}; convert the file first") from error

    def _checked(self, text: str, line: int) -> str:
        """JSON can spell half a surrogate pair, which is no text."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{self.name}:{line}: half a surrogate pair at character {error.start}; that is not text") from error
        return text

    def warnings(self) -> list[str]:
        """Characters that the tokenizer has no ids for."""
        if not self._num_lost_chars:
            return []
        return [
            f"{self.name}: the tokenizer cannot express {self._num_lost_chars:,} characters; their bytes count, but were not "
            "predicted, so bits per byte are a little too low"
        ]


def _lines(opened: sources.OpenSource, name: str) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, numbered from 1."""
    number, rest = 1, b""
    while block := opened.read(_READ_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if line.strip():
                yield number, line
            number += 1
        if len(rest) > _MAX_LINE_BYTES:
            raise InputError(f"{name}:{number}: a line of more than {_MAX_LINE_BYTES:,} bytes")
    if rest.strip():
        yield number, rest


class ShardText:
    """One split of a packed folder, as a single stream of ids."""

    whole_stream = True

    def __init__(self, path: Path, config: EvaluateConfig) -> None:
        self.name = f"{path} ({config.split})"
        self._dataset = TokenDataset.open(path, "train" if config.split == "train" else "val")
        self._limit = config.limit

    def documents(self, tokenizer: Tokenizer, *, prefix: Prefix) -> Iterator[Document]:
        """The stream, or its first `limit` documents, as one document. Raises InputError for another tokenizer's ids."""
        if self._dataset.tokenizer_fingerprint != tokenizer.fingerprint:
            raise InputError(
                f"{self._dataset.directory}: packed with another tokenizer (fingerprint {self._dataset.tokenizer_fingerprint[:12]}, "
                f"the model's is {tokenizer.fingerprint[:12]}); pack the text again with the model's"
            )
        stream = _Stream(self._dataset, self._num_tokens())
        lengths, num_bytes = tokenizer.token_bytes(), 0
        for start in range(1, len(stream), _READ_TOKENS):
            num_bytes += int(lengths[stream[start : start + _READ_TOKENS]].sum(dtype=np.int64))
        yield Document(self.name, stream, num_bytes)

    def _num_tokens(self) -> int:
        dataset = self._dataset
        if self._limit is None or self._limit >= dataset.num_documents:
            return dataset.num_tokens
        return sum(dataset.document_lengths_at(0, dataset.num_tokens)[: self._limit])

    def warnings(self) -> list[str]:
        """None."""
        return []


class _Stream:
    """The first ids of a data set as a read-only sequence, read when sliced."""

    def __init__(self, dataset: TokenDataset, num_tokens: int) -> None:
        self._dataset = dataset
        self._num_tokens = num_tokens

    def __len__(self) -> int:
        return self._num_tokens

    def __getitem__(self, part: slice) -> "np.ndarray":
        start, stop, _ = part.indices(self._num_tokens)
        return self._dataset.tokens_at(start, stop - start)
