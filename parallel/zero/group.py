"""ShardGroup: the ranks among which a model is cut, and those that hold the same cuts.

zero2 on dp4:          shard = 0 1 2 3                       every rank owns a quarter
zero2:group2 on dp4:   shard = 0 1 | 2 3   replicas = 0 2 | 1 3     every rank owns a half, which another owns, too
"""

from __future__ import annotations

from ringfold.collectives.communicator import Communicator

__all__ = ["ShardGroup"]


class ShardGroup:
    """Communicators of one model's shards, private to it; made by all ranks of `comm` together. `size` divides the ranks of `comm`.

    exact: sums over ranks are to be a fixed tree, ((0 + 1) + (2 + 3)) + ..., which `pairs` are the levels of; the ranks are a power of two.
    """

    def __init__(self, comm: Communicator, size: int | None = None, exact: bool = False) -> None:
        size = size or comm.size
        first = comm.rank - comm.rank % size
        self.whole = comm.subgroup(range(comm.size), f"zero of {comm.name}")
        self.shard = self.whole if size == comm.size else comm.subgroup(range(first, first + size), f"zero shards of {comm.name}")
        self.replicas = None if size == comm.size else comm.subgroup(range(comm.rank % size, comm.size, size), f"zero replicas of {comm.name}")
        self.pairs: list[Communicator] = []
        distance = 1
        while exact and distance < comm.size:
            low = comm.rank & ~distance
            self.pairs.append(comm.subgroup([low, low | distance], f"zero pairs {distance} apart of {comm.name}"))
            distance *= 2

    @property
    def rank(self) -> int:
        """This rank's place among those that share the model."""
        return self.shard.rank

    @property
    def size(self) -> int:
        """The number of ranks that share the model."""
        return self.shard.size

    def close(self) -> None:
        for comm in (*self.pairs, self.replicas, self.shard, self.whole):
            if comm is not None:
                comm.close()  # twice where shard is whole, which it allows
