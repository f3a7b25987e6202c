"""The cost model of --plan-for: against hand-computed bytes, and against the memory that one process takes here."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmctl.core.config.mesh import Mesh
from llmctl.core.config.pretrain import PretrainConfig
from llmctl.core.errors import UsageError
from llmctl.core.families import family_of
from llmctl.core.model.facts import num_parameters
from llmctl.core.model.shapes import shape_for_depth
from llmctl.core.train import pretrain as pretraining
from llmctl.core.train.cluster import GPUS, RUNTIME_BYTES, SLACK, Cluster, Estimate, Work, estimate, parse_cluster
from llmctl.core.train.events import PlannedElsewhere
from tests.tiny_data import make_packed

LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
WORK = Work(seq_len=8192, batch_size=64, micro_batch_size=1, muon_share=0.0, recomputes=True)


def llama(mesh: Mesh, gpus: str = "64xH100", **change: Any) -> Estimate:
    config = family_of(LLAMA_8B, where="test").config_from_hf(LLAMA_8B)
    assert num_parameters(config).total == 8_030_261_248
    return estimate(config, mesh, parse_cluster(gpus), dataclasses.replace(WORK, **change))


def test_bytes_of_a_known_model() -> None:
    alone, spread = llama(Mesh(dp=64)), llama(Mesh(fsdp=64))
    assert alone.weight_bytes == pytest.approx(8.030261248e9 * (4 + 2) * SLACK)  # float32 masters, a bf16 copy
    assert alone.optimizer_bytes == pytest.approx(8.030261248e9 * 8 * SLACK)  # two float32 moments
    assert spread.weight_bytes == pytest.approx(8.030261248e9 * 4 / 64 * SLACK)
    assert spread.optimizer_bytes == pytest.approx(8.030261248e9 * 8 / 64 * SLACK)
    root = 2 * 128256 * 4096 + 4096
    layer = (8_030_261_248 - root) / 32
    gathered = 2 * (root + 2 * layer) + (2 + 4) * (root + layer)
    assert spread.other_bytes == pytest.approx(gathered * SLACK + RUNTIME_BYTES)
    assert alone.memory_bytes > GPUS["H100"].memory_bytes > spread.memory_bytes


def test_time_of_a_step_has_its_limits() -> None:
    spread = llama(Mesh(fsdp=64))
    flops = 6 * (8_030_261_248 - 128256 * 4096) * 8192 * 64
    at_peak = flops / (64 * 989e12)
    assert at_peak < spread.compute_s < 5 * at_peak
    moved = 63 / 64 * 8_030_261_248 * (2 + 2 + 4)  # gathered twice in bf16, scattered once in float32
    assert spread.communication_s > moved / 50e9
    assert spread.step_s >= spread.compute_s + spread.waiting_s
    within, between = llama(Mesh(fsdp=8), "8xH100", batch_size=8), llama(Mesh(fsdp=16), "16xH100", batch_size=16)
    assert between.communication_s > 5 * within.communication_s
    assert llama(Mesh(fsdp=8, tp=8)).waiting_s > llama(Mesh(dp=8, fsdp=8)).waiting_s
    slower = [llama(Mesh(fsdp=64), f"64x{kind}").compute_s for kind in ("B200", "H100", "A100", "L4")]
    assert slower == sorted(slower)


def test_clusters_are_read_and_refused() -> None:
    assert parse_cluster("128xa100-40g") == Cluster("A100-40G", 128)
    for text in ("H100", "0xH100", "8xH1000", "x"):
        with pytest.raises(UsageError, match="--plan-for"):
            parse_cluster(text)
    with pytest.raises(UsageError, match="--dry-run"):
        PretrainConfig(plan_for="8xH100")


def test_a_dry_run_plans_for_machines_that_are_not_here(tmp_path: Path) -> None:
    packed = make_packed(tmp_path / "packed", num_words=400, val_words=100)
    settings: dict[str, Any] = {"data": packed, "depth": 4, "seq_len": 32, "batch_size": 16, "max_steps": 7, "dry_run": True}
    (plan,) = pretraining.train(PretrainConfig(**settings, plan_for="8xH100", mesh="fsdp=4"))
    assert isinstance(plan, PlannedElsewhere)
    assert (plan.gpus, plan.mesh, plan.fits, plan.num_steps) == ("8xH100", "dp=2,fsdp=4,tp=1", True, 7)
    assert plan.total_s == pytest.approx(7 * plan.step_s)
    with pytest.raises(UsageError, match="does not divide the 6 processes"):
        list(pretraining.train(PretrainConfig(**settings, plan_for="6xH100", mesh="fsdp=4")))
    with pytest.raises(UsageError, match="cannot share it equally"):
        list(pretraining.train(PretrainConfig(**settings, plan_for="64xH100")))


MEASURE = """
import json, sys, torch
from llmctl.core.data.loader import Batch
from llmctl.core.model import Decoder
from llmctl.core.model.shapes import shape_for_depth
from llmctl.core.train.objectives import NextToken
from llmctl.core.train.optim import MasterOptimizer, OptimConfig

