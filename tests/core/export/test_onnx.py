"""ONNX graphs, computed by onnxruntime, against transformers' models of the same weights."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmctl.core.checkpoint import load_model
from llmctl.core.config.export import ExportConfig
from llmctl.core.errors import InputError, MissingExtraError, UsageError
from llmctl.core.export import onnx as onnx_format
from llmctl.core.export.events import Verified, Written
from llmctl.core.export.export import export
from tests.core.export.tiny import make_model
from tests.core.model.families import SETTINGS, VOCAB, random_tokens, reference_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

EXPRESSIBLE = [name for name in SETTINGS if not name.startswith(("mixtral", "qwen3_moe", "phi3-longrope"))]


def session_of(folder: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def run(
    session: Any, ids: np.ndarray, mask: np.ndarray, past: dict[str, np.ndarray] | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits and cache of a call as Optimum makes it: positions count what the mask holds."""
    names = [entry.name for entry in session.get_inputs()]
    shapes = {entry.name: entry.shape for entry in session.get_inputs()}
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
    if past is None:
        past = {n: np.zeros((len(ids), shapes[n][1], 0, shapes[n][3]), dtype=np.float32) for n in names[3:]}
    outputs = session.run(None, {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past})
    present = [entry.name.replace("present", "past_key_values") for entry in session.get_outputs()][1:]
    return outputs[0], dict(zip(present, outputs[1:], strict=True))


@pytest.mark.parametrize("setting", EXPRESSIBLE)
def test_prefill_and_decode_are_those_of_transformers(setting: str, tmp_path: Path) -> None:
    """Two rows, one of them padded on its left, in three calls with a cache: any batch, length and past."""
    reference = reference_model(setting)
    reference.save_pretrained(tmp_path / "model")
    onnx_format.write(tmp_path, load_model(tmp_path / "model").model)
    session = session_of(tmp_path)
    tokens, pad = random_tokens(2, 24), 5
    with torch.no_grad():
        wanted = [reference(tokens[:1]).logits[0].numpy(), reference(tokens[1:, pad:]).logits[0].numpy()]
    ids, mask = tokens.numpy(), np.ones((2, 24), dtype=np.int64)
    mask[1, :pad] = 0
    found, past = [], None
    for start, end in ((0, 13), (13, 23), (23, 24)):
        logits, past = run(session, ids[:, start:end], mask[:, :end], past)
        found.append(logits)
    logits = np.concatenate(found, axis=1)
    np.testing.assert_allclose(logits[0], wanted[0], atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(logits[1, pad:], wanted[1], atol=2e-5, rtol=1e-4)


def test_an_export_is_verified_and_stands_as_optimum_writes_it(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    events = list(export(ExportConfig(model=str(model), output=tmp_path / "out", format="onnx")))
    (verified,) = (event for event in events if isinstance(event, Verified))
    assert verified.reader == "onnxruntime"
    assert verified.largest_difference < 1e-4
    assert isinstance(events[-1], Written)
    assert {"model.onnx", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    graph = onnx.load(tmp_path / "out" / "model.onnx")
    layers = json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"]
    caches = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    names = [value.name for value in graph.graph.input]
    assert names == ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in caches)]
    assert [value.name for value in graph.graph.output] == ["logits", *(f"present.{name}" for name in caches)]
    dimensions = [d.dim_param or d.dim_value for d in graph.graph.input[3].type.tensor_type.shape.dim]
    assert dimensions[0] == "batch_size"
    assert dimensions[2] == "past_sequence_length"


def test_large_tensors_go_into_a_file_beside(tmp_path: Path) -> None:
    reference = reference_model("llama-gqa-tied")
    reference.save_pretrained(tmp_path / "model")
    onnx_format.write(tmp_path, load_model(tmp_path / "model").model, large_bytes=1000)
    assert (tmp_path / "model.onnx_data").stat().st_size > (tmp_path / "model.onnx").stat().st_size
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        wanted = reference(tokens).logits.numpy()
    found, _ = run(session_of(tmp_path), tokens.numpy(), np.ones((1, 9), dtype=np.int64))
    np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=1e-4)


def test_greedy_text_by_onnxruntime_is_transformers(tmp_path: Path) -> None:
    reference = reference_model("qwen3-tied-biases")
    reference.save_pretrained(tmp_path / "model")
    onnx_format.write(tmp_path, load_model(tmp_path / "model").model)
    session, prompt = session_of(tmp_path), random_tokens(1, 6)
    wanted = reference.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(prompt))[0]
    ids, past, text = prompt.numpy(), None, prompt[0].tolist()
    for _ in range(20):
        logits, past = run(session, ids, np.ones((1, len(text)), dtype=np.int64), past)
        text.append(int(logits[0, -1].argmax()))
        ids = np.array([[text[-1]]])
    assert text == wanted.tolist()
    assert max(text) < VOCAB


@pytest.mark.parametrize(("setting", "words"), [("mixtral-all-tied", "a mixture of experts"), ("phi3-longrope-short", "longrope")])
def test_what_a_graph_cannot_say_is_refused(setting: str, words: str, tmp_path: Path) -> None:
    reference_model(setting).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=words):
        list(export(ExportConfig(model=str(tmp_path / "model"), output=tmp_path / "out", format="onnx")))
    assert not (tmp_path / "out").exists()


def test_without_the_extra_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'llmctl\[onnx\]'") as caught:
        list(export(ExportConfig(model=str(make_model(tmp_path / "model")), output=tmp_path / "out", format="onnx")))
    assert caught.value.exit_code == 2


def test_other_number_formats_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="written in float32"):
        ExportConfig(model="m", output=tmp_path, format="onnx", dtype="bf16")


def test_the_example_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its greedy ids are transformers'."""
    reference = reference_model("gpt2-tied")
    reference.save_pretrained(tmp_path / "model")
    (tmp_path / "graph").mkdir()
    onnx_format.write(tmp_path / "graph", load_model(tmp_path / "model").model)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[3] / "docs" / "export.md").read_text(encoding="utf-8")
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "onnxruntime" in block)
    space: dict[str, Any] = {}
    exec(block.replace("[[464, 3290]]", "[[46, 32]]"), space)
    prompt = torch.tensor([[46, 32]])
    wanted = reference.generate(prompt, max_new_tokens=18, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(prompt))
    assert space["ids"].tolist() == wanted.tolist()
