"""Token embeddings in the format of word2vec, text and binary, out and in. Knows names and numbers; knows no model.

The format: a line `COUNT SIZE`, then for each word its name, a space and its numbers: as text, split by spaces and ended by a
newline, or as SIZE float32, little endian (https://code.google.com/archive/p/word2vec, distance.c). A name must hold no
white space and must be the only one, or readers (gensim, the original tools) go wrong; `vector_names` sees to both.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmctl.core.errors import InputError, NotFoundError
from llmctl.core.tokenizer.byte_level import byte_to_char

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

MAX_VECTORS = 1 << 24
MAX_SIZE = 1 << 16
MAX_NAME_BYTES = 1 << 16
_TEXT_BYTES = 48
"""The most that a number takes as text."""


def vocabulary(tokenizer: "Tokenizer") -> dict[int, str]:
    """Id -> token as the vocabulary writes it ("Ġthe"), added tokens included, in order of ids."""
    content = json.loads(tokenizer.to_json())
    vocab = content["model"]["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
    tokens = {i: token for token, i in pairs}
    tokens |= {entry["id"]: entry["content"] for entry in content["added_tokens"]}
    return dict(sorted(tokens.items()))


def vector_names(tokenizer: "Tokenizer") -> dict[int, str]:
    """Id -> the name of its vector: the token as the vocabulary writes it, in order of ids.

    Byte-level tokens hold no white space, since their alphabet writes a space as "Ġ" and a newline as "Ċ". Where another
    token does (an added one, SentencePiece's), its white space is written in the same manner, or as "<U+00A0>" beyond
    ASCII; an empty token is "<empty>". When that is the name of another token already, "#ID" is put after it.
    """
    tokens = vocabulary(tokenizer)
    names = {i: token for i, token in tokens.items() if token and not any(c.isspace() for c in token)}
    taken = set(names.values())
    for i, token in tokens.items():
        if i not in names:
            name = "".join(map(_visible, token)) or "<empty>"
            name = name if name not in taken else f"{name}#{i}"
            while name in taken:
                name += "#"
            taken.add(name)
            names[i] = name
    return dict(sorted(names.items()))


def _visible(char: str) -> str:
    if not char.isspace():
        return char
    return byte_to_char()[ord(char)] if ord(char) < 128 else f"<U+{ord(char):04X}>"


def write_vectors(file: IO[bytes], names: Mapping[int, str], table: NDArray[np.float32], *, binary: bool) -> None:
    """Write the rows of `table` (V, C) that have names. Numbers come back bit for bit, from text too."""
    size = table.shape[1]
    row_format = " ".join(["%.9g"] * size)  # nine digits tell any float32 from its neighbours
    file.write(f"{len(names)} {size}\n".encode())
    for i, name in names.items():
        if binary:
            file.write(name.encode() + b" " + table[i].astype("<f4").tobytes() + b"\n")
        else:
            file.write(f"{name} {row_format % tuple(table[i].tolist())}\n".encode())


def read_vectors(path: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(name, numbers (C,) float32) of each word of a file, text or binary, one after the other in bounded memory.

    Which of the two it is shows in the first row. Raises NotFoundError, or InputError that names the row.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below, when the caller has read enough
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    with file:
        count, size = _read_head(file, path)
        start = file.tell()
        first = file.readline(MAX_NAME_BYTES + size * _TEXT_BYTES)
        file.seek(start)
        is_text = _numbers_of(first.rstrip(b"\r\n").partition(b" ")[2], size) is not None
        for row in range(1, count + 1):
            where = f"{path}: row {row:,} of {count:,}"
            name, numbers = _read_text_row(file, size, where) if is_text else _read_binary_row(file, size, where)
            if not np.isfinite(numbers).all():
                raise InputError(f"{where} ({name[:40]!r}) holds a number that is not finite")
            yield name, numbers


def vector_size(path: Path) -> int:
    """The length of the vectors in a file. Raises as `read_vectors` does."""
    for _, numbers in read_vectors(path):
        return len(numbers)
    raise InputError(f"{path}: holds no vectors")


def _read_head(file: IO[bytes], path: Path) -> tuple[int, int]:
    words = file.readline(200).split()
    if len(words) != 2 or not all(word.isdigit() and len(word) < 12 for word in words):
        raise InputError(f"{path}: not in word2vec's format: the first line must be `COUNT SIZE`")
    count, size = map(int, words)
    if not 1 <= count <= MAX_VECTORS or not 1 <= size <= MAX_SIZE:
        raise InputError(f"{path}: {count:,} vectors of {size:,} numbers; at most {MAX_VECTORS:,} of {MAX_SIZE:,} are read")
    return count, size


def _numbers_of(text: bytes, size: int) -> NDArray[np.float32] | None:
    parts = text.split()
    if len(parts) != size:
        return None
    try:
        return np.array([float(part) for part in parts], dtype=np.float32)
    except (ValueError, OverflowError):
        return None


def _read_text_row(file: IO[bytes], size: int, where: str) -> tuple[str, NDArray[np.float32]]:
    line = file.readline(MAX_NAME_BYTES + size * _TEXT_BYTES)
    name, _, rest = line.rstrip(b"\r\n").partition(b" ")
    numbers = _numbers_of(rest, size)
    if not line or numbers is None:
        raise InputError(f"{where}: {'the file ends here' if not line else f'a word and {size} numbers are wanted'}")
    return _decoded(name, where), numbers


def _read_binary_row(file: IO[bytes], size: int, where: str) -> tuple[str, NDArray[np.float32]]:
    name = bytearray()
    while (char := file.read(1)) not in (b" ", b""):
        if char != b"\n" or name:  # the newline after the row before, which some writers leave out
            name += char
        if len(name) > MAX_NAME_BYTES:
            raise InputError(f"{where}: a word of more than {MAX_NAME_BYTES:,} bytes")
    raw = file.read(4 * size)
    if len(raw) < 4 * size:
        raise InputError(f"{where}: the file ends here")
    return _decoded(bytes(name), where), np.frombuffer(raw, dtype="<f4").astype(np.float32)


def _decoded(name: bytes, where: str) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: the word is not UTF-8") from error
