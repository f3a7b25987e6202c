"""Equal beginnings of token lists. Knows lists; knows no slot and no model."""

MIN_SHARED = 16
"""Prompts that begin with fewer equal tokens than this are not worth a copy."""


def common_length(first: list[int], second: list[int], limit: int | None = None) -> int:
    """How many tokens at the beginning are equal, at most `limit`."""
    high = min(len(first), len(second) if limit is None else limit)
    if first[:high] == second[:high]:
        return high
    low = 0
    if first[:MIN_SHARED] != second[:MIN_SHARED]:  # the common case: nothing but a BOS is shared
        high = min(high, MIN_SHARED)
    while low < high - 1:  # first[:low] is shared, first[:high] is not
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low
