"""Several packed corpora as one stream of samples, in given parts. Knows sources of samples; knows no files and no model.

All samples have the same length, so parts of the samples are parts of the tokens. The samples come in blocks of as many as
the whole numbers of the parts sum to (0.7 and 0.3: 7 and 3, blocks of 10), and every block has exactly those numbers of
each source, in an order drawn for the block. So what was taken of each source after i samples is known without a count,
and sample i is still a function of (data, seed, i) alone.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from llmctl.core.data.loader import Permutation, PretrainSource, Sample, SampleSource

_LARGEST_BLOCK = 10_000
"""Parts are kept to four digits, so that a block, and what it can be off in its middle, stays small."""


@dataclass(frozen=True)
class SourceUse:
    """What a run takes of one source: its part of all tokens, the tokens it holds, those taken, and how many passes that is."""

    name: str
    share: float
    data_tokens: int
    num_tokens: int
    epochs: float


def whole_parts(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the proportion of `weights` (above 0), each at least 1, summing to about 10,000 at most."""
    total = sum(weights)
    fractions = [Fraction(weight / total).limit_denominator(_LARGEST_BLOCK) for weight in weights]
    size = math.lcm(*(fraction.denominator for fraction in fractions))
    if size <= _LARGEST_BLOCK and sum(fractions) == 1 and min(fractions) > 0:
        numbers = [int(fraction * size) for fraction in fractions]
    else:
        numbers = [max(1, round(weight / total * _LARGEST_BLOCK)) for weight in weights]
    divisor = math.gcd(*numbers)
    return tuple(number // divisor for number in numbers)


class MixtureSource:
    """Samples of several sources; see the module. Sample numbers of each source run on through its own epochs.

    An epoch of the mixture is as many samples as all sources have together. `data_hash` changes with any source, its
    part, or their order.
    """

    def __init__(self, sources: Sequence[PretrainSource], parts: Sequence[int], seed: int) -> None:
        if len(sources) != len(parts) or len({source.seq_len for source in sources}) != 1 or min(parts) < 1:
            raise ValueError(f"{len(sources)} sources in the parts {parts}")
        self.sources = tuple(sources)
        self.parts = tuple(parts)
        self.seq_len = sources[0].seq_len
        self.samples_per_epoch: int = sum(source.samples_per_epoch for source in sources)
        text = "\n".join(f"{part} {source.data_hash}" for source, part in zip(sources, parts, strict=True))
        self.data_hash = hashlib.sha256(f"llmctl mixture\n{text}".encode()).hexdigest()
        self._seed = seed
        self._starts = np.cumsum([0, *parts])
        self._block_size = int(self._starts[-1])
        self._block: tuple[int, Permutation] | None = None

    def sample_at(self, index: int) -> Sample:
        """Sample number `index` from 0 on, counted over all epochs and ranks."""
        source, number = self.place_of(index)
        return self.sources[source].sample_at(number)

    def place_of(self, index: int) -> tuple[int, int]:
        """Which source sample `index` comes from, and which of that source's samples it is."""
        if index < 0:
            raise IndexError(f"sample {index}")
        block, place = divmod(index, self._block_size)
        cached = self._block  # read once: a prefetching thread and its consumer may both be here
        if cached is None or cached[0] != block:
            cached = self._block = (block, Permutation(self._block_size, f"mixture {self._seed} {block}".encode()))
        slot = cached[1](place)
        source = int(np.searchsorted(self._starts, slot, side="right")) - 1
        return source, block * self.parts[source] + slot - int(self._starts[source])

    def counts(self, num_samples: int) -> tuple[int, ...]:
        """How many of the first `num_samples` samples each source gives."""
        block, rest = divmod(num_samples, self._block_size)
        found = [block * part for part in self.parts]
        for index in range(num_samples - rest, num_samples):
            found[self.place_of(index)[0]] += 1
        return tuple(found)

    def uses(self, num_samples: int) -> tuple[SourceUse, ...]:
        """What `num_samples` samples take of each source, which is called by its folder's name where that tells it apart."""
        folders = [source.dataset.directory for source in self.sources]
        names = [folder.name if [f.name for f in folders].count(folder.name) == 1 else str(folder) for folder in folders]
        return tuple(
            SourceUse(
                name=name,
                share=part / self._block_size,
                data_tokens=source.dataset.num_tokens,
                num_tokens=count * self.seq_len,
                epochs=count / source.samples_per_epoch,
            )
            for name, source, part, count in zip(names, self.sources, self.parts, self.counts(num_samples), strict=True)
        )


class InterleavedSource:
    """Finite sources as one, each spread evenly over the whole: a beginning of it holds of each as much as the whole does."""

    def __init__(self, sources: Sequence[SampleSource]) -> None:
        self.sources = tuple(sources)
        self.seq_len = sources[0].seq_len
        self.data_hash = hashlib.sha256("\n".join(source.data_hash for source in sources).encode()).hexdigest()
        lengths = [source.samples_per_epoch or 0 for source in sources]
        self.samples_per_epoch: int = sum(lengths)
        places = np.concatenate([(np.arange(length) + 0.5) / length for length in lengths])
        self._order = np.argsort(places, kind="stable")
        self._starts = np.cumsum([0, *lengths])

    def sample_at(self, index: int) -> Sample:
        """Sample number `index`. Raises IndexError past the end."""
        number = int(self._order[index])
        source = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.sources[source].sample_at(number - int(self._starts[source]))
