"""The output folder of packing: whose it is, what is finished in it, how it becomes complete. Knows no text and no ids.

While a packing is under way, pack-state.json says with which plan, and which shards are finished; a manifest.json says
that all is there. Names that stand in neither are not ours, and are neither read nor removed.
"""

import contextlib
import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from llmctl.core.data.shards import (
    MANIFEST_KIND,
    SHARD_SUFFIX,
    STATE_NAME,
    TOKENIZER_DIR,
    ShardInfo,
    ShardWriter,
    read_pack_manifest,
    shard_name,
)
from llmctl.core.errors import InputError, LlmctlError, UsageError, is_write_failure, write_error
from llmctl.core.files import (
    MANIFEST_NAME,
    TEMP_PREFIX,
    FileLock,
    atomic_dir,
    fsync_dir,
    read_json,
    remove_temporaries,
    sha256_file,
    write_json,
)

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

ERRORS_NAME = "errors.jsonl"
_LOCK_NAME = ".lock"
_STATE_KIND = "llmctl-pack-state-3"
"""2: a piece is a block of documents where it was one document. 3: another hash of the input's text."""
_SHARD_NAME = re.compile(rf"(train|val)-\d{{5,}}{re.escape(SHARD_SUFFIX)}")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


@dataclass(frozen=True, kw_only=True)
class ShardPlace:
    """A finished shard and where in the input it ends: after `num_ids` ids of piece `piece`. `chain` is the hash of the
    input's text up to and with that piece, so that a resumed run can tell whether the input is the same."""

    shard: ShardInfo
    piece: int
    num_ids: int
    chain: str


