"""Model cards: the front matter against a YAML parser, and what stands in the text."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.core.card import CardFacts, license_of, model_card, told_by

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


WORDS = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S"), exclude_characters="\\"), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(WORDS, st.floats(-(2**20), 2**20)), st.none() | WORDS.filter(lambda text: text != "random weights"))
def test_scores_and_parent_are_read_back(scores: dict[str, float], parent: str | None) -> None:
    told = told_by(model_card(replace(FACTS, scores=scores, parent=parent)))
    assert told.scores == {name: float(f"{value:.6g}") for name, value in scores.items()}
    assert told.parent == parent
    assert told.data == FACTS.data


def test_cards_of_others_say_nothing_that_we_would_hand_on() -> None:
    told = told_by("---\nlicense: mit\n---\n# Theirs\n\n## Scores\n\n| task | a | b |\n|---|---|---|\n| x | 1 | 2 |\n")
    assert (told.parent, told.data, told.scores) == (None, {}, {})


def test_the_card_of_an_adapter_is_one_for_peft() -> None:
    card = model_card(replace(FACTS, adapter="rank 4, alpha 8, 64 parameters"))
    assert front_matter(card)["library_name"] == "peft"
    assert front_matter(card)["base_model_relation"] == "adapter"
    assert "LoRA adapters (rank 4, alpha 8, 64 parameters) for a language model of the llama family" in card
