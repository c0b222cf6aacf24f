"""The collective algorithms: pure functions from (rank, size, segments) to a Schedule. `build` finds one by name.

An algorithm joins by adding its functions to BUILDERS and its cost to select.py; the tests then prove it like all the others.
"""

from __future__ import annotations

from collections.abc import Callable

from ringfold.collectives.algorithms import direct, direct_registered, ring
from ringfold.collectives.errors import ConfigError, nearest
from ringfold.collectives.schedule import ROOTED, Schedule

__all__ = ["BUILDERS", "FALLBACKS", "build"]

# How a registered schedule goes on when some vector is not in registered memory: through the transport, or reading where the vectors lie.
FALLBACKS = ("exchange", "remote")

# (op, algorithm, variant) -> the function that makes one rank's schedule. All take rank and size; then those of rooted operations the root,
# and those that pipeline, all but barrier's and all_to_all's, the number of segments; and registered ones the name of their fallback.
BUILDERS: dict[tuple[str, str, str], Callable[..., Schedule]] = {
    ("all_reduce", "ring", "pipelined"): ring.all_reduce,
    ("all_reduce", "direct", "registered"): direct_registered.all_reduce,
    ("all_reduce", "direct", "exchange"): direct.all_reduce,
    ("all_reduce", "direct", "one_shot"): direct.all_reduce_one_shot,
    ("reduce_scatter", "ring", "pipelined"): ring.reduce_scatter,
    ("reduce_scatter", "direct", "registered"): direct_registered.reduce_scatter,
    ("reduce_scatter", "direct", "exchange"): direct.reduce_scatter,
    ("all_gather", "ring", "pipelined"): ring.all_gather,
    ("all_gather", "direct", "registered"): direct_registered.all_gather,
    ("all_gather", "direct", "exchange"): direct.all_gather,
    ("broadcast", "ring", "pipelined"): ring.broadcast,
    ("broadcast", "direct", "registered"): direct_registered.broadcast,
    ("broadcast", "direct", "exchange"): direct.broadcast,
    ("barrier", "direct", "dissemination"): direct.barrier,
    ("reduce", "direct", "registered"): direct_registered.reduce,
    ("reduce", "direct", "exchange"): direct.reduce,
    ("gather", "direct", "registered"): direct_registered.gather,
    ("gather", "direct", "exchange"): direct.gather,
    ("scatter", "direct", "registered"): direct_registered.scatter,
    ("scatter", "direct", "exchange"): direct.scatter,
    ("all_to_all", "direct", "registered"): direct_registered.all_to_all,
    ("all_to_all", "direct", "exchange"): direct.all_to_all,
}


def build(op: str, algorithm: str, variant: str, rank: int, size: int, segments: int = 1, root: int = -1, *, fallback: str = "exchange") -> Schedule:
    """Return one rank's schedule of the named algorithm.

    root: of broadcast, reduce, gather and scatter. fallback: of a registered variant, "remote" where ranks can read each other's memory.

    Raises:
        ConfigError: no such operation, algorithm, variant or fallback.
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
    if fallback not in FALLBACKS:
        raise ConfigError(f"no fallback {fallback!r} of {op}; known: {', '.join(FALLBACKS)}")
    arguments: list[object] = [rank, size]
    if op in ROOTED:
        arguments.append(root)
    if op not in ("barrier", "all_to_all"):
        arguments.append(segments)
    if variant == "registered":
        arguments.append(fallback)
    return builder(*arguments)
