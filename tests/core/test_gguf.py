"""GGUF files as bytes: our reader against the gguf package's, and hostile files."""

import struct
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.core import gguf as reader
from llmctl.core.checkpoint import load_model
from llmctl.core.errors import InputError, MissingExtraError, NotFoundError
from llmctl.core.gguf import BLOCKS, GgufFile
from tests.core.gguf_writer import blocky_model, write_model
from tests.core.model.families import reference_model

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0", "Q4_1"])
def test_our_dequantisation_is_the_packages_bit_for_bit(dtype: str) -> None:
    kind = gguf.GGMLQuantizationType[dtype]
    numbers = np.random.default_rng(0).standard_normal((700, 32 * 13), dtype=np.float32)
    raw = gguf.quants.quantize(numbers, kind)
    assert np.array_equal(reader._dequantise(raw, dtype).reshape(numbers.shape), gguf.quants.dequantize(raw, kind))


def test_sizes_of_blocks_are_those_of_the_gguf_package() -> None:
    sizes = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    for number, block in BLOCKS.items():
        assert sizes[number] == block


VALUES = {
    "a.u8": ("uint8", 200),
    "a.i8": ("int8", -100),
    "a.u16": ("uint16", 60_000),
    "a.i16": ("int16", -30_000),
    "a.u32": ("uint32", 4_000_000_000),
    "a.i32": ("int32", -2_000_000_000),
    "a.u64": ("uint64", 1 << 63),
    "a.i64": ("int64", -(1 << 62)),
    "a.f32": ("float32", 0.5),
    "a.f64": ("float64", 0.1),
    "a.yes": ("bool", True),
    "a.no": ("bool", False),
    "a.text": ("string", "κόσμε 世界"),
    "a.ints": ("array", [1, -2, 3]),
    "a.floats": ("array", [0.5, 0.25]),
    "a.bools": ("array", [True, False]),
    "a.texts": ("array", ["a", "", "世"]),
}


