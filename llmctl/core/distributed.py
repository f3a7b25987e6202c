"""Ranks and what they agree on. Knows torch.distributed; knows no model and no training.

With one process every function here is the identity, so that callers have one path.
"""

import os


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0")) if _active() else 0


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if _active() else 1


def is_main() -> bool:
    """Whether this process writes files and draws."""
    return rank() == 0


def _active() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()
