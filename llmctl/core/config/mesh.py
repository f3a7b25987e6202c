"""How processes are arranged for training: `--mesh dp=2,fsdp=4,tp=1`. Stdlib only; knows no process."""

import math
from dataclasses import dataclass

from llmctl.core.errors import UsageError

_NAMES = ("dp", "fsdp", "tp")


@dataclass(frozen=True)
class Mesh:
    """`dp` copies of the model, each spread over `fsdp` processes, each layer of it split over `tp`."""

    dp: int = 1
    fsdp: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.dp * self.fsdp * self.tp

    @property
    def data_size(self) -> int:
        """Processes that each take their own rows of a batch; the `tp` of a layer take the same ones."""
        return self.dp * self.fsdp

    @property
    def shards(self) -> bool:
        """Whether a process holds less than the whole model."""
        return self.fsdp > 1 or self.tp > 1

    def __str__(self) -> str:
        return f"dp={self.dp},fsdp={self.fsdp},tp={self.tp}"


def parse_mesh(text: str | None, *, num_processes: int | None) -> Mesh:
    """The mesh that `text` describes over `num_processes` (None: as many as it says). Raises UsageError.

    One of the three that is left out is 1, but `dp`, which takes the processes that are left. No text is dp alone.
    """
    given: dict[str, int] = {}
    for part in (text or "").split(",") if text is not None else ():
        name, _, number = part.strip().partition("=")
        if name not in _NAMES or not number.isdecimal() or int(number) < 1 or name in given:
            raise UsageError(f"--mesh {text!r}: write it like dp=2,fsdp=4,tp=1, each once and from 1 on")
        given[name] = int(number)
    if "dp" not in given:
        rest = math.prod(given.values())
        if num_processes is not None and num_processes % rest:
            raise UsageError(f"--mesh {text}: {rest} does not divide the {num_processes} processes there are")
        given["dp"] = 1 if num_processes is None else num_processes // rest
    mesh = Mesh(**given)
    if num_processes is not None and mesh.size != num_processes:
        raise UsageError(f"--mesh {text}: makes {mesh.size} processes, there are {num_processes}; change it, --nproc or torchrun's numbers")
    return mesh