def small_file(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    for key, (kind, value) in VALUES.items():
        getattr(writer, f"add_{kind}")(key, value)
    writer.add_tensor("one", np.arange(10, dtype=np.float32))
    writer.add_tensor("two", np.arange(96, dtype=np.float32).reshape(3, 32).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_all_kinds_of_values_and_tensors_are_read(tmp_path: Path) -> None:
    small_file(tmp_path / "m.gguf")
    file = GgufFile(tmp_path / "m.gguf")
    assert file.metadata == {"general.architecture": "llama", **{key: value for key, (_, value) in VALUES.items()}}
    theirs = gguf.GGUFReader(tmp_path / "m.gguf")
    assert [tensor.name for tensor in theirs.tensors] == list(file.tensors)
    for tensor in theirs.tensors:
        assert np.array_equal(file.array(file.tensors[tensor.name]), tensor.data), tensor.name


# hostile files


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(num_tensors: int, num_keys: int, body: bytes = b"", *, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, num_tensors, num_keys) + body


def tensor_head(name: str, dimensions: list[int], kind: int, offset: int) -> bytes:
    count = len(dimensions)
    return text(name) + struct.pack(f"<I{count}Q", count, *dimensions) + struct.pack("<IQ", kind, offset)


HUGE = 1 << 62
HOSTILE = {
    "empty": (b"", "too few"),
    "another format": (b"PK\x03\x04" + bytes(40), "does not begin with GGUF"),
    "old version": (header(0, 0, bytes(8), version=1), "version 1"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + bytes(24), "big-endian"),
    "many keys": (header(0, HUGE), f"{HUGE:,} keys"),
    "many tensors": (header(HUGE, 0), f"{HUGE:,} tensors"),
    "keys that are not there": (header(0, 100), "are left"),
    "huge string": (header(0, 1, struct.pack("<Q", HUGE)), f"a string of {HUGE:,} bytes"),
    "string over the end": (header(0, 1, struct.pack("<Q", 60_000)), "are left"),
    "key not UTF-8": (header(0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + bytes(16)), "not UTF-8"),
    "unknown type": (header(0, 1, text("k") + struct.pack("<I", 77)), "values of type 77"),
    "array of arrays": (header(0, 1, text("k") + struct.pack("<IIQ", 9, 9, 1 << 40)), "arrays of type 9"),
    "huge array of numbers": (header(0, 1, text("k") + struct.pack("<IIQ", 9, 0, HUGE)), "too long"),
    "array over the end": (header(0, 1, text("k") + struct.pack("<IIQ", 9, 4, 1000)), "are left"),
    "huge array of strings": (header(0, 1, text("k") + struct.pack("<IIQ", 9, 8, HUGE)), "too long"),
    "strings over the end": (header(0, 1, text("k") + struct.pack("<IIQQ", 9, 8, 1, 1 << 63)), "runs over the end"),
    "a key twice": (header(0, 2, (text("k") + struct.pack("<II", 4, 1)) * 2), "appears twice"),
    "bad alignment": (header(0, 1, text("general.alignment") + struct.pack("<II", 4, 3)), "alignment is 3"),
    "no dimensions": (header(1, 0, tensor_head("t", [], 0, 0)), "0 dimensions"),
    "many dimensions": (header(1, 0, tensor_head("t", [1] * 9, 0, 0)), "9 dimensions"),
    "unknown tensor type": (header(1, 0, tensor_head("t", [1], 99, 0)), "type 99"),
    "shape overflow": (header(1, 0, tensor_head("t", [1 << 33, 1 << 33], 0, 0)), "are not in the file"),
    "zero dimension": (header(1, 0, tensor_head("t", [0], 0, 0)), "cannot have the dimensions"),
    "broken block": (header(1, 0, tensor_head("t", [33], 2, 0) + bytes(64)), "cannot have the dimensions"),
    "offset outside": (header(1, 0, tensor_head("t", [1], 0, 1 << 40)), "are not in the file"),
    "offset wraps": (header(1, 0, tensor_head("t", [1], 0, (1 << 64) - 32)), "are not in the file"),
    "offset not aligned": (header(1, 0, tensor_head("t", [1], 0, 4) + bytes(100)), "not aligned"),
    "overlap": (header(2, 0, tensor_head("t", [16], 0, 0) + tensor_head("u", [16], 0, 32) + bytes(200)), "overlaps"),
    "a tensor twice": (header(2, 0, tensor_head("t", [1], 0, 0) * 2 + bytes(200)), "appears twice"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_by_name_in_bounded_memory(name: str, tmp_path: Path) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as caught:
            GgufFile(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_strings_of_all_arrays_together_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_STRINGS", 10)
    arrays = b"".join(text(f"k{i}") + struct.pack("<IIQ", 9, 8, 6) + text("") * 6 for i in range(2))
    (tmp_path / "bad.gguf").write_bytes(header(0, 2, arrays))
    with pytest.raises(InputError, match="6 strings is too long"):
        GgufFile(tmp_path / "bad.gguf")


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 1 << 16), change=st.binary(min_size=1, max_size=8), cut=st.integers(0, 1 << 16) | st.none())
def test_any_damage_to_a_header_is_an_input_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, change: bytes, cut: int | None
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    content = bytearray(small_file(folder / "m.gguf"))
    position %= len(content)
    content[position : position + len(change)] = change
    content = content if cut is None else content[: cut % len(content)]
    (folder / "m.gguf").write_bytes(content)
    try:
        file = GgufFile(folder / "m.gguf")
        for tensor in file.tensors.values():
            file.array(tensor)
    except InputError:
        pass


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        GgufFile(tmp_path / "none.gguf")
    with pytest.raises(InputError, match="cannot read"):
        GgufFile(tmp_path)


def test_an_unknown_architecture_and_bad_metadata_are_named(tmp_path: Path) -> None:
    small_file(tmp_path / "m.gguf")
    with pytest.raises(InputError, match=r"m\.gguf: tensor 'token_embd.weight' is missing"):
        load_model(tmp_path / "m.gguf")
    writer = gguf.GGUFWriter(tmp_path / "n.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="architecture 'mamba' is not supported"):
        load_model(tmp_path / "n.gguf")


def test_missing_extra_and_mis_shaped_tensors_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = reference_model("llama-mha")
    write_model(tmp_path / "q.gguf", blocky_model(), dtype="Q5_0")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf.quants", None)
        with pytest.raises(MissingExtraError, match=r"llmctl\[gguf\]"):
            load_model(tmp_path / "q.gguf")
    reference.model.layers[1].mlp.up_proj.weight.data = torch.zeros(60, 32)
    write_model(tmp_path / "m.gguf", reference)
    with pytest.raises(InputError, match=r"'blk.1.ffn_up.weight' has the shape \[60, 32\].*\[56, 32\]"):
        load_model(tmp_path / "m.gguf")
    write_model(tmp_path / "e.gguf", reference_model("llama-mha"), extra={"blk.0.odd.weight": np.zeros(3, dtype=np.float32)})
    with pytest.raises(InputError, match=r"'blk.0.odd.weight' has no place"):
        load_model(tmp_path / "e.gguf")
