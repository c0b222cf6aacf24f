"""Traffic: what a train step sends, as its parts say before it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["Traffic"]

# The least that a rank of n must send of a vector, as a share of it (Patarasuk & Yuan, 2009); ring algorithms send just that.
SHARE = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "send": lambda _: 1.0,
}


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind and purpose: how many, and the bytes of their vectors together, over so many ranks."""

    purpose: str
    operation: str
    count: int
    nbytes: int
    ranks: int

    @property
    def sent_nbytes(self) -> float:
        """The least bytes that each rank has to send."""
        return self.nbytes * float(SHARE[self.operation](self.ranks))

    def times(self, number: int) -> Traffic:
        """Return the same, so often."""
        return replace(self, count=self.count * number, nbytes=self.nbytes * number)
