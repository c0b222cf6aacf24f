"""The collective algorithms: pure functions from (rank, size, segments) to a Schedule. `build` finds one by name.

An algorithm joins by adding its functions to BUILDERS and its cost to select.py; the tests then prove it like all the others.
"""

from __future__ import annotations

from collections.abc import Callable

from ringfold.collectives.algorithms import direct, ring
from ringfold.collectives.errors import ConfigError, nearest
from ringfold.collectives.schedule import Schedule

__all__ = ["BUILDERS", "build"]

# (op, algorithm, variant) -> the function that makes one rank's schedule; broadcast's take a root, barrier's no segments.
BUILDERS: dict[tuple[str, str, str], Callable[..., Schedule]] = {
    ("all_reduce", "ring", "pipelined"): ring.all_reduce,
    ("all_reduce", "direct", "registered"): direct.all_reduce,
    ("all_reduce", "direct", "exchange"): direct.all_reduce_exchange,
    ("all_reduce", "direct", "one_shot"): direct.all_reduce_one_shot,
    ("reduce_scatter", "ring", "pipelined"): ring.reduce_scatter,
    ("reduce_scatter", "direct", "registered"): direct.reduce_scatter,
    ("reduce_scatter", "direct", "exchange"): direct.reduce_scatter_exchange,
    ("all_gather", "ring", "pipelined"): ring.all_gather,
    ("all_gather", "direct", "registered"): direct.all_gather,
    ("all_gather", "direct", "exchange"): direct.all_gather_exchange,
    ("broadcast", "ring", "pipelined"): ring.broadcast,
    ("broadcast", "direct", "registered"): direct.broadcast,
    ("broadcast", "direct", "exchange"): direct.broadcast_exchange,
    ("barrier", "direct", "dissemination"): direct.barrier,
}


def build(op: str, algorithm: str, variant: str, rank: int, size: int, segments: int = 1, root: int = -1) -> Schedule:
    """Return one rank's schedule of the named algorithm; `root` is used by broadcast only.

    Raises:
        ConfigError: no such operation, algorithm or variant.
    """
    builder = BUILDERS.get((op, algorithm, variant))
    if builder is None:
        known = [" ".join(key) for key in BUILDERS]
        asked = f"{op} {algorithm} {variant}"
        guess = nearest(asked, known)
        raise ConfigError(
            f"no algorithm {asked!r} (operation, algorithm, variant)"
            + (f"; did you mean {guess!r}?" if guess else "")
            + f" Known: {', '.join(known)}."
        )
    if op == "barrier":
        return builder(rank, size)
    if op == "broadcast":
        return builder(rank, size, root, segments)
    return builder(rank, size, segments)
