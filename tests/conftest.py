"""What holds for every test: signals act as in a person's shell, torch computes with one thread, hypothesis looks at no clock.

Tests run in as many processes as there are cores (pytest-xdist); more threads than that would only wait for each other.
Property tests draw the same examples each time, so that a change is judged by what it changes; others come with
`--hypothesis-profile explore`.
"""

import os
import random
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["LLMCTL_CACHE_BYTES"] = "0"  # tests leave nothing in a person's cache; those of the cache have one of their own

# Processes that a script starts in the background ignore SIGINT, those under nohup SIGHUP, and children inherit that:
# the tests of Ctrl-C and hang-up would then test nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGTERM, signal.SIG_DFL)

settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", parent=settings.get_profile("explore"), derandomize=True)
settings.load_profile("same")


def pytest_runtest_setup() -> None:
    """The same draws for a test whatever ran before it in this process; which tests those are, pytest-xdist decides anew each time."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fsync in this process: it guards against a power cut, which no test can make, and takes much of the time."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small packed folder, which is only read."""
    from tests.tiny_data import make_packed

    return make_packed(tmp_path_factory.mktemp("data") / "packed", num_words=2000, val_words=300)
