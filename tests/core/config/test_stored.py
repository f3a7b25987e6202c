"""A run's stored settings are TOML that Python's own parser reads back, whatever the text in them."""

import tomllib
from pathlib import Path

import pytest

from llmctl.core.config.pretrain import PretrainConfig
from llmctl.core.config.stored import to_toml


@pytest.mark.parametrize("text", ['a "quote" \\ and 字\n', "\x7f", "\x00\x1f", "tab\there"])
def test_any_text_comes_back_and_paths_are_absolute(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stored = tomllib.loads(to_toml(PretrainConfig(out_dir=Path("run"), sample_prompt=text, max_steps=3)))
    assert stored["sample_prompt"] == text
    assert stored["out_dir"] == str(tmp_path / "run")
    assert stored["max_steps"] == 3
