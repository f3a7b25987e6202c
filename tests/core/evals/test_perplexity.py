"""Perplexity against a float64 brute force that reads one window, one token at a time."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from llmctl.core.errors import InputError
from llmctl.core.evals.events import TextScored
from llmctl.core.evals.perplexity import Definition, Document, combine, score_text
from llmctl.core.evals.progress import Progress
from llmctl.core.evals.tokens import BatchLimit
from tests.core.evals.tiny import SENTENCES, load, oracle

TEXT = " ".join(SENTENCES) * 3


def _score(
    model_dir: Path, documents: Sequence[Sequence[int]], *, context_size: int, stride: int, batch_size: int = 4, bos: str | None = None
) -> TextScored:
    model, _ = load(model_dir)
    events = score_text(
        model,
        [Document("text", ids, 10 * len(ids)) for ids in documents],
        name="text",
        definition=Definition(context_size, stride, bos),
        limit=BatchLimit(batch_size),
        progress=Progress(),
        stop=lambda: None,
    )
    *_, result = events
    assert isinstance(result, TextScored)
    return result


def _brute_force(model_dir: Path, documents: Sequence[Sequence[int]], *, context_size: int, stride: int) -> tuple[float, int]:
    """Nats and tokens, written from the definition: which tokens stand in the window that scores token t?"""
    log_probabilities = oracle(model_dir)
    total, count = 0.0, 0
    for ids in documents:
        for target in range(1, len(ids)):
            later = max(0, target - context_size)  # tokens beyond the first window
            end = context_size + stride * math.ceil(later / stride) if later else context_size
            end = min(end, len(ids) - 1)  # the last token that the window scores
            start = max(0, end - context_size)
            total -= float(log_probabilities(ids[start:target])[-1, ids[target]])
            count += 1
    return total, count


@pytest.mark.parametrize(("context_size", "stride"), [(64, 64), (16, 16), (16, 5), (16, 1), (1, 1), (40, 39)])
def test_nats_equal_the_brute_force(model_dir: Path, context_size: int, stride: int) -> None:
    _, tokenizer = load(model_dir)
    documents = [tokenizer.encode(TEXT)[:90], tokenizer.encode("a dog"), tokenizer.encode("où")]
    result = _score(model_dir, documents, context_size=context_size, stride=stride)
    nats, count = _brute_force(model_dir, documents, context_size=context_size, stride=stride)
    assert result.num_scored_tokens == count
    assert result.nll_nats == pytest.approx(nats, abs=2e-5 * count)
    metrics = {metric.name: metric.value for metric in result.metrics}
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert metrics["nats_per_token"] == pytest.approx(nats / count, rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(10 * len(ids) for ids in documents), rel=1e-5)


def test_batches_of_1_and_8_agree_within_rounding(model_dir: Path) -> None:
    _, tokenizer = load(model_dir)
    documents = [tokenizer.encode(text) for text in (TEXT, *SENTENCES)]
    one, eight = (_score(model_dir, documents, context_size=24, stride=8, batch_size=size) for size in (1, 8))
    assert one.nll_nats == pytest.approx(eight.nll_nats, rel=1e-6)
    assert (one.num_scored_tokens, one.num_windows) == (eight.num_scored_tokens, eight.num_windows)


def test_more_context_helps_a_stride_to_see_it(model_dir: Path) -> None:
    _, tokenizer = load(model_dir)
    ids = tokenizer.encode(TEXT)
    far, near = (_score(model_dir, [ids], context_size=32, stride=stride) for stride in (32, 4))
    assert far.num_scored_tokens == near.num_scored_tokens == len(ids) - 1
    assert near.num_windows > far.num_windows
    assert near.nll_nats != far.nll_nats


def test_documents_do_not_see_each_other(model_dir: Path) -> None:
    _, tokenizer = load(model_dir)
    first, second = tokenizer.encode(TEXT)[:50], tokenizer.encode(TEXT)[50:90]
    both = _score(model_dir, [first, second], context_size=64, stride=64)
    apart = [_score(model_dir, [ids], context_size=64, stride=64) for ids in (first, second)]
    assert both.nll_nats == pytest.approx(sum(result.nll_nats for result in apart), abs=1e-3)
    together = combine("all texts", apart, Definition(64, 64, None))
    assert together.nll_nats == pytest.approx(both.nll_nats, abs=1e-3)
    assert together.num_scored_tokens == both.num_scored_tokens
    assert together.num_documents == 2
    assert [m.value for m in together.metrics] == pytest.approx([m.value for m in both.metrics], rel=1e-5)


def test_the_definition_says_what_was_done() -> None:
    text = str(Definition(16, 8, None))
    assert "context 16, stride 8" in text
    assert "no BOS: the first token of a document is not scored" in text
    assert "BOS <s> before each document" in str(Definition(16, 8, "<s>"))
    assert "packed documents" in str(Definition(16, 8, None, whole_stream=True))


@pytest.mark.parametrize("documents", [[], [[]], [[5]]])
def test_nothing_to_score_is_an_error(model_dir: Path, documents: list[list[int]]) -> None:
    with pytest.raises(InputError, match="nothing to score"):
        _score(model_dir, documents, context_size=8, stride=8)
