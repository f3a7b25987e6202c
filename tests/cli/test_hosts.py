"""Two machines, which are network namespaces here: they meet, one is lost, and the same command goes on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_data import make_packed

ROOT = Path(__file__).parent.parent.parent
ALONE = ["unshare", "-Urnm"]


def may_make_networks() -> bool:
    if not shutil.which("unshare") or not shutil.which("ip"):
        return False
    probe = "mount -t tmpfs tmpfs /run && mkdir /run/netns && ip netns add a && ip link add va type veth peer name vb"
    return subprocess.run([*ALONE, "sh", "-c", probe], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "cut"])
def test_two_hosts_meet_lose_each_other_and_go_on(tmp_path: Path, how: str) -> None:
    if not may_make_networks():
        pytest.skip("this user may not make network namespaces here")
    packed, run_dir = make_packed(tmp_path / "packed", num_words=2000, val_words=300), tmp_path / "run"
    arguments = [
        "pretrain", "--data", str(packed), "--out-dir", str(run_dir), "--depth", "1", "--seq-len", "32", "--batch-size", "4",
        "--max-steps", "100000", "--eval-every", "0", "--sample-every", "0", "--save-every", "5", "--device", "cpu", "--threads", "1",
        "--auto-resume", "--rank-timeout", "20",
    ]  # fmt: skip
    command = [*ALONE, sys.executable, "-m", "tests.cli.two_hosts", str(run_dir), how, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=2400)
    logs = "".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in sorted(tmp_path.glob("*.log")))
    assert done.returncode == 0, done.stderr + logs
    told = json.loads(done.stdout)
    assert told["ranks"] == [0, 1]
    assert told["status"] == "failed", logs
    assert told["status_at_the_end"] == "interrupted", logs
    assert told["steps"] == list(range(1, len(told["steps"]) + 1))
