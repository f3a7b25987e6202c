"""docs/models.md against the families that there are."""

from pathlib import Path

import pytest
import torch

from llmctl.core.families import FAMILIES
from llmctl.core.families.gguf import GGUF_FAMILIES
from tests.core.model import table
from tests.core.model.families import SETTINGS

PAGE = Path(__file__).parents[3] / "docs" / "models.md"


def test_every_family_has_its_row_and_no_difference_is_above_the_tests_tolerance() -> None:
    rows = table.rows(PAGE.read_text())
    assert list(rows) == list(FAMILIES)
    for family, numbers in rows.items():
        logits, gradients, cached, round_trip, generate = numbers
        assert max(logits, cached) <= 1e-4, family
        assert gradients <= 1e-3, family
        assert round_trip == generate == 0, family


def test_every_family_is_tested_in_several_settings() -> None:
    for family in FAMILIES.values():
        assert sum(kind in family.model_types for kind, _ in SETTINGS.values()) >= 2, family.name


def test_the_page_names_every_architecture_of_gguf_and_every_model_type() -> None:
    page = PAGE.read_text()
    for name in [
        *(record.architecture for record in GGUF_FAMILIES.values()),
        *(kind for family in FAMILIES.values() for kind in family.model_types),
    ]:
        assert f"`{name}`" in page, name


def test_the_table_holds_the_largest_difference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(table, "FOUND", {(family, column): 0.0 for family in FAMILIES for column in table.COLUMNS})
    table.record("llama", "logits", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.25]))
    table.record("llama", "logits", torch.tensor([1.0]), torch.tensor([1.125]))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    table.write(page)
    assert table.rows(page.read_text())["llama"] == [0.2, 0, 0, 0, 0]
    assert page.read_text().startswith("before")
    assert page.read_text().endswith("after\n")
    del table.FOUND["gpt2", "cached"]
    with pytest.raises(LookupError, match="cached of gpt2"):
        table.write(page)
