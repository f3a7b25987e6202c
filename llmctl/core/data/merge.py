"""Packed folders joined into one, shard after shard, checked while they are copied. Knows manifests and files; knows no ids."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl import __version__
from llmctl.core.data.shards import MANIFEST_KIND, TOKENIZER_DIR, read_pack_manifest, shard_name
from llmctl.core.errors import InputError, Interrupted, UsageError
from llmctl.core.files import MANIFEST_NAME, atomic_dir, check_out_dir, safe_relative, write_json

ERRORS_NAME = "errors.jsonl"
_SPLITS = ("train", "val")
_ALIKE = {"tokenizer_fingerprint": "tokenizer", "dtype": "dtype", "vocab_size": "vocabulary size", "eos_id": "end-of-text id"}
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class MergeProgress:
    """Bytes copied so far."""

    num_bytes_done: int
    num_bytes: int


@dataclass(frozen=True)
class Merged:
    """The folder is complete."""

    directory: str
    num_folders: int
    num_shards: int
    num_tokens: int
    num_documents: int
    num_bytes: int
    num_errors: int


def merge(folders: Sequence[Path], out_dir: Path, *, stop: Callable[[], int | None] = lambda: None) -> Iterator[MergeProgress | Merged]:
    """Join packed folders into `out_dir`, which must not exist, as events that end with Merged.

    Parts of one packing (`--shard I/N`) are put in their order, and all must be there; other folders come in the order
    given. The folder appears whole or not at all. Raises UsageError, NotFoundError, InputError (folders that do not belong
    together; a damaged file), WriteError, Interrupted.
    """
    check_out_dir(out_dir)
    if out_dir.exists():
        raise UsageError(f"--out-dir {out_dir}: is there already; name a folder that is not")
    found = _in_order([(folder, read_pack_manifest(folder)) for folder in folders])
    first_folder, first = found[0]
    for folder, manifest in found[1:]:
        for key, what in _ALIKE.items():
            if manifest.get(key) != first.get(key):
                raise InputError(
                    f"{folder}: its {what} is {manifest.get(key)}, that of {first_folder} is {first.get(key)}; pack one of them again"
                )
    copies = list(_copies(found))
    total = sum(entry["num_bytes"] for _, _, _, entry in copies)
    done = 0
    with atomic_dir(out_dir) as temporary:
        (temporary / TOKENIZER_DIR).mkdir()
        for folder, name, target, entry in copies:
            for num_bytes in _copy(folder / safe_relative(name, where=str(folder / MANIFEST_NAME)), temporary / target, entry):
                yield MergeProgress(done + num_bytes, total)
                if (number := stop()) is not None:
                    raise Interrupted("stopped; nothing was made", signal_number=number)
            done += entry["num_bytes"]
        files = {target: entry for _, _, target, entry in copies}
        errors = _join_errors(found, temporary)
        if errors is not None:
            files[ERRORS_NAME] = errors
        manifest = _manifest(found, files)
        write_json(temporary / MANIFEST_NAME, manifest)
    splits = manifest["splits"].values()
    yield Merged(
        directory=str(out_dir),
        num_folders=len(found),
        num_shards=sum(len(split["shards"]) for split in splits),
        num_tokens=sum(split["num_tokens"] for split in splits),
        num_documents=sum(split["num_documents"] for split in splits),
        num_bytes=sum(split["num_bytes"] for split in splits),
        num_errors=manifest["num_errors"],
    )


def _in_order(found: list[tuple[Path, dict[str, Any]]]) -> list[tuple[Path, dict[str, Any]]]:
    """Parts of one packing in their order, all of them; other folders as given."""
    resolved = [folder.resolve() for folder, _ in found]
    if len(set(resolved)) < len(resolved):
        twice = next(folder for (folder, _), path in zip(found, resolved, strict=True) if resolved.count(path) > 1)
        raise UsageError(f"{twice}: named twice")
    parts: dict[int, tuple[Path, dict[str, Any]]] = {}
    counts = set()
    for folder, manifest in found:
        shard = (manifest.get("plan") or {}).get("shard")
        if shard is None:
            return found
        index, _, count = str(shard).partition("/")
        counts.add(int(count))
        if int(index) in parts:
            raise UsageError(f"{folder}: is part {shard}, and so is {parts[int(index)][0]}")
        parts[int(index)] = (folder, manifest)
    if len(counts) > 1:
        raise UsageError(f"these are parts of packings of {' and '.join(map(str, sorted(counts)))} parts; name those of one")
    missing = [f"{index}/{total}" for total in counts for index in range(1, total + 1) if index not in parts]
    if missing:
        raise UsageError(
            f"of this packing {', '.join(missing[:5])} {'is' if len(missing) == 1 else 'are'} missing; pack them, and name all parts"
        )
    return [parts[index] for index in sorted(parts)]


def _copies(found: list[tuple[Path, dict[str, Any]]]) -> Iterator[tuple[Path, str, str, dict[str, Any]]]:
    """(folder, file, its new name, its entry in the manifest) of everything that is copied as it is."""
    for split in _SPLITS:
        number = 0
        for folder, manifest in found:
            for name in manifest["splits"].get(split, {}).get("shards", ()):
                yield folder, name, shard_name(split, number), manifest["files"][name]
                number += 1
    folder, manifest = found[0]
    for name, entry in manifest["files"].items():
        if name.startswith(f"{TOKENIZER_DIR}/"):
            yield folder, name, name, entry


def _copy(source: Path, target: Path, entry: dict[str, Any]) -> Iterator[int]:
    """Copy and check; gives the bytes copied so far."""
    digest, num_bytes = hashlib.sha256(), 0
    with open(source, "rb") as read, open(target, "wb") as written:
        while block := read.read(_BLOCK_BYTES):
            digest.update(block)
            written.write(block)
            num_bytes += len(block)
            yield num_bytes
    if digest.hexdigest() != entry["sha256"]:
        raise InputError(f"{source}: sha256 mismatch with {MANIFEST_NAME}: the content was changed; pack it again")


def _join_errors(found: list[tuple[Path, dict[str, Any]]], target: Path) -> dict[str, Any] | None:
    data = b"".join((folder / ERRORS_NAME).read_bytes() for folder, manifest in found if ERRORS_NAME in manifest["files"])
    if not data:
        return None
    (target / ERRORS_NAME).write_bytes(data)
    return {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _manifest(found: list[tuple[Path, dict[str, Any]]], files: dict[str, Any]) -> dict[str, Any]:
    first = found[0][1]
    splits = {}
    for split in _SPLITS:
        entries = [manifest["splits"][split] for _, manifest in found if split in manifest["splits"]]
        if entries:
            names = [name for name in files if name.startswith(f"{split}-")]
            splits[split] = {"shards": names} | {
                key: sum(entry[key] for entry in entries) for key in ("num_tokens", "num_documents", "num_bytes")
            }
    return {
        "kind": MANIFEST_KIND,
        "version": 1,
        "llmctl_version": __version__,
        **{key: first.get(key) for key in ("dtype", "vocab_size", "tokenizer_fingerprint", "eos_id")},
        "splits": splits,
        "num_errors": sum(manifest.get("num_errors", 0) for _, manifest in found),
        "num_special_names": sum(manifest.get("num_special_names", 0) for _, manifest in found),
        "plan": {"merged": [manifest.get("plan") for _, manifest in found]},
        "files": files,
    }
