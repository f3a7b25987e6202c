"""Reading safetensors files of unknown origin: headers checked, tensors mapped. Knows bytes; knows no model, no torch.

The format (https://huggingface.co/docs/safetensors): 8 bytes of header length, little endian, a JSON header, the data.
The header is read by us rather than by the safetensors package because the package accepts a name given twice and keeps
the last, and allocates up to 100 MB for a header before it looks at it.
"""

import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.core.errors import InputError, NotFoundError
from llmctl.core.files import parse_json, read_json, safe_relative

MAX_HEADER_BYTES = 16 << 20
"""About 130,000 tensors. A header is parsed into some five times its size of objects."""
MAX_DIMENSIONS = 8
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FIELDS = {"dtype", "shape", "data_offsets"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".h5", ".msgpack")


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its dtype in the format's terms ("F32", "BF16", ...), shape, and bytes of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte from the start of the file."""
    num_bytes: int


class TensorFile:
    """One checked and mapped safetensors file. The mapping is private: who writes to it changes a copy, not the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            self.entries, self.metadata = _read_header(file, path, file_bytes)
            self.buffer = mmap.mmap(file.fileno(), file_bytes, access=mmap.ACCESS_COPY)

    def forget(self, entry: TensorEntry) -> None:
        """Give the memory of a tensor's pages back: what was read of them is not needed again, or comes from the file."""
        page = mmap.PAGESIZE
        start, end = -(-entry.start // page) * page, (entry.start + entry.num_bytes) // page * page
        if hasattr(mmap, "MADV_DONTNEED") and end > start:
            self.buffer.madvise(mmap.MADV_DONTNEED, start, end - start)


def open_regular(path: Path) -> Any:
    """Open a file for reading bytes. Raises NotFoundError when it is missing, InputError when it is no regular file."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{path} is not a regular file")
        return open(path, "rb")
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _read_header(file: Any, path: Path, file_bytes: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise InputError(f"{path}: {file_bytes} bytes are too few for a safetensors file")
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes < 2 or header_bytes > file_bytes - 8:
        raise InputError(f"{path}: the header claims {header_bytes:,} bytes in a file of {file_bytes:,}: not safetensors, or cut off")
    if header_bytes > MAX_HEADER_BYTES:
        raise InputError(f"{path}: a header of {header_bytes:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
    header = parse_json(file.read(header_bytes).rstrip(b" "), where=f"{path}: header")
    if not isinstance(header, dict):
        raise InputError(f"{path}: the header is not a JSON object")
    data_bytes = file_bytes - 8 - header_bytes
    entries = {
        name: _read_entry(path, name, fields, 8 + header_bytes, data_bytes) for name, fields in header.items() if name != "__metadata__"
    }
    _check_cover(path, entries, 8 + header_bytes, file_bytes)
    notes = header.get("__metadata__")
    return entries, {key: text for key, text in notes.items() if isinstance(text, str)} if isinstance(notes, dict) else {}


def _read_entry(path: Path, name: str, fields: Any, data_start: int, data_bytes: int) -> TensorEntry:
    def bad(what: str) -> InputError:
        return InputError(f"{path}: tensor {name!r}: {what}")

    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        raise bad("the header must give dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise bad(f"dtype {dtype!r} is not supported; the supported ones are {', '.join(DTYPE_BYTES)}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise bad(f"{shape!r} is not a shape of at most {MAX_DIMENSIONS} dimensions")
    if not _are_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_bytes:
        raise bad(f"its bytes {offsets!r} do not lie within the {data_bytes:,} of the data")
    num_bytes = DTYPE_BYTES[dtype]
    for dimension in shape:  # Python's integers do not overflow
        num_bytes *= dimension
    if num_bytes != offsets[1] - offsets[0]:
        raise bad(f"{dtype} of shape {shape} takes {num_bytes:,} bytes, the header gives it {offsets[1] - offsets[0]:,}")
    return TensorEntry(name, dtype, tuple(shape), data_start + offsets[0], num_bytes)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 62 for number in value)  # a bool is another type


def _check_cover(path: Path, entries: dict[str, TensorEntry], data_start: int, file_bytes: int) -> None:
    """The tensors must lie side by side, without overlap, hole or bytes left over, as the format demands."""
    end = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.num_bytes)):
        if entry.start != end:
            raise InputError(
                f"{path}: tensor {entry.name!r} {'overlaps the one before' if entry.start < end else 'leaves a hole before it'}"
            )
        end = entry.start + entry.num_bytes
    if end != file_bytes:
        raise InputError(f"{path}: {file_bytes - end:,} bytes after the last tensor")


def weight_files(folder: Path) -> dict[Path, frozenset[str] | None]:
    """The weight files of a model directory, each with the tensors that its index puts there, or None without an index.

    Raises InputError for names that leave the folder, for files that the index names and that are not there, and for a folder
    whose only weights are pickles; NotFoundError for one without weights.
    """
    single, index_path = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.is_file():
        return {inside(folder, SINGLE_NAME, where=str(folder)): None}
    if index_path.is_file():
        index = read_json(inside(folder, INDEX_NAME, where=str(folder)))
        table = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(table, dict) or not table:
            raise InputError(f"{index_path}: no weight_map (a table of tensor names and file names)")
        shards: dict[str, set[str]] = {}
        for tensor, name in table.items():
            shards.setdefault(name if isinstance(name, str) else repr(name), set()).add(tensor)
        result: dict[Path, frozenset[str] | None] = {}
        for name, tensors in shards.items():
            if not name.endswith(".safetensors"):
                raise InputError(f"{index_path}: {name!r} is not a .safetensors file; refused")
            path = inside(folder, name, where=str(index_path))
            if path in result:
                raise InputError(f"{index_path}: {name!r} names a file that another name stands for too")
            result[path] = frozenset(tensors)
        for path in result:
            if not path.is_file():
                raise InputError(f"{path}: no such file, but {index_path.name} names it; download the model again")
        return result
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES) if folder.is_dir() else []
    if pickles:
        raise InputError(f"{folder / pickles[0]}: pickle refused, since reading one can run any code; a {SINGLE_NAME} is wanted")
    raise NotFoundError(f"{folder}: no {SINGLE_NAME} in this folder")


def inside(folder: Path, name: str, *, where: str) -> Path:
    """The path of `name` in `folder`. Raises InputError when it leaves the folder, by its text or by a link.

    A file of the hub's cache is a link into the `blobs` folder beside `snapshots`, and allowed.
    """
    path = folder / safe_relative(name, where=where)
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    target = path.resolve()
    if not any(target.is_relative_to(place) for place in allowed):
        raise InputError(f"{where}: {name!r} is a link that leaves the folder (to {target}); refused")
    return path
