"""BinaryCounter: add vectors one after the other in an order that is a tree of pairs, whatever is added at a time.

    1 2 3 4 5 6     (1 + 2), then ((1 + 2) + (3 + 4)), then (5 + 6); in the end (((1 + 2) + (3 + 4)) + (5 + 6))

So the sum of 8 vectors has the same bits if they come as 8, or as 4 sums of two, or as 2 sums of four: what exact mode needs, where a rank
adds microbatches that are already sums over ranks. At most log2 of their number are held at a time.
"""

from __future__ import annotations

import torch

__all__ = ["BinaryCounter"]


class BinaryCounter:
    """Sums of 2^k vectors, with falling k."""

    def __init__(self) -> None:
        self._sums: list[tuple[int, torch.Tensor]] = []

    def add(self, vector: torch.Tensor) -> None:
        """Add a copy of the vector."""
        level, total = 0, vector.clone()
        while self._sums and self._sums[-1][0] == level:
            total = self._sums.pop()[1].add_(total)
            level += 1
        self._sums.append((level, total))

    def take(self, into: torch.Tensor) -> None:
        """Write the sum of all that was added to `into`, zero if nothing was, and begin anew."""
        if not self._sums:
            into.zero_()
            return
        total = self._sums.pop()[1]
        while self._sums:
            total = self._sums.pop()[1].add_(total)
        into.copy_(total)
