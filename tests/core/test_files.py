"""Files appear whole or not at all: killed at every step, on a full disk, through links, by two processes at once."""

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.core import files
from llmctl.core.errors import InputError, LockedError, UsageError, WriteError

ROOT = Path(__file__).parent.parent.parent

# Runs a piece of code in which the n-th call that changes the disk kills the process, as a power cut would.
KILLED_AT = """
import os, sys
from pathlib import Path
from llmctl.core import files
count = 0
def deadly(function):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == {kill_at}:
            os._exit(9)
        return function(*args, **kwargs)
    return call
for name in ("fsync", "replace", "rename", "fchmod", "unlink", "mkdir", "rmdir"):
    setattr(os, name, deadly(getattr(os, name)))
folder = Path({folder!r})
{code}
"""


def run_python(code: str, *, check: bool = True, **options: Any) -> "subprocess.CompletedProcess[bytes]":
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=240, check=False, **options)
    assert not check or done.returncode == 0, done.stderr.decode()
    return done


def run_killed(code: str, folder: Path) -> Iterator[int]:
    """Run `code` killed at its first, second, ... change of the disk, until it survives. Yields after each death."""
    for kill_at in range(1, 60):
        done = run_python(KILLED_AT.format(kill_at=kill_at, folder=str(folder), code=code), check=False)
        assert done.returncode in (0, 9), done.stderr.decode()
        yield done.returncode
        if done.returncode == 0:
            return
    raise AssertionError("it never ended")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# atomic_write


def test_a_written_file_has_its_content_and_leaves_nothing_else(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "字\n")
    files.write_json(tmp_path / "b.json", {"x": "字"})
    assert (tmp_path / "a").read_bytes() == "字\n".encode()
    assert (tmp_path / "b.json").read_text(encoding="utf-8") == '{\n  "x": "字"\n}\n'
    assert names(tmp_path) == ["a", "b.json"]


def test_a_failure_inside_the_block_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), files.atomic_write(tmp_path / "a") as file:
        file.write(b"new" * (1 // 0))
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_killed_at_every_step_a_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    seen = []
    for code in run_killed("files.write_bytes(folder / 'a', b'new' * 100_000)", tmp_path):
        content = target.read_bytes()
        assert content in (b"old", b"new" * 100_000)
        seen.append((code, content[:3]))
        target.write_bytes(b"old")
    assert (9, b"old") in seen
    assert seen[-1] == (0, b"new")
    files.remove_temporaries(tmp_path)
    assert names(tmp_path) == ["a"]


def test_a_name_for_other_writers_has_the_suffix_and_becomes_the_file_or_vanishes(tmp_path: Path) -> None:
    with files.atomic_path(tmp_path / "a.gguf") as temp:
        assert temp.suffix == ".gguf"
        assert temp.name.startswith(files.TEMP_PREFIX)
        temp.write_bytes(b"new")
        assert not (tmp_path / "a.gguf").exists()
    assert (tmp_path / "a.gguf").read_bytes() == b"new"
    with pytest.raises(ValueError), files.atomic_path(tmp_path / "a.gguf") as temp:  # noqa: PT012
        temp.write_bytes(b"half")
        raise ValueError
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.gguf", b"new")]
    with pytest.raises(UsageError), files.atomic_path(tmp_path / "no" / "a.gguf"):
        pass


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_that_open_would_give(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        files.write_bytes(tmp_path / "a", b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "a").chmod(0o640)
    files.write_bytes(tmp_path / "a", b"y")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("name", ["missing/a", "file/a"])
def test_a_folder_that_is_not_there_is_a_usage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"cannot create .*a"):
        files.write_bytes(tmp_path / name, b"x")
    with pytest.raises(UsageError, match=r"cannot create .*a"), files.atomic_dir(tmp_path / name):
        pass


LIMITED = """
import resource
from pathlib import Path
from llmctl.core import files
from llmctl.core.errors import WriteError
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
folder = Path({folder!r})
try:
    {code}
except WriteError as error:
    print(error)
else:
    raise SystemExit("no WriteError")
"""


@pytest.mark.parametrize(
    "code",
    [
        "files.write_bytes(folder / 'a', b'x' * 10_000)",
        "\n    with files.atomic_dir(folder / 'a') as d: (d / 'f').write_bytes(b'x' * 10_000)",
    ],
)
def test_a_file_that_cannot_grow_is_a_write_error_and_leaves_nothing(tmp_path: Path, code: str) -> None:
    done = run_python(LIMITED.format(folder=str(tmp_path), code=code))
    assert b"file size limit reached" in done.stdout
    assert names(tmp_path) == []


def small_filesystem_works() -> bool:
    probe = ["unshare", "-Urm", "sh", "-c", "mount -t tmpfs -o size=64k t /mnt"]
    try:
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not small_filesystem_works(), reason="no user namespace with mounts here")
def test_a_full_disk_is_a_write_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from llmctl.core import files\n"
        "from llmctl.core.errors import WriteError\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "files.write_bytes(folder / 'a', b'old')\n"
        "for act in (lambda: files.write_bytes(folder / 'a', b'x' * 200_000), lambda: files.write_json(folder / 'a', 'x' * 200_000)):\n"
        "    try: act()\n"
        "    except WriteError as error: print(error)\n"
        "assert [p.name for p in folder.iterdir()] == ['a'] and (folder / 'a').read_bytes() == b'old'\n"
    )
    mounted = ["unshare", "-Urm", "sh", "-c", f'mount -t tmpfs -o size=64k t "{tmp_path}" && exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(mounted, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.count(b"no space left") == 2


# atomic_dir


def test_killed_at_every_step_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    code = (
        "with files.atomic_dir(folder / 'step', before_rename=files.write_manifest) as temp:\n"
        "    (temp / 'weights').write_bytes(b'w' * 1000); (temp / 'trainer').mkdir(); (temp / 'trainer' / 'state').write_bytes(b's')\n"
    )
    whole = 0
    for _ in run_killed(code, tmp_path):
        if (tmp_path / "step").exists():
            assert set(files.check_manifest(tmp_path / "step", hashes=True)["files"]) == {"weights", "trainer/state"}
            whole += 1
            for path in sorted((tmp_path / "step").rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            (tmp_path / "step").rmdir()
        files.remove_temporaries(tmp_path)
        assert names(tmp_path) == []
    assert whole >= 2, "neither the run killed after its rename nor the unbroken one was seen"


def test_the_files_of_a_folder_have_the_mode_that_open_would_give(tmp_path: Path) -> None:
    with files.atomic_dir(tmp_path / "step") as temp:
        os.close(os.open(temp / "weights", os.O_CREAT | os.O_WRONLY, 0o600))
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "step" / "weights").stat().st_mode) == 0o666 & ~mask


def test_a_failure_inside_the_block_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.atomic_dir(tmp_path / "step") as temp:
        (temp / "weights").write_bytes(b"w" * (1 // 0))
    assert names(tmp_path) == []


def test_a_folder_that_is_there_already_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "old").write_bytes(b"old")
    with pytest.raises(OSError, match="not empty"), files.atomic_dir(tmp_path / "step") as temp:
        (temp / "new").write_bytes(b"new")
    assert names(tmp_path / "step") == ["old"]
    assert names(tmp_path) == ["step"]


def test_temporaries_are_removed_never_through_a_link_and_nothing_else_is(tmp_path: Path) -> None:
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    run.mkdir()
    (outside / "precious").write_bytes(b"x")
    (run / ".tmp-link").symlink_to(outside)
    (run / ".tmp-file").write_bytes(b"x")
    (run / ".tmp-folder").mkdir()
    (run / ".tmp-folder" / "link").symlink_to(outside)
    (run / "step").mkdir()
    (run / ".hidden").write_bytes(b"x")
    files.remove_temporaries(run)
    assert names(run) == [".hidden", "step"]
    assert names(outside) == ["precious"]


# Locks


def test_a_second_lock_is_refused_with_pid_and_host_of_the_first(tmp_path: Path) -> None:
    with files.FileLock(tmp_path / "lock"):
        with pytest.raises(LockedError) as caught:
            files.FileLock(tmp_path / "lock")
        assert f"pid {os.getpid()} on " in str(caught.value)
        assert str(tmp_path) in str(caught.value)
    files.FileLock(tmp_path / "lock").release()


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from llmctl.core.files import FileLock\n"
        f"lock = FileLock(Path({str(tmp_path / 'lock')!r})); print('held', flush=True); input()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LockedError, match=f"pid {holder.pid} on"):
            files.FileLock(tmp_path / "lock")
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=240)
        files.FileLock(tmp_path / "lock").release()


def test_a_lock_is_not_inherited_by_a_child_process(tmp_path: Path) -> None:
    lock = files.FileLock(tmp_path / "lock")
    code = "print('up', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        lock.release()
        files.FileLock(tmp_path / "lock").release()
        child.kill()


# Manifests


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(b"a" * 100)
    (tmp_path / "sub" / "b.bin").write_bytes(b"b" * 50)
    files.write_manifest(tmp_path, extra={"step": 3})
    return tmp_path


def test_a_manifest_lists_every_file_with_size_and_hash(packed: Path) -> None:
    manifest = files.check_manifest(packed, hashes=True)
    assert manifest["step"] == 3
    expected = subprocess.run(["sha256sum", packed / "a.bin"], capture_output=True, check=True).stdout.split()[0].decode()
    assert manifest["files"]["a.bin"] == {"num_bytes": 100, "sha256": expected}
    assert set(manifest["files"]) == {"a.bin", "sub/b.bin"}


