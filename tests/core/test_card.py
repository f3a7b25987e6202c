"""Model cards: the front matter against a YAML parser, and what stands in the text."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.core.card import CardFacts, license_of, model_card

yaml = pytest.importorskip("yaml")

FACTS = CardFacts(
    name="small",
    family="llama",
    num_parameters=1234,
    num_format="int4 in groups of 32",
    architecture={"layers": 2, "hidden_size": 64},
    tokenizer_fingerprint="ab" * 32,
    parent="org/parent",
    license="apache-2.0",
    data={"shards | a": "cd" * 32},
    recipe={"learning_rate": 0.003, "schedule": "wsd"},
    scores={"perplexity": 12.3456789},
    versions={"llmctl": "1.2"},
)


def front_matter(card: str) -> dict:
    start, matter, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(matter)


def test_all_facts_are_told_in_front_matter_and_text() -> None:
    card = model_card(FACTS)
    assert front_matter(card) == {
        "license": "apache-2.0",
        "base_model": "org/parent",
        "pipeline_tag": "text-generation",
        "tags": ["llmctl", "llama"],
    }
    for part in ("# small", "1,234 parameters", "int4 in groups of 32", "ab" * 32, "org/parent", "cd" * 32, "`0.003`", "`wsd`", "12.3457"):
        assert part in card
    assert "shards \\| a" in card, "a bar would make a cell of its own"
    assert model_card(FACTS) == card


def test_what_is_not_known_is_said_or_left_out() -> None:
    card = model_card(CardFacts(name="new", family="qwen3", num_parameters=5, num_format="float32"))
    assert "random weights" in card
    assert "Licence" not in card
    assert "## Data" not in card
    assert "not stated" in model_card(replace(FACTS, license=None))
    assert "license" not in front_matter(model_card(replace(FACTS, license=None)))


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=40))
def test_any_licence_survives_the_front_matter(text: str) -> None:
    text = text.strip()
    found = front_matter(model_card(replace(FACTS, license=text, parent=f"org/{text}")))
    assert found.get("license", "") == text
    assert found["base_model"] == f"org/{text}"
    assert "injected" not in found


def test_a_licence_is_read_from_a_cards_front_matter_only() -> None:
    assert license_of(model_card(FACTS)) == "apache-2.0"
    assert license_of("---\r\nlanguage: en\r\nlicense: mit\r\n---\r\ntext") == "mit"
    assert license_of("---\nlicense: 'cc-by-4.0'\n---\n") == "cc-by-4.0"
    assert license_of("# Title\nlicense: mit\n") is None
    assert license_of("") is None
