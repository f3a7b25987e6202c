"""Two network namespaces as two machines, joined by one cable. Runs inside `unshare -Urnm`; see test_hosts.py.

python -m tests.cli.two_hosts RUN_DIR cut|kill ARGUMENTS...    what happened, as JSON on stdout
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
PATIENCE_S = 600


def lay_cable() -> None:
    """Both hosts, with a loopback each and a veth pair between them."""
    commands = ["mount -t tmpfs tmpfs /run", "mkdir -p /run/netns", *(f"ip netns add {host}" for host in ADDRESSES)]
    commands += ["ip link add va type veth peer name vb"]
    for host, address in ADDRESSES.items():
        inside = f"ip netns exec {host} ip"
        commands += [f"ip link set v{host} netns {host}", f"{inside} link set lo up"]
        commands += [f"{inside} addr add {address}/24 dev v{host}", f"{inside} link set v{host} up"]
    for command in commands:
        subprocess.run(command.split(), check=True, capture_output=True)


def start(host: str, job: str, log: Path, arguments: list[str]) -> "subprocess.Popen[bytes]":
    """torchrun on a host, with one process of two."""
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--max-restarts", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES['a']}:29511", "--rdzv-id", job]
    is_host = f"is_host={int(host == 'a')}"  # torchrun asks for the names of this machine's own addresses, of which a namespace has none
    command += ["--rdzv-conf", is_host, "--local-addr", ADDRESSES[host], "-m", "llmctl", *arguments]
    with open(log, "wb") as file:
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": f"v{host}"}
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def ranks(run_dir: Path) -> dict[int, int]:
    """Rank -> pid of the llmctl processes of these hosts."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
            environment = dict(line.partition(b"=")[::2] for line in (place / "environ").read_bytes().split(b"\0"))
        except OSError:
            continue
        if (
            os.fsencode(run_dir) in words
            and b"torch.distributed.run" not in words
            and b"GLOO_SOCKET_IFNAME" in environment
            and b"RANK" in environment
        ):
            found[int(environment[b"RANK"])] = int(place.name)
    return found


def lives(pid: int) -> bool:
    """Whether a process goes on; one that has ended stays in the table until its launcher, which may hang, looks at it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Until it holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.1)


def main() -> None:
    """A run over both hosts that is broken, and the same command once more."""
    run_dir, how, arguments = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    lay_cable()
    try:
        told = play(run_dir, how, arguments)
    finally:
        for pid in ranks(run_dir).values():
            os.kill(pid, signal.SIGKILL)
    sys.stdout.write(json.dumps(told) + "\n")


def play(run_dir: Path, how: str, arguments: list[str]) -> dict[str, object]:
    """What happened."""
    told: dict[str, object] = {}
    hosts = [start(host, "first", run_dir.with_name(f"first-{host}.log"), arguments) for host in ADDRESSES]
    wait_for(lambda: list(run_dir.glob("step-*")), "no checkpoint")
    told["ranks"] = sorted(ranks(run_dir))
    workers = ranks(run_dir)
    if how == "cut":
        subprocess.run(["ip", "netns", "exec", "b", "ip", "link", "set", "vb", "down"], check=True)
    else:
        os.kill(workers[1], signal.SIGKILL)
    broken = time.monotonic()
    wait_for(lambda: not any(lives(pid) for pid in workers.values()), "the ranks went on")
    told["ranks_ended_after_s"] = time.monotonic() - broken
    told["status"] = json.loads((run_dir / "status.json").read_text())["state"]
    for host in hosts:  # the launchers may wait longer for each other than the ranks did
        os.killpg(host.pid, signal.SIGTERM)
    for host in hosts:
        try:
            host.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(host.pid, signal.SIGKILL)
            host.wait()
    if how == "cut":
        subprocess.run(["ip", "netns", "exec", "b", "ip", "link", "set", "vb", "up"], check=True)
    saved = sorted(path.name for path in run_dir.glob("step-*"))[-1]
    again = [start(host, "second", run_dir.with_name(f"second-{host}.log"), arguments) for host in ADDRESSES]
    wait_for(lambda: sorted(path.name for path in run_dir.glob("step-*"))[-1] > saved, "the run did not go on")
    for pid in ranks(run_dir).values():
        os.kill(pid, signal.SIGTERM)
    for host in again:
        host.wait(PATIENCE_S)
    told["status_at_the_end"] = json.loads((run_dir / "status.json").read_text())["state"]
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    told["steps"] = [line["step"] for line in steps if line["kind"] == "step"]
    return told


if __name__ == "__main__":
    main()
