"""The peak of a process is its own, not that of the process which started it."""

import subprocess
import sys

from llmctl.core.memory import peak_bytes


def test_a_peak_is_that_of_the_process_alone() -> None:
    before = peak_bytes()
    ballast = bytearray(b"x") * (300 << 20)
    assert peak_bytes() >= 300 << 20
    assert peak_bytes() >= before
    code = "from llmctl.core.memory import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(ballast) == 300 << 20
    if sys.platform == "linux":
        assert 1 << 20 < int(done.stdout) < 100 << 20
