"""SmolLM2-135M-Instruct on real data against numbers that transformers gave, with lm-evaluation-harness's formulas.

Needs LLMCTL_TEST_SMOLLM2 (its Q4_1 .gguf, or a directory made of it) and LLMCTL_TEST_DATA (which holds eval/ and corpora/).
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from llmctl.core.checkpoint import load_model_and_tokenizer
from llmctl.core.config.evaluate import EvaluateConfig
from llmctl.core.evals.events import ItemScored, TaskScored, TextScored
from llmctl.core.evals.perplexity import Definition, Document, score_text
from llmctl.core.evals.progress import Progress
from llmctl.core.evals.runner import evaluate
from llmctl.core.evals.tokens import BatchLimit

MODEL, DATA = os.environ.get("LLMCTL_TEST_SMOLLM2"), os.environ.get("LLMCTL_TEST_DATA")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MODEL is None or DATA is None, reason="LLMCTL_TEST_SMOLLM2 or LLMCTL_TEST_DATA is not set"),
]

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "golden_smollm2.json").read_text())["eval_first100_lm_eval_formula_no_bos"]
FIRST_100 = {
    task: {k: v for k, v in GOLDEN[task].items() if k in ("acc", "acc_norm", "perplexity")}
    for task in ("hellaswag", "piqa", "lambada_openai")
}
FIRST_HELLASWAG = GOLDEN["hellaswag"]["first3_loglikelihoods"]


@pytest.mark.parametrize("task", FIRST_100)
def test_the_first_hundred_items_score_as_published(task: str, tmp_path: Path) -> None:
    config = EvaluateConfig(
        model=MODEL, tasks=(task,), data=Path(DATA or "", "eval"), limit=100, bos="no", dtype="float32", device="cpu", cache_dir=tmp_path
    )
    events: list[Any] = list(evaluate(config))
    (result,) = [event for event in events if isinstance(event, TaskScored)]
    found = {metric.name: metric.value for metric in result.metrics}
    assert found == pytest.approx(FIRST_100[task], rel=1e-4)
    if task == "hellaswag":
        items = [event.log_likelihoods for event in events if isinstance(event, ItemScored)]
        for item, expected in zip(items, FIRST_HELLASWAG, strict=False):
            assert item == pytest.approx(expected, abs=2e-3)


def test_the_loss_of_a_text_equals_transformers() -> None:
    loaded, tokenizer = load_model_and_tokenizer(Path(MODEL or ""), dtype=torch.float32)
    text = Path(DATA or "", "corpora", "tinyshakespeare.txt").read_text(encoding="utf-8")[:9000]
    ids = tokenizer.encode(text, add_bos=False)[:2048]
    *_, result = score_text(
        loaded.model,
        [Document("tinyshakespeare", ids, len(text))],
        name="tinyshakespeare",
        definition=Definition(2048, 2048, None),
        limit=BatchLimit(1),
        progress=Progress(),
        stop=lambda: None,
    )
    assert isinstance(result, TextScored)
    assert result.num_scored_tokens == 2047
    assert result.nll_nats / 2047 == pytest.approx(3.6308658, abs=2e-5)