def train(depth, rows, seq_len, vocab_size):
    model = Decoder(shape_for_depth(depth, vocab_size, seq_len, "qwen3"))
    model.init_weights(torch.Generator().manual_seed(0))
    model.train()
    optimizer = MasterOptimizer(model, OptimConfig(kind="adamw"), hidden_matrices=(), compute_dtype=torch.float32)
    ids = torch.randint(0, vocab_size, (rows, seq_len + 1))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    for _ in range(2):
        optimizer.zero_gradients()
        NextToken().loss(model, batch, total_weight=float(rows * seq_len)).backward()
        optimizer.collect()
        optimizer.clip()
        optimizer.step(lr_scale=1.0)

def peak():  # ru_maxrss begins with that of the process which started this one
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_num_threads(1)
train(1, 2, 64, 256)  # so that the libraries' own pages are there before
before = peak()
train(*json.loads(sys.argv[1]))
print(peak() - before)
"""


MEASURE_RUN = """
import json, resource, sys
from pathlib import Path
from llmctl.core.config.pretrain import PretrainConfig
from llmctl.core.train import pretrain as pretraining
from llmctl.core.train.events import Planned, StepDone

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def steps(out_dir, **settings):
    common = {"max_steps": 3, "save_every": 0, "eval_every": 0, "sample_every": 0, "threads": 1, "dtype": "f32", "device": "cpu"}
    for event in pretraining.train(PretrainConfig(data=Path(sys.argv[1]), out_dir=Path(out_dir), **common, **settings)):
        if isinstance(event, Planned):
            planned = event.memory_bytes
        if isinstance(event, StepDone) and event.step == 2:  # before anything is saved or evaluated
            return planned, peak()

_, before = steps(sys.argv[2] + "/small", depth=1, seq_len=32, batch_size=2)  # so that the libraries' own pages are there before
planned, after = steps(sys.argv[2] + "/run", **json.loads(sys.argv[3]))
print(json.dumps([planned, after - before]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize(
    "settings",
    [
        {"depth": 8, "seq_len": 64, "batch_size": 2, "optimizer": "adamw"},
        {"depth": 8, "seq_len": 64, "batch_size": 2, "optimizer": "muon"},
        {"depth": 4, "seq_len": 256, "batch_size": 16, "micro_batch_size": 16},
        {"depth": 4, "seq_len": 128, "batch_size": 8, "micro_batch_size": 4, "family": "gpt2"},
    ],
    ids=["mostly AdamW", "mostly Muon", "mostly activations", "micro-batches"],
)
def test_a_run_takes_the_memory_that_its_plan_says(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The steps of a whole run in one process, to a third of the plan."""
    packed = make_packed(tmp_path / "packed", num_words=8000, val_words=300)
    command = [sys.executable, "-c", MEASURE_RUN, str(packed), str(tmp_path), json.dumps(settings)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    planned, taken = json.loads(done.stdout)
    assert taken == pytest.approx(planned, rel=1 / 3)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory in /proc")
@pytest.mark.parametrize("shape", [(8, 2, 128, 8192), (4, 8, 256, 2048)], ids=["mostly weights", "mostly activations"])
def test_memory_is_within_a_third_of_what_one_process_takes(shape: tuple[int, int, int, int]) -> None:
    depth, rows, seq_len, vocab_size = shape
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(shape)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    work = Work(seq_len=seq_len, batch_size=rows, micro_batch_size=rows, muon_share=0.0, compute_bytes=4)
    guess = estimate(shape_for_depth(depth, vocab_size, seq_len, "qwen3"), Mesh(), Cluster("H100", 1), work)
    assert int(done.stdout) == pytest.approx(guess.memory_bytes - RUNTIME_BYTES, rel=1 / 3)
