"""Loading takes the memory of the weights and little more: peaks of processes of their own, in bytes, never in seconds."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from llmctl.core.checkpoint import load_config
from llmctl.core.families import family_named
from llmctl.core.model.facts import num_parameters, tensor_shapes
from tests.core.native.models import library_is_built

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from Linux's /proc")

ALLOWED_BYTES = 100 << 20
CONFIG = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}

_WORKER = """
import gc, sys
from pathlib import Path
import torch
from llmctl.core.checkpoint import load_model
import llmctl.core.checkpoint.gguf, llmctl.core.checkpoint.quantised, llmctl.core.families.gguf_tokenizer
torch.set_num_threads(1)
(torch.randn(64, 64) @ torch.randn(64, 64)).bfloat16().float()

def peak():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
before = peak()
loaded = load_model(Path(sys.argv[1]), dtype=getattr(torch, sys.argv[2]) if sys.argv[2] != "stored" else None)
with torch.inference_mode():
    loaded.model(torch.arange(8)[None])  # every weight is read once, so that mapped ones count
held = sum(tensor.numel() * tensor.element_size() for tensor in loaded.model.state_dict().values())
print(peak() - before, held, loaded.dtype)
"""

_PACKER = """
import gc, sys
from pathlib import Path
from llmctl.core.infer.source import open_source
from llmctl.core.native.packed import pack_model

def peak():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

source = open_source(Path(sys.argv[1]))
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = peak()
packed = pack_model(source.config, source.tensors(None if sys.argv[2] == "stored" else sys.argv[2]), dtype="float32")
print(peak() - before, packed.num_bytes, sys.argv[2])
"""


def write_folder(folder: Path, *, num_shards: int) -> None:
    """A model of 0.2 GB in float32."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    config, _, _ = load_config(folder)
    bindings = list(family_named("llama").bindings(config, tensor_shapes(config)))
    rng = np.random.default_rng(0)
    shards: list[dict[str, np.ndarray]] = [{} for _ in range(num_shards)]
    for i, binding in enumerate(bindings):
        shards[i % num_shards][binding.theirs] = 0.02 * rng.standard_normal(binding.their_shape, dtype=np.float32)
    names = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)] if num_shards > 1 else ["model.safetensors"]
    for name, tensors in zip(names, shards, strict=True):
        safetensors.numpy.save_file(tensors, folder / name)
    if num_shards > 1:
        weight_map = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def peak_of_loading(path: Path, dtype: str, *, worker: str = _WORKER) -> tuple[int, int, str]:
    """Peak above the imports and the size of the weights, in bytes, and their dtype."""
    done = subprocess.run([sys.executable, "-c", worker, str(path), dtype], capture_output=True, text=True, check=True)
    peak, held, name = done.stdout.split()
    return int(peak), int(held), name


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("big")
    write_folder(root / "single", num_shards=1)
    write_folder(root / "sharded", num_shards=3)
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize("kind", ["single", "sharded"])
@pytest.mark.parametrize("dtype", ["stored", "bfloat16"])
def test_a_directory_lands_once(kind: str, dtype: str, folders: dict[str, Path]) -> None:
    peak, held, name = peak_of_loading(folders[kind], dtype)
    config, _, _ = load_config(folders[kind])
    assert held == num_parameters(config).total * (4 if dtype == "stored" else 2)
    assert name == ("torch.float32" if dtype == "stored" else "torch.bfloat16")
    assert peak < held + ALLOWED_BYTES


@pytest.mark.parametrize("dtype", ["F32", "Q8_0"])
def test_a_gguf_file_lands_once(dtype: str, folders: dict[str, Path], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from llmctl.core.checkpoint import load_model
    from llmctl.core.export.gguf import write
    from llmctl.core.families.gguf import family_record

    loaded = load_model(folders["single"])
    tensors = {name: tensor.numpy() for name, tensor in loaded.model.state_dict().items()}
    write(tmp_path / "m.gguf", config=loaded.config, record=family_record("llama"), tensors=tensors, kind=dtype, extra={})
    assert gguf.GGUFReader(tmp_path / "m.gguf").tensors
    peak, held, _ = peak_of_loading(tmp_path / "m.gguf", "stored")
    assert peak < held + ALLOWED_BYTES


@pytest.mark.skipif(not library_is_built(), reason="the native library was not built")
@pytest.mark.parametrize("kind", ["single", "sharded"])
@pytest.mark.parametrize("quant", ["stored", "int8"])
def test_packing_for_the_native_executor_holds_the_packed_weights_and_not_the_file_beside_them(
    kind: str, quant: str, folders: dict[str, Path]
) -> None:
    peak, held, _ = peak_of_loading(folders[kind], quant, worker=_PACKER)
    assert peak < held + ALLOWED_BYTES
