"""The collective algorithms: pure functions from (rank, size, segments) to a Schedule. `build` finds one by name.

An algorithm joins by adding its functions to BUILDERS and its cost to `predict`; the tests then prove it like all the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ringfold.collectives.algorithms import direct, direct_registered, halving_doubling, hierarchical, ring, tree
from ringfold.collectives.cost import Cost, Topology
from ringfold.collectives.errors import ConfigError, nearest
from ringfold.collectives.schedule import ROOTED, Schedule

__all__ = ["BUILDERS", "FALLBACKS", "build", "predict"]

# How a registered schedule goes on when some vector is not in registered memory: through the transport, or reading where the vectors lie.
FALLBACKS = ("exchange", "remote")

# (op, algorithm, variant) -> the function that makes one rank's schedule. All take rank and size; then those of rooted operations the root,
# and those that pipeline, all but barrier's and all_to_all's, the number of segments; hierarchical ones the hosts, registered ones the
# name of their fallback.
BUILDERS: dict[tuple[str, str, str], Callable[..., Schedule]] = {
    ("all_reduce", "direct", "registered"): direct_registered.all_reduce,
    ("all_reduce", "direct", "one_shot"): direct.all_reduce_one_shot,
    ("all_reduce", "ring", "pipelined"): ring.all_reduce,
    ("all_reduce", "direct", "exchange"): direct.all_reduce,
    ("all_reduce", "halving_doubling", "chunks"): halving_doubling.all_reduce,
    ("all_reduce", "halving_doubling", "whole"): halving_doubling.all_reduce_whole,
    ("all_reduce", "tree", "double"): tree.all_reduce,
    ("all_reduce", "hierarchical", "sliced"): hierarchical.all_reduce,
    ("reduce_scatter", "direct", "registered"): direct_registered.reduce_scatter,
    ("reduce_scatter", "ring", "pipelined"): ring.reduce_scatter,
    ("reduce_scatter", "direct", "exchange"): direct.reduce_scatter,
    ("reduce_scatter", "halving_doubling", "chunks"): halving_doubling.reduce_scatter,
    ("reduce_scatter", "hierarchical", "sliced"): hierarchical.reduce_scatter,
    ("all_gather", "direct", "registered"): direct_registered.all_gather,
    ("all_gather", "ring", "pipelined"): ring.all_gather,
    ("all_gather", "direct", "exchange"): direct.all_gather,
    ("all_gather", "halving_doubling", "chunks"): halving_doubling.all_gather,
    ("all_gather", "hierarchical", "sliced"): hierarchical.all_gather,
    ("broadcast", "direct", "registered"): direct_registered.broadcast,
    ("broadcast", "ring", "pipelined"): ring.broadcast,
    ("broadcast", "direct", "exchange"): direct.broadcast,
    ("broadcast", "tree", "binomial"): tree.broadcast_binomial,
    ("broadcast", "tree", "double"): tree.broadcast,
    ("broadcast", "hierarchical", "sliced"): hierarchical.broadcast,
    ("reduce", "direct", "registered"): direct_registered.reduce,
    ("reduce", "ring", "pipelined"): ring.reduce,
    ("reduce", "direct", "exchange"): direct.reduce,
    ("reduce", "tree", "binomial"): tree.reduce_binomial,
    ("reduce", "tree", "double"): tree.reduce,
    ("reduce", "hierarchical", "sliced"): hierarchical.reduce,
    ("gather", "direct", "registered"): direct_registered.gather,
    ("gather", "direct", "exchange"): direct.gather,
    ("scatter", "direct", "registered"): direct_registered.scatter,
    ("scatter", "direct", "exchange"): direct.scatter,
    ("all_to_all", "direct", "registered"): direct_registered.all_to_all,
    ("all_to_all", "direct", "exchange"): direct.all_to_all,
    ("barrier", "direct", "dissemination"): direct.barrier,
}


def build(
    op: str,
    algorithm: str,
    variant: str,
    rank: int,
    size: int,
    segments: int = 1,
    root: int = -1,
    *,
    fallback: str = "exchange",
    hosts: Sequence[int] = (),
) -> Schedule:
    """Return one rank's schedule of the named algorithm.

    root: of broadcast, reduce, gather and scatter. fallback: of a registered variant, "remote" where ranks can read each other's memory. hosts: the
    host of each rank, for hierarchical; by default all share one.

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
    if algorithm == "hierarchical":
        arguments.append(hosts or (0,) * size)
    if variant == "registered":
        arguments.append(fallback)
    return builder(*arguments)


def predict(op: str, algorithm: str, variant: str, topology: Topology, nbytes: int, segments: int) -> Cost:
    """Return what the named algorithm costs for a vector of `nbytes`, with root 0."""
    if algorithm == "ring":
        return ring.cost(op, topology, nbytes, segments)
    if algorithm == "hierarchical":
        return hierarchical.cost(op, topology, nbytes, segments)
    if algorithm == "halving_doubling":
        return halving_doubling.cost(op, variant, topology, nbytes, segments)
    if algorithm == "tree":
        return tree.cost(op, variant, topology, nbytes, segments)
    if variant == "registered":
        return direct_registered.cost(op, topology, nbytes)
    return direct.cost(op, variant, topology, nbytes, segments)
