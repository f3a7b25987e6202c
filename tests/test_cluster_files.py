"""The files for Slurm and Kubernetes: they parse, agree with each other, and start a command line that llmctl takes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmctl.cli.main import run
from tests.tiny_data import make_packed

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "cluster"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packed(tmp_path_factory.mktemp("data") / "packed", num_words=8000, val_words=300, times=400)


def manifests() -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all((FOLDER / "pretrain.yaml").read_text()))


def plan(packed: Path, command: list[str], gpus: str, capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `llmctl` makes of a command line of the files, as a plan for machines that are not here."""
    words = [str(FOLDER / "run.toml") if word.endswith("run.toml") else word for word in command]
    words[words.index("--out-dir") + 1] = str(packed.parent / "run")
    assert run([*words, "--data", str(packed), "--dry-run", "--plan-for", gpus, "--json", "--quiet"]) == 0, capfd.readouterr().err
    events = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    return next(event for event in events if event["event"] == "PlannedElsewhere")


def test_the_batch_script_starts_torchrun_on_each_node(packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = FOLDER / "pretrain.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    tools = {
        "scontrol": 'if [ "$1" = show ]; then echo node001; echo node002; else echo "$@" >> requeued; fi',
        "srun": 'shift; exec "$@"',
        "torchrun": f'exec {sys.executable} -c \'import json, sys; json.dump(sys.argv[1:], open("started", "w")); sys.exit(1)\' "$@"',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "status.json").write_text('{\n  "state": "interrupted"\n}\n')
    slurm = {"SLURM_JOB_NODELIST": "node[001-064]", "SLURM_JOB_NUM_NODES": "64", "SLURM_JOB_ID": "77", "SLURM_GPUS_ON_NODE": "8"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(script), "run.toml", "runs"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    started = json.loads((tmp_path / "started").read_text())
    assert started[started.index("--nnodes") + 1] == "64"
    assert started[started.index("--rdzv-endpoint") + 1] == "node001:29500"
    planned = plan(packed, started[started.index("llmctl") + 1 :], "512xH100", capfd)
    assert (planned["mesh"], planned["fits"]) == ("dp=64,fsdp=8,tp=1", True)


def test_the_manifest_starts_as_many_pods_as_torchrun_waits_for(packed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    service, job = manifests()
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    command = container["command"]
    flags = dict(word.split("=", 1) for word in command if word.startswith("--") and "=" in word)
    assert int(flags["--nnodes"]) == spec["completions"] == spec["parallelism"]
    assert int(flags["--nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    name = job["metadata"]["name"]
    assert flags["--rdzv-endpoint"] == f"{name}-0.{service['metadata']['name']}:29500"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert int(container["env"][0]["value"]) < pod["terminationGracePeriodSeconds"]
    planned = plan(packed, command[command.index("llmctl") + 1 :], "512xH100", capfd)
    assert planned["fits"]
