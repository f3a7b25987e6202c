"""What our export writes, run by llama.cpp itself (PyPI's llama-cpp-python): ids, logits and greedy texts.

It is taken from this Python, or from the one that $LLMCTL_TEST_LLAMA_CPP names, since it needs a compiler and no torch.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from llmctl.core.checkpoint import load_model, load_tokenizer, resolve_model
from llmctl.core.config.export import ExportConfig
from llmctl.core.export.export import export
from llmctl.core.model import KVCache
from tests.core.export.tiny import make_model
from tests.core.test_gguf_tokenizer import sentencepiece_file

pytestmark = pytest.mark.slow

_SCRIPT = """
import json, sys
import numpy as np
from llama_cpp import Llama

job = json.load(sys.stdin)
answers = []
for path in job["paths"]:
    model = Llama(path, n_ctx=job["context"], n_batch=job["context"], n_threads=1, n_threads_batch=1, n_gpu_layers=0, logits_all=True,
                  type_k=0, type_v=0, flash_attn=False, verbose=False, seed=0)
    answer = {"ids": [model.tokenize(text.encode(), add_bos=True, special=False) for text in job["texts"]]}
    if "tokens" in job:
        model.eval(job["tokens"])
        answer["logits"] = np.asarray(model.scores[: len(job["tokens"])], dtype=np.float64).tolist()
    answer["greedy"] = []
    for ids in answer["ids"] if "new" in job else []:
        model.reset()
        found = list(ids)
        for token in model.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0):
            found.append(token)
            if len(found) == len(ids) + job["new"]:
                break
        answer["greedy"].append(found)
    answers.append(answer)
    model.close()
json.dump(answers, sys.stdout)
"""


def llama_cpp(**job: Any) -> list[dict[str, Any]]:
    """What llama.cpp makes of some files."""
    python = os.environ.get("LLMCTL_TEST_LLAMA_CPP") or (sys.executable if importlib.util.find_spec("llama_cpp") else None)
    if python is None:
        pytest.skip("llama_cpp is not installed, and LLMCTL_TEST_LLAMA_CPP does not name a Python that has it")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", _SCRIPT], input=json.dumps({"context": 256, **job}), capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def greedy(path: Path, prompt: list[int], num_new: int) -> list[int]:
    """Our own greedy text, in float32."""
    model = load_model(path, dtype=torch.float32).model
    cache = KVCache(model.config, num_slots=1, capacity=len(prompt) + num_new)
    ids, new = list(prompt), torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(num_new):
            new = model.logits(model.hidden(new, cache=cache)[:, -1:]).argmax(-1)
            ids.append(int(new))
    return ids


def exported(model: str | Path, output: Path) -> Path:
    list(export(ExportConfig(model=str(model), output=output, format="gguf", dtype="f32")))
    return output


PROMPTS = ["Once upon a time there was a little fox who", 'The king\'s 3 daughters said: "No!"\n\nThen', "  naïve café, 日本語 — 1,234.5"]


@pytest.mark.parametrize("name", ["storyteller", "SmolLM2", "Gemma 3"])
def test_real_models_give_the_same_ids_and_greedy_text_at_f32(name: str, tmp_path: Path) -> None:
    variable = {"SmolLM2": "LLMCTL_TEST_SMOLLM2", "Gemma 3": "LLMCTL_TEST_GEMMA3"}.get(name)
    if variable is not None and variable not in os.environ:
        pytest.skip(f"{variable} is not set")
    model = resolve_model(name) if variable is None else Path(os.environ[variable])
    (answer,) = llama_cpp(paths=[str(exported(model, tmp_path / "m.gguf"))], texts=PROMPTS, new=40)
    tokenizer = load_tokenizer(model)
    wanted = tokenizer.encode_batch(PROMPTS)
    assert answer["ids"] == wanted
    for prompt, found in zip(wanted, answer["greedy"], strict=True):
        assert found == greedy(model, prompt, 40)


SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "llama-biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "llama-yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}},
    "llama-llama3": {
        "head_dim": 128,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "mistral": {"sliding_window": None, "head_dim": 32},
    "mixtral": {"num_local_experts": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "gemma": {"head_dim": 32},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 16, "num_hidden_layers": 7},
    "phi3": {"pad_token_id": None},
    "phi3-longrope": {
        "pad_token_id": None,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0 + i / 8 for i in range(8)],
            "long_factor": [2.0 + i for i in range(8)],
            "original_max_position_embeddings": 256,
        },
    },
    "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "smollm3": {"num_hidden_layers": 5, "pad_token_id": None},
    "olmo2": {"pad_token_id": None, "num_key_value_heads": 4},
    "gpt_neox": {"tie_word_embeddings": True},
    "gpt_neox-sequential": {"use_parallel_residual": False, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
}
_ROUGH = 0.02
"""Of the largest logit: llama.cpp looks GELU up in a table of float16, and has its approximation for GPT-NeoX's exact one."""


def test_every_family_gives_the_same_logits(tmp_path: Path) -> None:
    tokens = torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    paths, wanted = {}, {}
    for setting, changes in SETTINGS.items():
        folder = make_model(tmp_path / setting, model_type=setting.partition("-")[0], **changes)
        # a number for a name: llama.cpp looks for tokens of Phi-3's own in a model whose name has phi3 in it
        paths[setting] = exported(folder, tmp_path / f"{len(paths)}.gguf")
        with torch.no_grad():
            wanted[setting] = load_model(folder).model(tokens)[0].double()
    answers = llama_cpp(paths=[str(path) for path in paths.values()], texts=["the cat sat"], tokens=tokens[0].tolist())
    differences = {}
    for setting, answer in zip(paths, answers, strict=True):
        assert answer["ids"] == [load_tokenizer(paths[setting]).encode("the cat sat")], setting
        found = torch.tensor(answer["logits"], dtype=torch.float64)
        differences[setting] = float((found - wanted[setting]).abs().max() / wanted[setting].abs().max())
    for setting, difference in differences.items():
        assert difference < (_ROUGH if setting.startswith("g") and setting != "granite" else 1e-4), differences


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_sentencepiece_tokenizers_give_the_same_ids(architecture: str, tmp_path: Path) -> None:
    sentencepiece_file(tmp_path / "words.gguf", architecture=architecture)
    tokenizer = load_tokenizer(tmp_path / "words.gguf")
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    names = {"llama": ("<s>", "</s>"), "gemma3": ("<bos>", "<eos>")}[architecture]
    options = {"head_dim": 16, "query_pre_attn_scalar": 16} if architecture == "gemma3" else {}
    model_type = {"llama": "llama", "gemma3": "gemma3_text"}[architecture]
    folder = make_model(tmp_path / "m", model_type=model_type, backend=backend, names=names, vocab_size=500, **options)
    # llama.cpp puts a space before a text that begins with one too; transformers, whose reading ours follows, does not
    texts = [
        "Once upon a time",
        f"{'  ' if architecture == 'gemma3' else ''}two   spaces,\n\n1984",
        "été 世界 \U0001f600 there was",
        "don't stop\tnow",
        "wonder king's",
    ]
    (answer,) = llama_cpp(paths=[str(exported(folder, tmp_path / "m.gguf"))], texts=texts)
    assert answer["ids"] == load_tokenizer(folder).encode_batch(texts)