def test_a_cut_file_is_found_by_size(packed: Path) -> None:
    os.truncate(packed / "sub" / "b.bin", 25)
    with pytest.raises(InputError, match=r"b\.bin has 25 bytes.*says 50"):
        files.check_manifest(packed, hashes=False)


def test_a_flipped_byte_is_found_by_hash_only(packed: Path) -> None:
    data = bytearray((packed / "a.bin").read_bytes())
    data[50] ^= 1
    (packed / "a.bin").write_bytes(data)
    files.check_manifest(packed, hashes=False)
    with pytest.raises(InputError, match=r"a\.bin: sha256 mismatch"):
        files.check_manifest(packed, hashes=True)


def test_a_missing_file_and_a_missing_manifest_are_named(packed: Path) -> None:
    (packed / "a.bin").unlink()
    with pytest.raises(InputError, match=r"a\.bin is missing"):
        files.check_manifest(packed, hashes=False)
    (packed / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        files.check_manifest(packed, hashes=False)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"files": []}', '{"files": {"a": 3}}', '{"files": {"a": {"num_bytes": 3}}}', "{" * 100_000, "\x00"]
)
def test_a_broken_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json"):
        files.read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..", "", "a\0b", "..\\x", "a\\b", 3, None])
def test_a_name_that_leaves_its_folder_is_refused(name: Any) -> None:
    with pytest.raises(InputError, match="refused"):
        files.safe_relative(name, where="index.json")


@pytest.mark.parametrize("name", ["model.safetensors", "trainer/state", "a..b", "...", "字"])
def test_an_ordinary_name_is_let_through(name: str) -> None:
    assert files.safe_relative(name, where="index.json") == Path(name)


# JSON that somebody else wrote


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'[{"b": {"a": 1, "a": 1}}]', "'a' appears twice"),
        (b"[NaN]", "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"a": 1', "line 1, column 8"),
        (b'"\xff"', "not UTF-8 at byte 1"),
        (b"9" * 10_000, "not valid JSON"),
        (b"", "not valid JSON"),
    ],
)
def test_json_is_strict(data: bytes, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        files.parse_json(data, where="config.json")
    assert str(caught.value).startswith("config.json: ")
    assert reason in str(caught.value)


@settings(deadline=None)
@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_what_is_json_is_read_as_the_standard_library_reads_it(value: Any) -> None:
    assert files.parse_json(json.dumps(value), where="x") == value


def test_a_json_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "big.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match=r"big\.json is 1,099,511,627,776 bytes"):
        files.read_json(tmp_path / "big.json")
    with pytest.raises(InputError, match="cannot read"):
        files.read_json(tmp_path / "none.json")


# Output places, checked before any work


def test_output_places_that_cannot_work_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path, reason in [(tmp_path / "file", "is a file"), (Path("/"), "root folder"), (tmp_path / "none" / "x", "does not exist")]:
        with pytest.raises(UsageError, match=f"--out-dir .*{reason}"):
            files.check_out_dir(path)
    for path, reason in [
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "x", "does not exist"),
        (tmp_path / "file" / "x", "does not exist"),
    ]:
        with pytest.raises(UsageError, match=f"--output .*{reason}"):
            files.check_out_file(path)
    files.check_out_dir(tmp_path / "new")
    files.check_out_dir(tmp_path)
    files.check_out_file(tmp_path / "file")
    files.check_out_file(tmp_path / "new")
    assert names(tmp_path) == ["file"]


AS_NOBODY = """
import os
from pathlib import Path
from llmctl.core import files
from llmctl.core.errors import UsageError
import tempfile  # while the interpreter's own files can still be read
if os.geteuid() == 0:  # root may write anywhere
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
folder = Path({folder!r})
for act in (
    lambda: files.check_out_dir(folder),
    lambda: files.check_out_dir(folder / "x"),
    lambda: files.check_out_file(folder / "x"),
    lambda: files.check_out_file(folder / "old"),
    lambda: files.write_bytes(folder / "x", b""),
):
    try:
        act()
    except UsageError as error:
        print(error)
    else:
        raise SystemExit("not refused")
"""


def test_places_without_the_right_to_write_are_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which lies in a folder that nobody else may enter
        (Path(folder) / "old").write_bytes(b"")
        (Path(folder) / "old").chmod(0o444)
        os.chmod(folder, 0o555)
        try:
            done = run_python(AS_NOBODY.format(folder=folder))
        finally:
            os.chmod(folder, 0o755)
    assert done.stdout.count(b"not writable") == 4
    assert done.stdout.count(b"cannot create") == 1


def test_writing_out_of_space_is_a_write_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="no space left"):
        files.write_bytes(tmp_path / "a", b"x")
    assert names(tmp_path) == []
