"""Ranks: how many processes work together, how they are started, and what they agree on. torch.distributed only.

`place` reads the environment that torchrun or `--nproc` made, without torch. `ranks` holds what needs torch.
"""

from llmctl.core.distributed.place import Place, follow_launcher, leave_last_words, place_of

__all__ = ["Place", "follow_launcher", "leave_last_words", "place_of"]
