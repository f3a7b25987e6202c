"""Files that appear whole or not at all: atomic writes, locks, manifests. Knows paths and bytes; knows no model.

Every file appears by temp file + fsync + rename + fsync of the folder, so a kill or a full disk at any moment leaves
the old file or the new one, never half of one. Temporary names start with `.tmp-`.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from llmctl.core.errors import InputError, LockedError, UsageError, is_write_failure, write_error

TEMP_PREFIX = ".tmp-"
MANIFEST_NAME = "manifest.json"
CARD_NAME = "README.md"
"""The card of a model, as the hub wants it."""
_HASH_BLOCK_BYTES = 1 << 20


def fsync_dir(path: Path) -> None:
    """Make the names in folder `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    """Make the content of `path`, written by somebody else's code, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that becomes `path` when the block ends well, and vanishes when it does not.

    Raises WriteError when the disk is full or fails, UsageError when the folder cannot be written to.
    """
    import tempfile  # here and below, since a start that writes nothing does without, and without random, bz2 and lzma

    path = Path(path)
    temp: str | None = None
    try:
        try:
            fd, temp = tempfile.mkstemp(prefix=TEMP_PREFIX, dir=path.parent)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise _cannot_create(path, error) from error
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            _apply_umask(file.fileno(), path)
            os.fsync(file.fileno())
        os.replace(temp, path)
        temp = None
        fsync_dir(path.parent)
    except OSError as error:
        if is_write_failure(error):
            raise write_error(error, path=path) from error
        raise
    finally:
        if temp is not None:
            with contextlib.suppress(OSError):
                os.unlink(temp)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name of the same suffix, for a writer that opens its file itself; it becomes `path` when the block ends well.

    Raises as `atomic_write` does.
    """
    import tempfile

    path = Path(path)
    temp: Path | None = None
    try:
        try:
            fd, name = tempfile.mkstemp(prefix=TEMP_PREFIX, suffix=path.suffix, dir=path.parent)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise _cannot_create(path, error) from error
        temp = Path(name)
        os.close(fd)
        yield temp
        with open(temp, "rb+") as file:
            _apply_umask(file.fileno(), path)
            os.fsync(file.fileno())
        os.replace(temp, path)
        temp = None
        fsync_dir(path.parent)
    except OSError as error:
        if is_write_failure(error):
            raise write_error(error, path=path) from error
        raise
    finally:
        if temp is not None:
            with contextlib.suppress(OSError):
                os.unlink(temp)


def _cannot_create(path: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot create {path}: {error.strerror}; choose a folder that exists and that you may write to")


def _apply_umask(fd: int, path: Path) -> None:
    """mkstemp makes 0600; give the file what `open` would have given, or the mode of the file it replaces."""
    try:
        mode = os.stat(path).st_mode & 0o777
    except OSError:
        mode = 0o666 & ~_umask()
    os.fchmod(fd, mode)


def _umask() -> int:
    """The mask of this process, which can only be read by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_write(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON with a closing newline, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, *, max_bytes: int = 64 << 20) -> Any:
    """Parse a JSON file that somebody else may have written.

    Raises InputError for anything that is not JSON: bad UTF-8, nesting that is too deep, a file over `max_bytes`.
    """
    try:
        length = os.stat(path).st_size
        if length > max_bytes:
            raise InputError(f"{path} is {length:,} bytes, more than the {max_bytes:,} that such a file may have")
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return parse_json(data, where=str(path))


def read_notes(path: Path) -> dict[str, Any]:
    """The JSON object in a file that one can do without; empty where there is none, or none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def parse_json(data: bytes | str, *, where: str) -> Any:
    """Parse strict JSON (no duplicate keys, no NaN or Infinity). Raises InputError that begins with `where`."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise InputError(f"{where}: the key {key!r} appears twice in one object; keep one of them")
                seen.add(key)
        return result

    def no_constant(name: str) -> Any:
        raise InputError(f"{where}: {name} is not JSON; use a number or null")

    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise InputError(f"{where}: JSON nested too deeply") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise InputError(f"{where}: not valid JSON: {error}") from error


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content, in constant memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


class FileLock:
    """An exclusive `flock` on `path`, held until `release` or the death of the process, so it is never stale.

    Raises LockedError that names the pid and host of the holder.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 256, 0).decode("utf-8", "replace").strip() or "unknown"
            os.close(self._fd)
            raise LockedError(f"{self._path.parent} is in use by another run ({holder}); wait for it or choose another folder") from error
        os.ftruncate(self._fd, 0)
        import socket

        os.pwrite(self._fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Give the lock back. The file stays: removing it would let two runs hold two different locks."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def write_manifest(folder: Path, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write `manifest.json`: the size (bytes) and sha256 of every file below `folder`, and the keys of `extra`.

    Model cards are left out: they are written again when there are scores, and nothing is read from them that counts.
    """
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST_NAME, CARD_NAME)):
        entries[path.relative_to(folder).as_posix()] = {"num_bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_json(folder / MANIFEST_NAME, {**(extra or {}), "files": entries})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The parsed manifest of `folder`. Raises InputError when it is missing or malformed."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise InputError(f"{folder} has no {MANIFEST_NAME}: it is incomplete or not ours")
    manifest: dict[str, Any] = read_json(path)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(v, dict) and "num_bytes" in v and "sha256" in v for v in files.values()):
        raise InputError(f"{path}: not a manifest (no table of files with num_bytes and sha256)")
    return manifest


def check_manifest(folder: Path, *, hashes: bool) -> dict[str, Any]:
    """Compare the files of `folder` with its manifest: sizes always, sha256 when `hashes`.

    Returns the manifest. Raises InputError that names the first file that is missing, of another size, or changed.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / safe_relative(name, where=str(folder / MANIFEST_NAME))
        if not path.is_file():
            raise InputError(f"{path} is missing, but {MANIFEST_NAME} lists it")
        num_bytes = path.stat().st_size
        if num_bytes != entry["num_bytes"]:
            raise InputError(f"{path} has {num_bytes:,} bytes, {MANIFEST_NAME} says {entry['num_bytes']:,}: it was cut or changed")
        if hashes and sha256_file(path) != entry["sha256"]:
            raise InputError(f"{path}: sha256 mismatch with {MANIFEST_NAME}: the content was changed")
    return manifest


def safe_relative(name: Any, *, where: str) -> Path:
    """`name` as a relative path that stays inside its folder. Raises InputError otherwise."""
    bad = not isinstance(name, str) or not name or "\0" in name or "\\" in name or name.startswith("/")
    if bad or ".." in Path(name).parts:
        raise InputError(f"{where}: the file name {name!r} leaves its folder; refused")
    return Path(name)


@contextlib.contextmanager
def atomic_dir(path: Path, *, before_rename: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and is removed when it does not.

    All its files are fsynced, then `before_rename(temp)` runs (a manifest, usually), then the rename, then the fsync of
    the parent. `path` must not exist. Raises WriteError when the disk is full or fails, UsageError when the parent
    cannot be written to.
    """
    import shutil

    path = Path(path)
    temp = path.parent / f"{TEMP_PREFIX}{path.name}-{os.getpid()}"
    try:
        shutil.rmtree(temp, ignore_errors=True)
        try:
            temp.mkdir()
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise _cannot_create(path, error) from error
        yield temp
        mode = 0o666 & ~_umask()
        for file in temp.rglob("*"):
            if file.is_file():
                os.chmod(file, mode)  # safetensors makes its files 0600
                fsync_file(file)
        if before_rename is not None:
            before_rename(temp)
        for folder in [temp, *(p for p in temp.rglob("*") if p.is_dir())]:
            fsync_dir(folder)
        os.rename(temp, path)
        fsync_dir(path.parent)
    except OSError as error:
        if is_write_failure(error):
            raise write_error(error, path=path) from error
        raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed run left half-written in `folder`: only our own `.tmp-` names, never through a link."""
    import shutil

    for path in folder.glob(f"{TEMP_PREFIX}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def check_out_dir(path: Path, *, flag: str = "--out-dir") -> None:
    """Refuse, before any work is done, an output folder that is a file, is `/`, has no parent, or cannot be written to."""
    path = Path(path)
    if path.resolve() == Path("/"):
        raise UsageError(f"{flag} {path}: refusing to write into the root folder")
    if path.exists() and not path.is_dir():
        raise UsageError(f"{flag} {path}: is a file, a folder is wanted")
    place = path if path.exists() else path.parent
    if not place.exists():
        raise UsageError(f"{flag} {path}: its parent folder {place} does not exist; create it first")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"{flag} {path}: {place} is not writable")


def check_out_file(path: Path, *, flag: str = "--output") -> None:
    """Refuse, before any work is done, an output file that is a folder, has no parent, or cannot be written to."""
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{flag} {path}: is a folder, a file is wanted")
    if not path.parent.is_dir():
        raise UsageError(f"{flag} {path}: its parent folder {path.parent} does not exist; create it first")
    target = path if path.exists() else path.parent
    if not os.access(target, os.W_OK):
        raise UsageError(f"{flag} {path}: {target} is not writable")
