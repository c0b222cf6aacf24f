"""CUDA tensors of ranks that have a GPU each: NCCL's own collectives through torch's ProcessGroupNCCL, or our schedules over its messages.

NCCL's collectives are the default. A schedule is run where theirs would not keep our promises: min and max of floats (they lose a NaN), 16-bit
integers and bitwise folds (there are none). An average is their sum, then divided: they would divide each rank's values first, and round more often.
The unique id by which NCCL's ranks find each other goes through the job's authenticated store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from ringfold.collectives._native import Outcome
from ringfold.collectives.codes import FOLDING
from ringfold.collectives.cuda.stream_transport import Message, StreamTransport
from ringfold.collectives.environment import nccl_key
from ringfold.collectives.errors import CommunicationError
from ringfold.collectives.fold import divide
from ringfold.collectives.store import Store
from ringfold.collectives.transport import Request
from torch import Tensor

if TYPE_CHECKING:
    from ringfold.collectives.communicator import Communicator

__all__ = ["JobStore", "NcclTransport", "run_collective", "why_not_native"]

_torch: Any = torch._C._distributed_c10d
_OPS: Any = dist.ReduceOp
NUMBERS = {"sum": _OPS.SUM, "avg": _OPS.SUM, "prod": _OPS.PRODUCT, "min": _OPS.MIN, "max": _OPS.MAX}
# Truth values go as bytes that are 0 or 1.
TRUTH = {"sum": _OPS.MAX, "max": _OPS.MAX, "bor": _OPS.MAX, "prod": _OPS.MIN, "min": _OPS.MIN, "band": _OPS.MIN}


class NcclTransport(StreamTransport):
    """Carries out the operations of ranks on different GPUs."""

    name = "nccl"

    @classmethod
    def open(cls, communicator: Communicator, handle: object, fail: Callable[[Outcome], None], device: torch.device) -> NcclTransport:
        """Return the transport of all members, who come here together.

        Raises: CommunicationError.
        """
        membership = communicator.session.membership
        assert membership.store is not None  # there is more than one rank
        prefix = nccl_key(membership.generation, communicator.identity)
        return cls(communicator, handle, fail, device, JobStore(membership.store, prefix, communicator.timeout_s))

    def __init__(self, communicator: Communicator, handle: object, fail: Callable[[Outcome], None], device: torch.device, store: JobStore) -> None:
        super().__init__(communicator, handle, fail, device)
        options: Any = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=communicator.timeout_s)
        options.is_high_priority_stream = True
        self._store = store  # torch keeps the C++ part of it only
        self._group: Any = dist.ProcessGroupNCCL(store, self.rank, self.size, options)
        self._group.eager_connect_single_device(device)
        self._released = False

    def why_not_native(self, request: Request) -> str | None:
        return why_not_native(request)

    def run_native(self, request: Request) -> None:
        run_collective(self._group, request, self.rank, self.size)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        sends, receives = ([each for each in messages if each[1].numel()] for messages in (sends, receives))
        if not sends and not receives:
            return
        self._group._start_coalescing()
        for peer, tensor in sends:
            self._group.send([_bytes(tensor)], peer, 0)
        for peer, tensor in receives:
            self._group.recv([_bytes(tensor)], peer, 0)
        self._group._end_coalescing().wait()

    def release(self) -> None:
        if not self._released:
            self._released = True
            self._group.abort()

    def free(self) -> None:
        if not self._released:
            self._group.shutdown()


def why_not_native(request: Request) -> str | None:
    """Return why NCCL's own collective cannot carry out the request as we promise, None if it can."""
    if request.op not in FOLDING:
        return None
    if request.dtype is torch.bool:
        return None if request.reduction in TRUTH else f"NCCL has no {request.reduction} of truth values"
    if request.reduction not in NUMBERS:
        return f"NCCL has no {request.reduction}"
    if request.dtype is torch.int16:
        return "NCCL has no 16-bit integers"
    if request.dtype.is_floating_point and request.reduction in ("min", "max"):
        return f"NCCL's own {request.reduction} may lose a NaN"
    return None


def run_collective(group: Any, request: Request, rank: int, size: int) -> None:
    """Issue a collective of a torch process group (any backend's), and wait for it as that backend waits: a CUDA stream, or the CPU."""
    if request.op in FOLDING:
        of_truth = request.dtype is torch.bool
        input, output = (None if t is None else t.view(torch.uint8) if of_truth else t for t in (request.input, request.output))
        op = (TRUTH if of_truth else NUMBERS)[request.reduction]
        _reduce(group, request, input, output, op)
        if request.reduction == "avg" and output is not None:
            divide(output, size)
        return
    input, output = (None if t is None else _bytes(t) for t in (request.input, request.output))
    if request.op == "broadcast":
        options: Any = dist.BroadcastOptions()
        options.rootRank = request.root
        group.broadcast([output], options).wait()
        return
    assert request.op == "all_gather", request.op
    assert input is not None
    assert output is not None
    if request.output_counts is None:
        group._allgather_base(output, input, _torch.AllgatherOptions()).wait()
        return
    pieces = list(output.split([count * request.dtype.itemsize for count in request.output_counts]))
    if input.data_ptr() == pieces[rank].data_ptr():
        input = input.clone()
    group.allgather([pieces], [input], _torch.AllgatherOptions()).wait()


def _reduce(group: Any, request: Request, input: Tensor | None, output: Tensor | None, op: Any) -> None:
    options: Any
    if request.op == "all_reduce":
        options = dist.AllreduceOptions()
        options.reduceOp = op
        group.allreduce([output], options).wait()
        return
    assert input is not None
    if request.op == "reduce":
        options = dist.ReduceOptions()
        options.reduceOp, options.rootRank = op, request.root
        # Elsewhere than at the root a backend may use the tensor for what it has folded so far.
        group.reduce([input if output is not None else input.clone()], options).wait()
        return
    assert output is not None
    options = dist.ReduceScatterOptions()
    options.reduceOp = op
    if request.input_counts is None:
        group._reduce_scatter_base(output, input, options).wait()
    else:
        group.reduce_scatter([output], [list(input.split(list(request.input_counts)))], options).wait()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


class JobStore(_torch.Store):  # type: ignore[misc]  # torch has no stubs for it
    """The job's store as torch sees it, below a prefix of its own."""

    def __init__(self, store: Store, prefix: str, timeout_s: float) -> None:
        super().__init__()
        self._store = store
        self._prefix = prefix
        self._timeout_s = timeout_s

    def set(self, key: str, value: bytes | str) -> None:
        self._store.set(self._prefix + key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        value = self._store.get(self._prefix + key, self._timeout_s)
        if value is None:
            raise CommunicationError(
                f"nobody had set {key!r} in the job's store within {self._timeout_s:.1f} s: did every rank come to the first operation?"
            )
        return value

    def add(self, key: str, amount: int) -> int:
        return self._store.add(self._prefix + key, amount)

    def check(self, keys: list[str]) -> bool:
        return all(self._store.get(self._prefix + key, 0.0) is not None for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        deadline = time.monotonic() + (self._timeout_s if timeout is None else timeout.total_seconds())
        for key in keys:
            if self._store.get(self._prefix + key, max(0.0, deadline - time.monotonic())) is None:
                raise CommunicationError(f"nobody had set {key!r} in the job's store in time")

    def delete_key(self, key: str) -> bool:
        return self._store.delete(self._prefix + key) > 0
