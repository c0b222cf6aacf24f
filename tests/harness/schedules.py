"""Every algorithm that there is, with its fallback, as a subject of proof; and the ranks, roots and segments worth telling apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ringfold.collectives.algorithms import BUILDERS, FALLBACKS, build
from ringfold.collectives.schedule import ROOTED, Schedule

__all__ = ["SUBJECTS", "Subject", "groupings"]


@dataclass(frozen=True)
class Subject:
    """One way to run one operation."""

    op: str
    algorithm: str
    variant: str
    fallback: str = "exchange"

    def __str__(self) -> str:
        name = f"{self.op} {self.algorithm} {self.variant}"
        return name if self.fallback == "exchange" else f"{name} else {self.fallback}"

    @property
    def is_segmented(self) -> bool:
        return self.op not in ("barrier", "all_to_all")

    def schedules(self, size: int, segments: int = 1, root: int = 0, hosts: Sequence[int] = ()) -> list[Schedule]:
        """Return the schedules of all ranks; hierarchical ones for hosts of two and more if nothing is said."""
        if self.algorithm == "hierarchical" and not hosts:
            hosts = groupings(size)[-1]
        name = (self.op, self.algorithm, self.variant)
        return [build(*name, rank, size, segments, root, fallback=self.fallback, hosts=hosts) for rank in range(size)]

    def cases(self, size: int) -> Iterator[list[Schedule]]:
        """Yield all schedules worth telling apart: several segment counts (6 is more than the ring keeps in flight), several roots."""
        if self.fallback == "remote" and 9 < size < 17:
            return
        several = (1, 2, 3, 6) if size <= 4 else (1, 3) if size == 5 else (1 + size % 3,)
        for segments in several if self.is_segmented else (1,):
            for root in roots(self.op, size) if segments != 2 else [0]:
                for hosts in self._groupings(size):
                    yield self.schedules(size, segments, root, hosts)

    def _groupings(self, size: int) -> list[tuple[int, ...]]:
        """Return all groupings of few ranks, one of many: another one for each size."""
        ways = groupings(size) if self.algorithm == "hierarchical" else [()]
        return ways if size <= 9 else [ways[size % len(ways)]]


def roots(op: str, size: int) -> list[int]:
    """Return all roots of few ranks, the ends and the middle of many."""
    if op not in ROOTED:
        return [0]
    return list(range(size)) if size <= 4 else [0, size // 2, size - 1]


def groupings(size: int) -> list[tuple[int, ...]]:
    """Return ways to place ranks on hosts: all on one, each alone, one alone and the rest together, dealt out in turn, in pairs."""
    ranks = range(size)
    ways = [(0,) * size, tuple(ranks), tuple(min(rank, 1) for rank in ranks), tuple(rank % 3 for rank in ranks), tuple(rank // 2 for rank in ranks)]
    return list(dict.fromkeys(ways))


SUBJECTS = [Subject(*key, fallback) for key in BUILDERS for fallback in (FALLBACKS if key[2] == "registered" else ("exchange",))]
