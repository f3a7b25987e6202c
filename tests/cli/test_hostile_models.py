"""Hostile model files through the command line: exit code 4 and one line. Any damage at all is in tests/fuzz."""

import shutil
from pathlib import Path

import pytest

from tests.cli.generate_tools import Llmctl
from tests.fuzz.targets import GGUFS, sound


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "llama"}'),
        ("model.safetensors.index.json", b'{"weight_map": {"model.norm.weight": "../a.safetensors"}}'),
        ("model.safetensors.index.json", b'{"weight_map": {"model.norm.weight": "away.safetensors"}}'),
        ("model.safetensors.index.json", b"[]"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 4000000000}, "merges": []}}'),
        ("byte-level.gguf", b"GGUF"),
        ("byte-level.gguf", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40),
    ],
)
def test_the_program_ends_with_4_and_one_line(name: str, damaged: bytes, llmctl: Llmctl, tmp_path: Path) -> None:
    if name in GGUFS:
        model = tmp_path / "m.gguf"
        model.write_bytes(damaged)
    else:
        model = tmp_path / "m"
        shutil.copytree(sound() / "folder", model)
        (model / name).write_bytes(damaged)
    found = llmctl("--model", model, "--device", "cpu", "-n", "2", "-t", "0", "the cat")
    assert (found.code, found.out) == (4, "")
    assert found.err.strip().splitlines()[-1].startswith("llmctl: error: ")
