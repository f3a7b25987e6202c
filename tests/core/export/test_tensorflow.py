"""What we export loads in TensorFlow, bit for bit. Its Python is named by LLMCTL_TEST_TENSORFLOW, since it wants packages of its own."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmctl.core.config.export import ExportConfig
from llmctl.core.export.export import export
from tests.core.export.tiny import make_model

PYTHON = os.environ.get("LLMCTL_TEST_TENSORFLOW", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="LLMCTL_TEST_TENSORFLOW names no Python that has tensorflow")]

READ = """
import hashlib, json, sys
import tensorflow as tf
from safetensors.tensorflow import load_file

found = {}
for path in sys.argv[1:]:
    for name, tensor in load_file(path).items():
        whole = tf.bitcast(tensor, {2: tf.uint16, 4: tf.uint32}[tensor.dtype.size])  # the bits, whatever numpy knows of the dtype
        found[name] = [tensor.dtype.name, tensor.shape.as_list(), hashlib.sha256(whole.numpy().tobytes()).hexdigest()]
print(json.dumps(found))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_tensor_is_bit_equal_in_tensorflow(tmp_path: Path, dtype: str) -> None:
    """Of all shards of an export, in each number format."""
    model = make_model(tmp_path / "model")
    list(export(ExportConfig(model=str(model), output=tmp_path / "out", dtype=dtype, max_shard_size="60KB", verify=False)))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    environ = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    environ.pop("PYTHONPATH", None)
    done = subprocess.run([PYTHON, "-c", READ, *map(str, files)], capture_output=True, text=True, env=environ, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ours = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 1 or dtype != "float32"
    assert found.keys() == ours.keys()
    for name, tensor in ours.items():
        bits = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        kind = {"float16": "half"}.get(dtype, dtype)
        assert found[name][0] in (dtype, kind)
        assert found[name][1:] == [list(tensor.shape), hashlib.sha256(bits).hexdigest()], name
