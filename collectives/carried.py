"""What transports in Python libraries (MPI, NCCL, a shared GPU) have in common: an operation's place in the core's books, and its schedule.

The core keeps the record, the deadline and the failure of an operation that another library carries out: `core.leave(handle)` says that it is
complete, `core.abandon` that it cannot be; `core.done` before either says that it has failed.
"""

from __future__ import annotations

from dataclasses import replace

from ringfold.collectives import select
from ringfold.collectives._native import core
from ringfold.collectives.codes import ALGORITHMS, DTYPES, MESSAGES, OPERATIONS, REDUCTIONS
from ringfold.collectives.cost import Topology
from ringfold.collectives.session import Session
from ringfold.collectives.transport import Request

__all__ = ["choose", "enter"]


def enter(session: Session, communicator: object, carrier: str, request: Request, algorithm: str, timeout_s: float) -> object:
    """Note an operation in the core's books and return its handle."""
    return core.enter(
        communicator,
        carrier,
        ALGORITHMS[algorithm],
        OPERATIONS[request.op],
        DTYPES[str(request.dtype).removeprefix("torch.")],
        REDUCTIONS[request.reduction],
        request.tag if request.op in MESSAGES else request.root,
        request.peer,
        request.count,
        timeout_s,
        session.sites.row(0),
    )


# What the interpreter adds to a step: Python between two messages (2 ranks over Open MPI: 140 us for the two steps of a small ring). So segments
# are that many times as long as the core's: 1 MiB takes 0.5 ms by exchange in one piece, 1.5 ms in sixteen.
STEP_S = 40e-6
LONGER_SEGMENTS = 8


def choose(request: Request, topology: Topology) -> select.Choice:
    """Choose among the schedules that work in no registered memory, which only the core has."""
    is_uneven = request.op == "all_to_all" and request.input_counts is not None
    if not topology.is_hierarchical:  # ranks that share one host are like ranks on a host each
        topology = replace(topology, hosts=tuple(range(topology.size)))
    near, far = (replace(link, alpha_s=link.alpha_s + STEP_S) for link in (topology.near, topology.far))
    topology = replace(topology, near=near, far=far)
    choice = select.choose(request.op, -1 if is_uneven else request.count * request.dtype.itemsize, topology, request.algorithm)
    return replace(choice, picked=replace(choice.picked, segments=max(1, choice.segments // LONGER_SEGMENTS)))
