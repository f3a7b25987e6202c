"""What holds for every test: signals act as in a person's shell, and torch computes with one thread.

Tests run in as many processes as there are cores (pytest-xdist); more threads than that would only wait for each other.
"""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["LLMCTL_CACHE_BYTES"] = "0"  # tests leave nothing in a person's cache; those of the cache have one of their own

# Processes that a script starts in the background ignore SIGINT, those under nohup SIGHUP, and children inherit that:
# the tests of Ctrl-C and hang-up would then test nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
