"""A torch ProcessGroup over a Communicator: each of torch's operations is one of the communicator's.

A call with async_op=False runs inline; any other returns a Work at once. torch 2.13 renamed operations; the old names of those that it looks
up by either are aliases at the end of the class.
"""

# torch's stubs describe overloads that nothing calls, and name parameters in two ways.
# mypy: disable-error-code="override, assignment"

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.collectives.process_group.sparse import SparseSum
from ringfold.collectives.process_group.staging import copy_out, counts_of, row, stage
from ringfold.collectives.process_group.uncompiled import uncompiled
from ringfold.collectives.process_group.work import DONE, Lane, Native, Threads, Together, Work
from ringfold.collectives.registered import empty
from torch import Tensor
from torch._C._distributed_c10d import Store

__all__ = ["ProcessGroup"]

_CPU, _CUDA = torch.device("cpu"), torch.device("cuda")
_OPS: Any = dist.ReduceOp.RedOpType
_REDUCTIONS = {
    _OPS.SUM: {"op": "sum"},
    _OPS.AVG: {"op": "avg"},
    _OPS.PRODUCT: {"op": "prod"},
    _OPS.MIN: {"op": "min"},
    _OPS.MAX: {"op": "max"},
    _OPS.BAND: {"op": "band"},
    _OPS.BOR: {"op": "bor"},
    _OPS.BXOR: {"op": "bxor"},
}
# Each of torch's options classes has some of these, with these defaults.
_DEFAULTS = SimpleNamespace(asyncOp=True, reduceOp=dist.ReduceOp(_OPS.SUM), rootRank=0, timeout=timedelta(milliseconds=-1))


class Closable(Protocol):
    """What a group owns besides its communicator."""

    def close(self) -> None: ...


@uncompiled
class ProcessGroup(dist.ProcessGroup):
    """The ranks of `communicator` as torch sees them; `owned` ends with the group, `threads` complete its futures.

    It is its own backend: torch asks it what it would ask a Backend. Operations raise what the communicator's raise.
    """

    supports_time_estimate = False
    supports_shrinking = False

    def __init__(self, store: Store, communicator: Communicator, threads: Threads, owned: Sequence[Closable] = ()) -> None:
        super().__init__(communicator.rank, communicator.size)  # type: ignore[call-arg, arg-type]  # the one constructor that takes subclasses
        self._store = store
        self.communicator = communicator
        self.threads = threads
        self._lane = Lane(threads)
        self._owned = owned
        self._batch: list[Native] | None = None
        self._group_name = self._group_desc = "undefined"
        if owned:  # the rank leaves its job with a word also if nobody destroys the group
            atexit.register(self.shutdown)

    # -- collectives ------------------------------------------------------------------------------------------------------------------

    def allreduce(self, tensors: list[Tensor], opts: Any = _DEFAULTS) -> dist.Work:
        (tensor,) = tensors
        if tensor.layout is torch.sparse_coo:
            return self._allreduce_sparse(tensor, opts)
        return self._run(opts, tensors, self.communicator.all_reduce, tensor, **_reduction(opts.reduceOp))

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = _DEFAULTS) -> dist.Work:
        return self._run(opts, tensors, self.communicator.all_reduce, tensors, **_reduction(opts.reduceOp))

    def _allreduce_sparse(self, tensor: Tensor, opts: Any) -> dist.Work:
        if _reduction(opts.reduceOp) != {"op": "sum"}:
            raise ConfigError(f"all_reduce of a sparse tensor on rank {self.rank()}: {opts.reduceOp} is not possible, only the sum is")
        sum_ = SparseSum(tensor, self.communicator)
        return self._together(opts, [tensor], sum_.works, sum_.finish)

    def broadcast(self, tensors: list[Tensor], opts: Any = _DEFAULTS) -> dist.Work:
        (tensor,) = tensors
        return self._run(opts, tensors, self.communicator.broadcast, tensor, opts.rootRank)

    def reduce(self, tensors: list[Tensor], opts: Any = _DEFAULTS) -> dist.Work:
        (tensor,) = tensors
        return self._run(opts, tensors, self.communicator.reduce, tensor, opts.rootRank, **_reduction(opts.reduceOp))

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = _DEFAULTS) -> dist.Work:
        return self._run(opts, [output], self.communicator.all_gather, output, input)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = _DEFAULTS) -> dist.Work:
        (pieces,), (input,) = outputs, inputs
        whole, finish = _to_fill(pieces)
        return self._run(opts, pieces, self.communicator.all_gather, whole, input, counts=counts_of(pieces), finish=finish)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = _DEFAULTS) -> dist.Work:
        return self._run(opts, [output], self.communicator.reduce_scatter, output, input, **_reduction(opts.reduceOp))

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = _DEFAULTS) -> dist.Work:
        (output,), (pieces,) = outputs, inputs
        whole = _filled(pieces)
        return self._run(opts, outputs, self.communicator.reduce_scatter, output, whole, counts=counts_of(pieces), **_reduction(opts.reduceOp))

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = _DEFAULTS) -> dist.Work:
        (input,) = inputs
        if self.rank() != opts.rootRank:
            return self._run(opts, [], self.communicator.gather, None, input, opts.rootRank)
        (pieces,) = outputs
        whole, finish = _to_fill(pieces)
        return self._run(opts, pieces, self.communicator.gather, whole, input, opts.rootRank, finish=finish)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = _DEFAULTS) -> dist.Work:
        (output,) = outputs
        if self.rank() != opts.rootRank:
            return self._run(opts, outputs, self.communicator.scatter, output, None, opts.rootRank)
        (pieces,) = inputs
        return self._run(opts, outputs, self.communicator.scatter, output, _filled(pieces), opts.rootRank)

    def all_to_all_single(self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = _DEFAULTS) -> dist.Work:
        counts: dict[str, Any] = {
            "output_counts": self._counts_of_splits("output", output, output_splits),
            "input_counts": self._counts_of_splits("input", input, input_splits),
        }
        return self._run(opts, [output], self.communicator.all_to_all, output, input, **counts)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = _DEFAULTS) -> dist.Work:
        whole, finish = _to_fill(outputs)
        counts: dict[str, Any] = {"output_counts": [t.numel() for t in outputs], "input_counts": [t.numel() for t in inputs]}
        return self._run(opts, outputs, self.communicator.all_to_all, whole, _filled(inputs), finish=finish, **counts)

    def barrier(self, opts: Any = _DEFAULTS) -> dist.Work:
        usual_s = self.communicator.timeout_s
        if opts.timeout > timedelta(0):
            self.communicator.timeout_s = opts.timeout.total_seconds()
        try:
            return self._run(opts, [], self.communicator.barrier)
        finally:
            self.communicator.timeout_s = usual_s

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = _DEFAULTS) -> dist.Work:
        counts = [sum(tensor.numel() for tensor in of_rank) for of_rank in outputs]
        whole, finish = _to_fill([tensor for of_rank in outputs for tensor in of_rank])
        return self._run(opts, outputs, self.communicator.all_gather, whole, _filled(inputs), counts=counts, finish=finish)

    # Several of one kind are several operations, which overlap; nothing is copied.

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = _DEFAULTS) -> dist.Work:
        if len(outputs) == len(inputs) == 1:
            return self.all_gather_single(outputs[0], inputs[0], opts)
        return self._together(opts, outputs, [self.all_gather_single(*pair) for pair in zip(outputs, inputs, strict=True)])

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = _DEFAULTS) -> dist.Work:
        if len(outputs) == len(inputs) == 1:
            return self.reduce_scatter_single(outputs[0], inputs[0], opts)
        each = SimpleNamespace(asyncOp=True, reduceOp=opts.reduceOp)
        return self._together(opts, outputs, [self.reduce_scatter_single(*pair, each) for pair in zip(outputs, inputs, strict=True)])

    # -- messages ---------------------------------------------------------------------------------------------------------------------

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> dist.Work:
        (tensor,) = tensors
        return self._message([], self.communicator.send(tensor, dst, tag, async_op=True))

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> dist.Work:
        (tensor,) = tensors
        return self._message(tensors, self.communicator.recv(tensor, src, tag, async_op=True))

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> dist.Work:
        (tensor,) = tensors
        return self._message(tensors, self.communicator.recv(tensor, None, tag, async_op=True))

    def _start_coalescing(self, _: torch.device) -> None:
        self._batch = []

    def _end_coalescing(self, _: torch.device) -> dist.Work:
        batch, self._batch = self._batch or [], None
        return Work(Together(batch), [], self.threads)

    # -- memory -----------------------------------------------------------------------------------------------------------------------

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        """Tell whether `allocate_tensor` has memory of that device: fully_shard asks before it makes its buffers."""
        return device.type == _CPU.type

    def allocate_tensor(self, size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised vector in registered memory."""
        self._get_backend(device)
        return empty((size,), dtype)

    # -- what torch asks of a group and of its backend ------------------------------------------------------------------------------------

    def get_group_store(self) -> Store:
        return self._store

    @property
    def group_name(self) -> Any:
        return self._group_name

    @property
    def group_desc(self) -> str:
        return self._group_desc

    def _set_group_name(self, name: str) -> None:
        self._group_name = name

    def _set_group_desc(self, desc: str) -> None:
        self._group_desc = desc

    def name(self) -> str:
        return "ringfold"

    @property
    def _device_types(self) -> list[torch.device]:
        return [_CPU, _CUDA] if torch.cuda.is_available() else [_CPU]

    def _get_backend(self, device: torch.device) -> Any:
        if device.type not in (_CPU.type, _CUDA.type):
            raise RuntimeError(f"a ringfold process group has no backend for {device}: it serves CPU and CUDA tensors")
        return self

    def _set_sequence_number_for_group(self) -> None:
        """Do nothing: the core numbers operations by itself."""

    def set_timeout(self, timeout: timedelta) -> None:
        """Give later operations this long."""
        self.communicator.timeout_s = timeout.total_seconds()

    _set_default_timeout = set_timeout

    def shutdown(self) -> None:
        """End the communicator and what else the group owns; operations in flight fail. May be called again."""
        atexit.unregister(self.shutdown)
        self.communicator.close()
        owned, self._owned = self._owned, ()
        for one in owned:
            one.close()

    abort = shutdown

    # -- the way down -----------------------------------------------------------------------------------------------------------------

    def _run(
        self, opts: Any, outputs: Any, operation: Callable[..., Native | None], *args: Any, finish: Callable[[], None] | None = None, **options: Any
    ) -> dist.Work:
        native = operation(*args, async_op=opts.asyncOp, **options)
        if native is not None:
            return self._begun(Work(native, outputs, self._lane, finish, _device(outputs)))
        if finish is not None:
            finish()
        return DONE

    def _together(self, opts: Any, outputs: Any, works: Sequence[Any], finish: Callable[[], None] | None = None) -> dist.Work:
        work = Work(Together(works), outputs, self._lane, finish, _device(outputs))
        if opts.asyncOp:
            return work
        work.wait()
        return DONE

    def _message(self, outputs: list[Tensor], native: Native | None) -> dist.Work:
        assert native is not None
        return self._begun(Work(native, outputs, self.threads))

    def _begun(self, work: Work) -> Work:
        if self._batch is not None:
            self._batch.append(work)
        return work

    def _counts_of_splits(self, which: str, tensor: Tensor, splits: list[int]) -> list[int]:
        """Return how many elements of the tensor each rank sends or receives; `splits` are rows, without them all are equal."""
        rows = len(tensor) if tensor.dim() else 0
        if not splits and rows % self.size() == 0:
            return [tensor.numel() // self.size()] * self.size()
        if len(splits) != self.size() or sum(splits) != rows:
            raise ConfigError(
                f"all_to_all on rank {self.rank()} of axis {self.communicator.name}: {which} has {rows} rows and {which}_split_sizes is {splits}, "
                f"expected {self.size()} numbers that add up to {rows}, or none if {self.size()} divides it"
            )
        width = tensor.numel() // rows if rows else 0
        return [split * width for split in splits]

    # torch's names before 2.13
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    # the names that C++ looks up
    getBackendName = _get_backend_name = name
    getGroupName = lambda self: self._group_name  # noqa: E731
    getGroupDesc = lambda self: self._group_desc  # noqa: E731
    setGroupName = _set_group_name
    setGroupDesc = _set_group_desc


def _device(outputs: Any) -> torch.device | None:
    """Return the GPU of the first tensor in (lists of) outputs; None if it is not on one, or there is none."""
    while isinstance(outputs, list | tuple):
        if not outputs:
            return None
        outputs = outputs[0]
    return outputs.device if outputs.is_cuda else None


def _reduction(op: Any) -> dict[str, Any]:
    """Return the communicator's arguments for a reduction of torch's."""
    known = _REDUCTIONS.get(op.op)
    if known is not None:
        return known
    if op.op != _OPS.PREMUL_SUM:
        raise ConfigError(f"{op.op} is not a reduction")
    _, factor = op.__getstate__()  # a number or a tensor of one element; there is no other way to it
    return {"op": "sum", "scale": float(factor)}


def _filled(tensors: Sequence[Tensor]) -> Tensor:
    """Return one vector with the elements of all tensors: their own memory, if they lie in a row."""
    whole = row(tensors)
    return stage(tensors, filled=True) if whole is None else whole


def _to_fill(tensors: Sequence[Tensor]) -> tuple[Tensor, Callable[[], None] | None]:
    """Return one vector to receive the elements of all tensors, and what then brings them there, unless it is their own memory."""
    whole = row(tensors)
    if whole is not None:
        return whole, None
    staged = stage(tensors, filled=False)
    return staged, lambda: copy_out(staged, tensors)
