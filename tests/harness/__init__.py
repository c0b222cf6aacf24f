"""Run test functions as ranks: real processes, forked from one warm server, under a hard deadline.

    def check(world, count):
        ...
        return world.rank

    assert run_ranks(3, check, 1000, transport="tcp") == [0, 1, 2]

`run_ranks` is for tests in which every rank succeeds, or in which one failure is the claim (`pytest.raises` around it).
`spawn_ranks` gives a handle to processes that a test kills, watches and judges one by one.
"""

from tests.harness.ranks import Outcome, RankError, Ranks, RanksHung, run_ranks, spawn_ranks

__all__ = ["Outcome", "RankError", "Ranks", "RanksHung", "run_ranks", "spawn_ranks"]
