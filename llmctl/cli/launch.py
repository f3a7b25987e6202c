"""`--nproc`: this command in several processes. Knows the command line; what they do together is core's."""

import os
import sys
from collections.abc import Mapping


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether `--nproc` started this process."""
    from llmctl.core.distributed.place import LAUNCHED

    return LAUNCHED in environ


def start_ranks(num_processes: int | None, *, threads: int | None) -> bool:
    """Run this command line in `num_processes` processes and wait for them; False where this one is to do the work itself.

    That is so with one process, and in the processes themselves, whoever started them. Raises what ended them.
    """
    from llmctl.core.distributed import follow_launcher, place_of

    place = place_of(os.environ)
    if place.size > 1:
        follow_launcher()
        return False
    if num_processes is None or num_processes == 1:
        return False
    from llmctl.core.distributed.launch import launch

    launch(sys.argv[1:], num_processes=num_processes, threads=threads)
    return True
