"""Packed weights in files: the same arrays again, of the right model only, and no trouble whatever lies in the cache."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from llmctl.cli.main import run
from llmctl.core import cachefiles
from llmctl.core.errors import InputError, UsageError
from llmctl.core.infer import weightcache
from llmctl.core.infer.source import open_source
from llmctl.core.infer.weightcache import CacheKey
from llmctl.core.native.packed import PackedModel, pack_model
from tests.cli.tiny_model import make_model
from tests.core.native.models import library_is_built

pytestmark = pytest.mark.skipif(not library_is_built(), reason="the native library was not built")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMCTL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("LLMCTL_CACHE_BYTES")
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def key_of(model: Path, *, held: str = "float32", quant: str | None = None) -> CacheKey:
    source = open_source(model)
    return CacheKey.of((*source.weight_files, *source.config_files), held=held, quant=quant)


def stored(model: Path, **how: Any) -> tuple[CacheKey, PackedModel]:
    source = open_source(model)
    packed = pack_model(source.config, source.tensors(how.get("quant")), dtype=how.get("held", "float32"))
    key = key_of(model, **how)
    assert weightcache.store(key, packed, sources=source.weight_files) is None
    return key, packed


def arrays(packed: PackedModel) -> dict[str, np.ndarray]:
    found = {f"{name} {part}": array for name, matrix in packed.matrices.items() for part, array in matrix.arrays().items()}
    return found | dict(packed.vectors)


@pytest.mark.parametrize("how", [{}, {"held": "bfloat16"}, {"quant": "int8"}, {"quant": "int4"}])
def test_what_comes_back_is_what_went_in_aligned_and_readable_by_others(cache: Path, model: Path, how: dict[str, Any]) -> None:
    key, packed = stored(model, **how)
    again = weightcache.load(key, open_source(model).config)
    assert again is not None
    wanted, found = arrays(packed), arrays(again)
    assert wanted.keys() == found.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
        assert found[name].ctypes.data % 64 == 0
    with safetensors.safe_open(cache / key.name, framework="np") as file:  # whole and well formed by the package's own reader
        names = list(file.keys())
        assert {name for name in names if not name.startswith("filler ")} == {
            *(f"matrix {n} {p}" for n, m in packed.matrices.items() for p in m.arrays()),
            *(f"vector {n}" for n in packed.vectors),
        }
    assert weightcache.verify(key) == str(cache / key.name)


def touched(model: Path) -> None:
    os.utime(model / "model.safetensors", ns=(1, 1))


def copied(model: Path) -> None:
    data, status = (model / "model.safetensors").read_bytes(), (model / "model.safetensors").stat()
    (model / "other").write_bytes(data)
    (model / "other").rename(model / "model.safetensors")
    os.utime(model / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))


def other_header(model: Path) -> None:
    path = model / "model.safetensors"
    status, data = path.stat(), bytearray(path.read_bytes())
    position = data.index(b'"F32"')
    data[position : position + 5] = b'"I32"'
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def other_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5, "layer_norm_epsilon": 0.5}))


@pytest.mark.parametrize("change", [touched, copied, other_header, other_config])
def test_a_model_that_has_changed_has_another_key(change: Any, model: Path) -> None:
    source = open_source(model)
    files = (*source.weight_files, *source.config_files)
    before = CacheKey.of(files, held="float32", quant=None)
    assert CacheKey.of(files, held="float32", quant=None).name == before.name
    assert CacheKey.of(files, held="bfloat16", quant=None).name != before.name
    change(model)
    assert CacheKey.of(files, held="float32", quant=None).name != before.name


def test_a_changed_byte_is_found_by_verifying_and_the_file_goes(cache: Path, model: Path) -> None:
    key, _ = stored(model)
    data = bytearray((cache / key.name).read_bytes())
    data[-100] ^= 1
    (cache / key.name).write_bytes(data)
    with pytest.raises(InputError, match="sha256 mismatch"):
        weightcache.verify(key)
    assert not (cache / key.name).exists()
    assert weightcache.verify(key) is None


def test_weights_changed_behind_size_and_time_are_found_by_verifying(cache: Path, model: Path) -> None:
    key, _ = stored(model)
    path = model / "model.safetensors"
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert key_of(model).name == key.name
    with pytest.raises(InputError, match="has changed since"):
        weightcache.verify(key)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 200, b"{}", b"\x10" + b"\x00" * 7 + b'{"__metadata__":{}', b"\x02" + b"\x00" * 7 + b"{}"],
)
def test_a_broken_file_is_no_file(content: bytes, cache: Path, model: Path) -> None:
    key, _ = stored(model)
    (cache / key.name).write_bytes(content)
    assert weightcache.load(key, open_source(model).config) is None


def test_weights_of_another_shape_are_refused(cache: Path, model: Path, tmp_path: Path) -> None:
    key, _ = stored(model)
    config = open_source(model).config
    assert weightcache.load(key, config) is not None
    for change in ({"vocab_size": config.vocab_size + 16}, {"num_layers": config.num_layers + 1}, {"mlp_size": config.mlp_size * 2}):
        assert weightcache.load(key, type(config)(**{**vars(config), **change})) is None


def test_the_files_used_longest_ago_go_when_there_are_too_many(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for number in range(3):
        key, packed = stored(make_model(tmp_path / f"m{number}", seed=number))
        os.utime(cache / key.name, (1000 + number, 1000 + number))
        keys.append(key)
    weightcache.load(keys[0], open_source(tmp_path / "m0").config)  # used again: now the newest
    size = (cache / keys[0].name).stat().st_size
    monkeypatch.setenv("LLMCTL_CACHE_BYTES", str(int(3.5 * size)))
    last, _ = stored(make_model(tmp_path / "m3", seed=3))
    assert {path.name for path in cache.iterdir()} == {keys[0].name, keys[2].name, last.name}
    monkeypatch.setenv("LLMCTL_CACHE_BYTES", str(size // 2))
    assert "no room" in str(weightcache.store(keys[1], packed, sources=()))


def test_a_cache_that_is_off_or_unusable_is_no_failure(cache: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(model)
    packed = pack_model(source.config, source.tensors(None), dtype="float32")
    key = key_of(model)
    cache.write_text("a file where the folder should be")
    assert "not kept" in str(weightcache.store(key, packed, sources=source.weight_files))
    assert weightcache.load(key, source.config) is None
    monkeypatch.setenv("LLMCTL_CACHE_BYTES", "0")
    assert cachefiles.directory() is None
    assert "off" in str(weightcache.store(key, packed, sources=source.weight_files))
    monkeypatch.setenv("LLMCTL_CACHE_BYTES", "lots")
    with pytest.raises(UsageError, match="LLMCTL_CACHE_BYTES=lots"):
        cachefiles.limit_bytes()


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLMCTL_CACHE_BYTES", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cachefiles.directory() is None
    monkeypatch.setenv("HOME", "/somebody")
    assert cachefiles.directory() == Path("/somebody/.cache/llmctl")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cachefiles.directory() == Path("/elsewhere/llmctl")


def test_what_a_killed_process_left_goes_after_a_while(cache: Path, model: Path) -> None:
    cache.mkdir()
    old, young = cache / ".tmp-old", cache / ".tmp-young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    stored(model)
    assert not old.exists()
    assert young.exists()


def test_the_command_verifies_and_removes(cache: Path, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "-m", str(model), "--verify-cache"]
    assert run(command) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert "no packed weights are kept" in err
    key, _ = stored(model)
    assert run(command) == 0
    assert capfd.readouterr().out == f"{cache / key.name}\n"
    data = bytearray((cache / key.name).read_bytes())
    data[-100] ^= 1
    (cache / key.name).write_bytes(data)
    assert run(command) == 4
    assert "sha256 mismatch" in capfd.readouterr().err
    assert run(command) == 0
    assert run([*command, "a prompt"]) == 2


def test_two_processes_at_once_and_one_that_comes_later_give_the_same_text(cache: Path, model: Path) -> None:
    command = [
        *(sys.executable, "-m", "llmctl", "generate", "-m", str(model), "--quant", "int8", "--device", "cpu", "-t", "0", "-n", "20"),
        *("--raw", "-v", "once upon a time"),
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) for _ in range(2)]
    texts = [process.communicate() for process in both]
    later = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert [process.returncode for process in both] == [0, 0]
    assert later.returncode == 0
    assert texts[0][0] == texts[1][0] == later.stdout
    assert b"from the cache" in later.stderr
    assert len(list(cache.iterdir())) == 1
