"""Whether MPI's own collectives or our schedules over its messages carry out an operation.

MPI's own, as far as they keep our promises: theirs are in C, and where latency counts the Python between two steps of ours makes them two to
three times as slow; what is only moved they move at least as fast. Large folds differ from library to library: an all_reduce of 32 MiB by 2 ranks
takes Open MPI 5 38 ms and a schedule of ours over it 10, MPICH 5 15 and 11. So one is measured both ways when the world opens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from ringfold.collectives import carried, mpi_requests
from ringfold.collectives.codes import FOLDING
from ringfold.collectives.errors import ConfigError
from ringfold.collectives.fold import HALF
from ringfold.collectives.transport import Request

if TYPE_CHECKING:
    from ringfold.collectives.communicator import Communicator

__all__ = ["LARGE_NBYTES", "Folds", "is_native", "measure_folds"]

SHORT = (torch.int8, torch.int16, torch.uint8)
IN_PIECES = ("reduce_scatter", "all_gather", "gather", "scatter", "all_to_all")

LARGE_NBYTES = 8 * 1024 * 1024
# Ours must be faster by so much: another algorithm folds in another order, so runs of one job should choose alike although no two measurements are.
ADVANTAGE = 1.5
_ROUNDS = 3

# What this process has measured, by what identifies the processes of the job.
_known: dict[tuple[object, ...], Folds] = {}


@dataclass(frozen=True)
class Folds:
    """The seconds of an all_reduce of LARGE_NBYTES of float32 over MPI, the same on every rank: MPI's own, and by our `algorithm`."""

    native_s: float
    ours_s: float
    algorithm: str

    @property
    def ours_is_faster(self) -> bool:
        return self.native_s > ADVANTAGE * self.ours_s

    def __str__(self) -> str:
        native, ours = (f"{seconds * 1e3:.2f} ms" for seconds in (self.native_s, self.ours_s))
        return f"when the world opened, 8 MiB took {native} by MPI's own all_reduce and {ours} by {self.algorithm}"


def measure_folds(world: Communicator) -> Folds:
    """Return how MPI's own large folds compare with ours; collective over all ranks of the job, some fifty milliseconds, once for the same processes.

    Raises: CommunicationError.
    """
    key = (*world.session.membership.host_of, *world.session.membership.pids)
    everyone = world.subgroup(range(world.size), "measure folds")  # so that the world's operations are numbered from the user's first
    try:
        is_known = torch.tensor([int(key in _known)], device="cpu")
        everyone.all_reduce(is_known, "min")
        if not bool(is_known):
            tensor = torch.zeros(LARGE_NBYTES // 4, device="cpu")
            request = Request("all_reduce", "sum", torch.float32, tensor.numel(), tensor, tensor)
            algorithm = carried.choose(request, everyone.topology).algorithm
            ways = ("native", algorithm)
            took = [[_seconds(partial(everyone.all_reduce, tensor, algorithm=way)) for way in ways] for _ in range(_ROUNDS)]
            fastest = torch.tensor(took, dtype=torch.float64, device="cpu").amin(0)
            everyone.all_reduce(fastest, "max")
            native_s, ours_s = fastest.tolist()
            _known[key] = Folds(native_s, ours_s, algorithm)
        return _known[key]
    finally:
        everyone.close()


def _seconds(operation: Callable[[], object]) -> float:
    began = time.perf_counter()
    operation()
    return time.perf_counter() - began


def is_native(request: Request, folds: Folds | None) -> bool:
    """Tell whether MPI's own collective carries out a request; every rank of the communicator answers alike.

    Raises: ConfigError: it was asked for, and would break a promise.
    """
    why = None
    if request.op in FOLDING and request.dtype in HALF:
        why = f"MPI cannot add {request.dtype}"
    elif request.op in FOLDING and request.dtype.is_floating_point and request.reduction in ("min", "max"):
        why = f"MPI's own {request.reduction} may lose a NaN"
    elif request.op in FOLDING and request.dtype in SHORT and request.reduction in ("sum", "avg", "prod"):
        why = f"MPI's own {request.reduction} of {request.dtype} may saturate instead of wrap"
    elif request.op in IN_PIECES and request.count > mpi_requests.LIMIT:
        why = f"{request.count} elements are more than the {mpi_requests.LIMIT} that its counts hold"
    if request.algorithm is not None:
        if request.algorithm == "native" and why is not None:
            raise ConfigError(f"{request.op} with algorithm='native': {why}. Leave the algorithm out, and a schedule of ringfold's runs over MPI")
        return request.algorithm == "native"
    if request.op == "all_to_all" and request.input_counts is not None:
        return False  # ranks know different sizes, and must choose alike
    is_large_fold = request.op in FOLDING and request.count * request.dtype.itemsize >= LARGE_NBYTES
    return why is None and not (is_large_fold and folds is not None and folds.ours_is_faster)
