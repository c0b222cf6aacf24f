"""Which blocks to keep so that they fit into a budget and the rest takes the least time to recompute: the 0/1 knapsack problem.

Nemhauser and Ullmann's dynamic program (1969): of all sets of the first i blocks, only those stay for which no other has fewer bytes and
saves as much time. That is exact, and short where blocks are alike, as in a transformer. Where more than LIMIT sets stay, bytes
are rounded up to the LIMIT-th part of the budget: the choice still fits, and is as good as the best one for a budget that is smaller by
that part for each block (1 % for 100 blocks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["choose_kept"]

LIMIT = 10_000

State = tuple[int, float, "State | None", int]  # bytes, seconds saved, the state before, and the block that was added to it


def choose_kept(costs: Mapping[str, tuple[int, float]], budget: int, limit: int = LIMIT) -> frozenset[str]:
    """Return the names of the blocks to keep, for costs {name: (bytes if kept, seconds if recomputed)}.

    Blocks that cost no bytes are always kept. Deterministic: equal costs give the same choice on every rank.
    """
    names = [name for name, (nbytes, _) in costs.items() if nbytes]
    best = _best([costs[name] for name in names], budget, limit)
    if best is None:
        unit = -(-budget // limit)
        best = _best([(-(-costs[name][0] // unit), costs[name][1]) for name in names], budget // unit, limit + 1)
        assert best is not None  # there are limit + 1 different sums at most
    return frozenset(names[index] for index in best) | (costs.keys() - names)


def _best(items: Sequence[tuple[int, float]], capacity: int, limit: int) -> list[int] | None:
    """Return the indexes of the best set, or None if more than `limit` sets stay."""
    states: list[State] = [(0, 0.0, None, -1)]
    for index, (weight, value) in enumerate(items):
        added: list[State] = [(state[0] + weight, state[1] + value, state, index) for state in states if state[0] + weight <= capacity]
        merged = sorted([*states, *added], key=lambda state: (state[0], -state[1]))
        states = merged[:1]
        for state in merged:
            if state[1] > states[-1][1]:
                states.append(state)
        if len(states) > limit:
            return None
    chosen = []
    last: State | None = states[-1]
    while last is not None and last[3] >= 0:
        chosen.append(last[3])
        last = last[2]
    return chosen