class PackFolder:
    """The folder, locked. Use it with `with`; see `open`."""

    def __init__(self, path: Path, plan: dict[str, Any], lock: FileLock, *, is_new: bool) -> None:
        self.path = path
        self.plan = plan
        self.places: dict[str, list[ShardPlace]] = {"train": [], "val": []}
        self.warnings: list[str] = []
        self.errors_path = path / ERRORS_NAME
        self._lock = lock
        self._is_new = is_new
        self._errors_temp = path / (TEMP_PREFIX + ERRORS_NAME)
        self._errors_file: IO[bytes] | None = None
        self._first_error = ""
        self._manifest: dict[str, Any] | None = None

    @classmethod
    def open(cls, path: Path, plan: dict[str, Any], *, overwrite: bool) -> "PackFolder":
        """Lock the folder (made if it is missing) and find out what is there.

        An unfinished packing under the same plan goes on. Anything else that is ours is refused, or removed with
        `overwrite`: InputError for another tokenizer or other input, UsageError for other settings and for a folder that
        holds something else, LockedError when another run is at work in it.
        """
        is_new = not path.exists()
        if not is_new:
            _refuse_foreign(path)
        path.mkdir(exist_ok=True)
        folder = cls(path, plan, FileLock(path / _LOCK_NAME), is_new=is_new)
        try:
            folder._take_over(overwrite)
        except BaseException:
            folder._lock.release()
            raise
        return folder

    def __enter__(self) -> "PackFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.drop_errors()
        if kind is not None and self._manifest is None and not any(self.places.values()):
            self._wipe()  # nothing was achieved: leave no folder that the next try would have to overwrite
            if self._is_new:
                with contextlib.suppress(OSError):
                    (self.path / _LOCK_NAME).unlink()
                    self.path.rmdir()
        self._lock.release()

    def _take_over(self, overwrite: bool) -> None:
        remove_temporaries(self.path)
        has_manifest, has_state = (self.path / MANIFEST_NAME).exists(), (self.path / STATE_NAME).exists()
        if has_manifest or has_state:
            try:
                found = read_pack_manifest(self.path) if has_manifest else self._read_state()
            except LlmctlError as error:
                if not overwrite:
                    raise InputError(f"{error}; or replace it with --overwrite") from error
                found = {}
            is_same = found.get("plan") == self.plan
            if not is_same and not overwrite:
                self._refuse(found.get("plan"))
            if is_same and has_manifest and not overwrite:
                self._manifest = found
                (self.path / STATE_NAME).unlink(missing_ok=True)  # a kill just before the end of the last run
                return
            if is_same and not has_manifest:
                self._warn_of_rights()
                self._resume(found)
                return
            self._wipe()
        self.save_state()

    def finished(self) -> dict[str, Any] | None:
        """The manifest, if the folder was complete when it was opened, or has become so."""
        return self._manifest

    def kept(self) -> str:
        """What an interrupted run leaves, in words."""
        names = [place.shard.name for places in self.places.values() for place in places]
        if not names:
            return "no shard was finished, so nothing is kept"
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        return f"{'1 finished shard is' if len(names) == 1 else f'{len(names)} finished shards are'} kept in {self.path}: {shown}"

    # the work

    def start_again(self) -> None:
        """Remove every finished shard: what was packed so far is not to be kept."""
        for places in self.places.values():
            places.clear()
        self.save_state()
        self._remove_shards()
        self.drop_errors()
        self._first_error = ""

    def keep_tokenizer(self, tokenizer: "Tokenizer") -> None:
        """Put the copy of the tokenizer into the folder, unless an interrupted run did."""
        from llmctl.core.tokenizer import Tokenizer

        target = self.path / TOKENIZER_DIR
        if target.exists():
            with contextlib.suppress(LlmctlError):
                if Tokenizer.load(target).fingerprint == tokenizer.fingerprint:
                    return
            self._remove_tokenizer()
        with atomic_dir(target) as temp:
            tokenizer.save(temp)

    def new_shard(self, split: str, index: int) -> ShardWriter:
        """A writer for shard `index` of a split."""
        vocab_size = self.plan["vocab_size"]
        return ShardWriter(self.path / shard_name(split, index), vocab_size=vocab_size, fingerprint=self.plan["tokenizer_fingerprint"])

    def save_state(self) -> None:
        """Note the finished shards, durably."""
        shards = {name: [dataclasses.asdict(place) for place in places] for name, places in self.places.items()}
        write_json(self.path / STATE_NAME, {"kind": _STATE_KIND, "plan": self.plan, "shards": shards})

    def add_error(self, entry: dict[str, Any]) -> None:
        """Add a line to the errors file, which appears when the packing is complete."""
        line = json.dumps(entry, ensure_ascii=False)
        self._first_error = self._first_error or f"{entry['source']}: line {entry['line']}: {entry['error']}"
        try:
            if self._errors_file is None:
                self._errors_file = open(self._errors_temp, "wb")  # noqa: SIM115 (closed by drop_errors or finish)
            self._errors_file.write(line.encode("utf-8", "backslashreplace") + b"\n")
        except OSError as error:
            if is_write_failure(error):
                raise write_error(error, path=self.errors_path) from error
            raise

    def first_error(self) -> str:
        """The first error noted, in words."""
        return self._first_error

    def drop_errors(self) -> None:
        """Remove the unfinished errors file."""
        if self._errors_file is not None:
            with contextlib.suppress(OSError):
                self._errors_file.close()
            self._errors_file = None
        with contextlib.suppress(OSError):
            self._errors_temp.unlink()

    def finish(self, facts: dict[str, Any], *, has_errors: bool) -> dict[str, Any]:
        """Make the folder complete: the errors file, then the manifest. Gives the manifest."""
        files = {place.shard.name: place.shard for places in self.places.values() for place in places}
        entries = {name: {"num_bytes": shard.num_bytes, "sha256": shard.sha256} for name, shard in files.items()}
        if has_errors and self._errors_file is not None:
            try:
                self._errors_file.flush()
                os.fsync(self._errors_file.fileno())
                self._errors_file.close()
                os.replace(self._errors_temp, self.errors_path)
            except OSError as error:
                raise write_error(error, path=self.errors_path) from error
            self._errors_file = None
            entries[ERRORS_NAME] = _entry(self.errors_path)
        for path in sorted((self.path / TOKENIZER_DIR).iterdir()):
            entries[f"{TOKENIZER_DIR}/{path.name}"] = _entry(path)
        manifest = {"kind": MANIFEST_KIND, "version": 1, **facts, "plan": self.plan, "files": entries}
        write_json(self.path / MANIFEST_NAME, manifest)
        (self.path / STATE_NAME).unlink(missing_ok=True)
        fsync_dir(self.path)
        self._manifest = manifest
        return manifest

    # what is there already

    def _read_state(self) -> dict[str, Any]:
        path = self.path / STATE_NAME
        state = read_json(path)
        if not isinstance(state, dict) or state.get("kind") != _STATE_KIND or not isinstance(state.get("plan"), dict):
            raise InputError(f"{path}: not the state of a packing")
        return state

    def _resume(self, state: dict[str, Any]) -> None:
        """Take the finished shards over, as far as they are still what they were."""
        for split, places in self.places.items():
            try:
                listed = [ShardPlace(**{**entry, "shard": ShardInfo(**entry["shard"])}) for entry in state["shards"][split]]
            except (KeyError, TypeError) as error:
                raise InputError(f"{self.path / STATE_NAME}: malformed; start again with --overwrite") from error
            for index, place in enumerate(listed):
                path = self.path / shard_name(split, index)
                if not path.is_file() or path.stat().st_size != place.shard.num_bytes or sha256_file(path) != place.shard.sha256:
                    self.warnings.append(f"{path} is missing or was changed since it was finished; it is made again, and what follows it")
                    break
                places.append(place)
        self._remove_shards()
        self.save_state()

    def _warn_of_rights(self) -> None:
        status = self.path.stat()
        if status.st_mode & 0o002:
            self.warnings.append(f"{self.path} may be written by anybody (mode {status.st_mode & 0o777:o}); its shards could be another's")
        if status.st_uid != os.geteuid():
            self.warnings.append(f"{self.path} belongs to another user (uid {status.st_uid})")

    def _refuse(self, found: dict[str, Any] | None) -> None:
        """Say what differs between the plan of the folder and ours."""
        found = found if isinstance(found, dict) else {}
        where = f"{self.path} holds shards"
        mine, theirs = self.plan["tokenizer_fingerprint"], found.get("tokenizer_fingerprint")
        if mine != theirs:
            raise InputError(
                f"{where} of another tokenizer ({theirs}, this one is {mine}); choose another folder, or replace them with --overwrite"
            )
        if found.get("sources") != self.plan["sources"]:
            raise InputError(
                f"{where} of other input files (names, sizes or order differ); choose another folder, or replace them with --overwrite"
            )
        changed = [f"{key} was {found.get(key)!r}, is {value!r}" for key, value in self.plan.items() if found.get(key) != value]
        raise UsageError(
            f"{where} packed with other settings ({'; '.join(changed)}); choose another folder, or replace them with --overwrite"
        )

    def _wipe(self) -> None:
        """Remove what packing makes, by name, the manifest first; links are removed, never followed."""
        for name in (MANIFEST_NAME, STATE_NAME, ERRORS_NAME):
            with contextlib.suppress(FileNotFoundError):
                (self.path / name).unlink()
        for places in self.places.values():
            places.clear()
        self._remove_shards()
        self._remove_tokenizer()

    def _remove_shards(self) -> None:
        kept = {place.shard.name for places in self.places.values() for place in places}
        for path in self.path.iterdir():
            if _SHARD_NAME.fullmatch(path.name) and path.name not in kept and (path.is_symlink() or path.is_file()):
                path.unlink()

    def _remove_tokenizer(self) -> None:
        folder = self.path / TOKENIZER_DIR
        if folder.is_symlink():
            folder.unlink()
        elif folder.is_dir():
            for name in _TOKENIZER_FILES:
                (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()


def _entry(path: Path) -> dict[str, Any]:
    return {"num_bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _refuse_foreign(path: Path) -> None:
    """A folder with other things in it is somebody's, and shards among them would be a surprise."""
    names = set(os.listdir(path))
    if {MANIFEST_NAME, STATE_NAME} & names:
        return
    others = sorted(name for name in names if name != _LOCK_NAME and not name.startswith(TEMP_PREFIX))
    if others:
        raise UsageError(
            f"--out-dir {path}: holds other files ({', '.join(map(repr, others[:3]))}{', ...' if len(others) > 3 else ''})"
            " and no packed data; choose a new or empty folder"
        )
