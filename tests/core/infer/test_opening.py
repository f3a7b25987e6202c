"""Which executor opens a model, and that both give the same text."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from llmctl.core import sharedlib
from llmctl.core.errors import UsageError
from llmctl.core.infer.events import Finished
from llmctl.core.infer.generator import Generator
from llmctl.core.infer.opening import open_model
from llmctl.core.native import library
from tests.cli.tiny_model import make_model
from tests.core.native.models import library_is_built, runnable_kernels

ROOT = Path(__file__).parents[3]
needs_library = pytest.mark.skipif(not library_is_built(), reason="the native library was not built")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def answers(generator: Generator, *, temperature: float, num_slots_used: int = 3) -> list[tuple[int, ...]]:
    requests = [
        generator.request("Once upon a time " * (1 + i), id=i, seed=5, max_new_tokens=30, temperature=temperature)
        for i in range(num_slots_used)
    ]
    done = [event for event in generator.engine.run(requests) if isinstance(event, Finished)]
    return [event.token_ids for event in sorted(done, key=lambda event: str(event.id))]


@needs_library
def test_both_executors_give_the_same_greedy_ids(model: Path) -> None:
    found = {}
    for executor in ("native", "torch"):
        generator = Generator.open(model, device="cpu", executor=executor, threads=1, num_slots=2)
        assert generator.executor_kind == executor
        found[executor] = answers(generator, temperature=0)
    assert found["native"] == found["torch"]


@needs_library
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantised_weights_run_natively_and_a_text_does_not_depend_on_the_batch(model: Path, quant: Literal["int8", "int4"]) -> None:
    found = []
    for threads, slots in ((1, 3), (2, 1)):
        generator = Generator.open(model, device="cpu", executor="native", threads=threads, num_slots=slots, quant=quant)
        assert f"{quant} in float32 on cpu" in generator.description
        found.append(answers(generator, temperature=1.0))
    assert found[0] == found[1]


@needs_library
def test_sampled_texts_do_not_depend_on_the_batch(model: Path) -> None:
    several, alone = (
        answers(Generator.open(model, device="cpu", executor="native", threads=threads, num_slots=slots), temperature=1.0)
        for threads, slots in ((1, 3), (2, 1))
    )
    assert several == alone


@needs_library
def test_the_description_says_what_runs(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = runnable_kernels()[-1]
    monkeypatch.setenv(library.ISA_VARIABLE, name)
    assert open_model(model, device="cpu", threads=2).description == f"llama, float32 on cpu, native ({name}, 2 threads)"
    assert open_model(model, device="cpu", executor="torch").description.endswith("torch (as asked for)")


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"quant": "int4", "dtype": "bfloat16"}, "quantised"), ({"dtype": "float16"}, "float16"), ({"device": "cuda"}, "not on cuda")],
)
def test_asking_for_the_native_executor_where_it_cannot_run_is_an_error(model: Path, options: dict[str, str], reason: str) -> None:
    with pytest.raises(UsageError, match=f"--executor native.*{reason}"):
        open_model(model, executor="native", **options)  # type: ignore[arg-type]


def test_without_the_library_torch_runs_and_says_why(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sharedlib, "PATH", tmp_path / "none.so")
    library.load.cache_clear()
    try:
        opened = open_model(model, device="cpu")
        assert (opened.kind, "was not built" in opened.description) == ("torch", True)
        (tmp_path / "none.so").write_bytes(b"no library")
        assert "cannot be loaded" in open_model(model, device="cpu").description
    finally:
        monkeypatch.undo()
        library.load.cache_clear()


UNNEEDED = {
    *("torch", "transformers", "safetensors", "huggingface_hub", "jinja2", "rich", "typer", "pydantic", "llguidance"),
    *("tomllib", "socket", "importlib.metadata", "concurrent.futures", "numpy.random", "secrets", "difflib", "subprocess"),
    *(f"llmctl.cli.{name}" for name in ("tokenize", "pretrain", "finetune", "eval", "export", "generate_batch", "generate_talk")),
    *(f"llmctl.core.config.{name}" for name in ("pretrain", "finetune", "evaluate", "export", "tokenize", "pack")),
    *("llmctl.core.card", "llmctl.core.hub", "llmctl.core.gguf", "llmctl.core.families.gguf"),
    *("llmctl.core.tokenizer.train", "llmctl.core.tokenizer.chat", "llmctl.core.infer.beam", "llmctl.core.infer.preset"),
}
"""What an answer from a prompt does without: each of these, imported, makes every start longer."""


@needs_library
def test_the_native_path_imports_nothing_that_it_does_without(model: Path) -> None:
    program = (
        "import sys, json; from llmctl.cli.main import run; code = run(sys.argv[1:]); "
        f"print(json.dumps(sorted({UNNEEDED!r} & sys.modules.keys())), file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "generate", "-m", str(model), "--device", "cpu", "-v", "x", "-n", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert "on cpu, native (" in done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == []
