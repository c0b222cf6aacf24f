"""DataParallel: every rank holds the whole model, works on its own rows, and ends backward with the average of all gradients.

    model = DataParallel(Net(), mesh["dp"])      rank 0's parameters and buffers go to all ranks
    loss(model(x), y).backward()                 gradients are reduced while backward runs (buckets.py)
    optimizer.step()                             the same step on every rank

The average is over ranks, as in PyTorch DDP: with uneven rows weight the loss, or let Engine do it. Buffers are sent once, at the start;
those of BatchNorm then stay equal by themselves, others are each rank's own. A copy (deepcopy, pickle) is the model alone: it works, and
does not communicate. Nothing of it is sharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.agreement import require_agreement
from ringfold.parallel.batch_norm import desynchronise_batch_norm, synchronise_batch_norm
from ringfold.parallel.buckets import GradientBuckets
from ringfold.parallel.reducer import GradientReducer
from ringfold.parallel.sparse import sparse_parameter_names
from torch import nn
from torch.nn.parameter import is_lazy

_ALIGNMENT_NBYTES = 64
_PARCEL_NBYTES = 8 * 2**20  # what is sent together; larger tensors travel alone, from where they lie


class DataParallel(nn.Module):
    """Train `module` on the ranks of `comm`; made by all of them together, with the same module on each.

    Buckets of about `bucket_mb` MiB are reduced at a time. With `sync_batch_norm` every BatchNorm normalises over the rows of all ranks.
    `.module` is the model itself, and `state_dict` has its names.

    Raises:
        ConfigError: parameters or buffers differ between ranks in name, shape, dtype or requires_grad, or have no shape yet.
    """

    buckets: GradientReducer[Any] | None

    def __init__(self, module: nn.Module, comm: Communicator, *, bucket_mb: float = 25.0, sync_batch_norm: bool = True) -> None:
        super().__init__()
        unshaped = [name for name, tensor in _state(module) if is_lazy(tensor)]
        if unshaped:
            raise ConfigError(f"lazy parameters without a shape: {', '.join(unshaped)}. Run one batch through the model first")
        self.module = module
        broadcast_state(module, comm)
        self.buckets = self._make_reducer(comm, bucket_mb)
        if sync_batch_norm:
            synchronise_batch_norm(module, comm)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._forget_failed_backward()
        return self.module(*args, **kwargs)

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate gradients on this rank for every *backward* that runs inside; the next one outside reduces the whole sum."""
        return self.buckets.no_sync() if self.buckets is not None else nullcontext()

    def close(self) -> None:
        """Give the model back: no hooks, no communication, BatchNorm for itself."""
        if self.buckets is not None:
            self.buckets.close()
            self.buckets = None
            desynchronise_batch_norm(self.module)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the state of `.module`, under its own names."""
        state: dict[str, Any] = self.module.state_dict(*args, **kwargs)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the state of `.module`; every rank loads the same."""
        return self.module.load_state_dict(state_dict, strict=strict, assign=assign)

    def _make_reducer(self, comm: Communicator, bucket_mb: float) -> GradientReducer[Any]:
        named, sparse = self.module.named_parameters(), sparse_parameter_names(self.module)
        return GradientBuckets(named, comm, averaged=True, bucket_mb=bucket_mb, sparse=sparse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "buckets": None}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Inside a larger module: hand the names of `.module` on to it."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}module.{key.removeprefix(prefix)}"] = state_dict.pop(key)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forget_failed_backward(self) -> None:
        # Inside a backward (a checkpoint that runs this module again) the step goes on; outside, it is what an exception left.
        if self.buckets is not None and self.buckets.is_collecting and torch._C._current_graph_task_id() == -1:
            self.buckets.reset()


def broadcast_state(module: nn.Module, comm: Communicator, src: int = 0) -> None:
    """Give every rank the parameters and buffers of rank `src` of `comm`, bit by bit, in few messages; a collective call.

    Those on the meta device have nothing to give.

    Raises:
        ConfigError: names, shapes or dtypes differ between ranks.
    """
    state = list(_state(module))
    description = {name: f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for name, tensor in state}
    require_agreement("parameters and buffers", description, comm)
    if comm.size == 1:
        return
    parcel: list[torch.Tensor] = []
    nbytes = 0
    for _, tensor in state:
        if tensor.is_meta:
            continue
        if tensor.nbytes > _PARCEL_NBYTES and tensor.is_contiguous():
            comm.broadcast(_bytes(tensor), src)
            continue
        if parcel and nbytes + tensor.nbytes > _PARCEL_NBYTES:
            _broadcast_together(parcel, comm, src)
            parcel, nbytes = [], 0
        parcel.append(tensor)
        nbytes += tensor.nbytes
    _broadcast_together(parcel, comm, src)


def _broadcast_together(tensors: list[torch.Tensor], comm: Communicator, src: int) -> None:
    places, end = [], 0
    for tensor in tensors:
        places.append(slice(end, end + tensor.nbytes))
        end += -(-tensor.nbytes // _ALIGNMENT_NBYTES) * _ALIGNMENT_NBYTES
    if not end:
        return
    staging = comm.empty(end, dtype=torch.uint8).zero_()
    if comm.rank == src:
        for tensor, place in zip(tensors, places, strict=True):
            staging[place] = _bytes(tensor.contiguous())
    comm.broadcast(staging, src)
    if comm.rank != src:
        for tensor, place in zip(tensors, places, strict=True):
            tensor.copy_(staging[place].view(tensor.dtype).view(tensor.shape))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _state(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and buffers with their names, each tensor once, without a graph."""
    named: Iterable[tuple[str, torch.Tensor]] = chain(module.named_parameters(), module.named_buffers())
    return ((name, tensor if is_lazy(tensor) else tensor.detach()) for name, tensor in named)
