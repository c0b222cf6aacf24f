"""GradientBuckets: gradients live in a few flat tensors, each of which is summed over all ranks as soon as backward has filled it.

    | gradient of p9 | gradient of p8 | ... | used p9 | used p8 | ... |     the layout of bucket.py, in registered memory

`used` is 1 where this rank has a gradient. It is summed with the rest, so that a parameter that no rank used keeps `grad = None`
(AdamW would decay it otherwise), and one that only some ranks used gets their sum, without one more message.

The gradients are views: `torch.save(p.grad)` writes the whole bucket, and a reference to one changes with the next step. Clone it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.bucket import Bucket, Slot, partition
from ringfold.parallel.reducer import CONVERTED, Filling, GradientReducer, dense_gradient
from ringfold.parallel.sparse import reduce_sparse
from ringfold.parallel.traffic import Traffic
from torch import nn

__all__ = ["FIRST_BUCKET_MB", "GradientBuckets"]

FIRST_BUCKET_MB = 1.0  # small, so that communication starts early


class _Flat(Filling):
    __slots__ = ("absent", "flat", "used", "views")

    def __init__(self, bucket: Bucket, flat: torch.Tensor) -> None:
        super().__init__(bucket)
        self.flat = flat
        self.used = flat[bucket.numel :]
        self.views = [slot.view(flat) for slot in bucket.slots]
        self.absent: list[Slot] = []  # those for which this rank has no gradient, once launched


class GradientBuckets(GradientReducer[_Flat]):
    """Give every rank the sum of all gradients; made by all ranks together (reducer.py says when it happens).

    With `averaged` the reduction divides by the number of ranks; else it is a plain sum, and gradients must be None at the start of a
    step (a sum that has already been reduced would be summed again). `sparse` names parameters with sparse gradients, which are gathered
    instead (`sparse_parameter_names`). With one rank there is nothing to reduce, and gradients stay where autograd puts them.

    Raises:
        ConfigError: names, shapes, dtypes or requires_grad differ between ranks.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        comm: Communicator,
        averaged: bool,
        *,
        bucket_mb: float = 25.0,
        sparse: Collection[str] = (),
    ) -> None:
        super().__init__(named_parameters, comm, averaged, sparse)
        self._sparse = [parameter for name, parameter in self._trained if name in sparse]
        if comm.size > 1:
            self._comm = comm.subgroup(range(comm.size), f"gradients of {comm.name}")
            dense = [(name, parameter) for name, parameter in self._trained if name not in sparse]
            buckets = partition(dense, int(bucket_mb * 2**20), first_nbytes=int(FIRST_BUCKET_MB * 2**20))
            self._open([self._allocate(bucket) for bucket in buckets])

    def traffic(self) -> list[Traffic]:
        if not self._buckets:
            return []
        return [Traffic("gradients", "all_reduce", len(self._buckets), sum(filling.flat.nbytes for filling in self._buckets), self._comm.size)]

    def begin(self) -> None:
        super().begin()
        for filling in self._buckets:
            filling.absent.clear()

    def _allocate(self, bucket: Bucket) -> _Flat:
        # zeros in the gaps too: what is reduced must be a number
        return _Flat(bucket, self._comm.empty(bucket.numel + len(bucket.slots), dtype=bucket.dtype, device=bucket.device).zero_())

    def _take(self, filling: _Flat, slot: Slot) -> None:
        """Copy a gradient that autograd or the user made elsewhere into the bucket, and let the parameter have the view.

        Copying a fresh gradient is cheaper than clearing the bucket and having autograd add to it.
        """
        view = filling.views[slot.position]
        if slot.parameter.grad is view:
            return
        view.copy_(dense_gradient(slot.parameter))
        try:
            slot.parameter.grad = view
        except RuntimeError as error:
            raise ConfigError(f"{slot.name} is not the {tuple(view.shape)} {view.dtype} it was ({error}): {CONVERTED}") from error

    def _launch(self, filling: _Flat) -> None:
        flat, bucket = filling.flat, filling.bucket
        places = [flat.data_ptr() + slot.start * flat.element_size() for slot in bucket.slots]
        moved = [slot.name for slot, view, place in zip(bucket.slots, filling.views, places, strict=True) if view.data_ptr() not in (0, place)]
        if moved:  # 0: no elements
            raise ConfigError(f"gradients of {', '.join(moved)} have left their bucket: {CONVERTED}")
        filling.used.fill_(1.0)
        if filling.waiting_for:
            for slot in bucket.slots:
                if filling.ready_in[slot.position] != self._backward:
                    self._settle(filling, slot)
        filling.work = self._comm.all_reduce(flat, "avg" if self._averaged else "sum", async_op=True)

    def _settle(self, filling: _Flat, slot: Slot) -> None:
        """Bring in a gradient that no hook announced in this backward: from earlier ones under `no_sync`, or none at all."""
        if slot.parameter.grad is None:
            filling.views[slot.position].zero_()
            filling.used[slot.position] = 0.0
            filling.absent.append(slot)
        else:
            self._take(filling, slot)

    def _complete(self) -> Iterator[None]:
        yield from reduce_sparse(self._sparse, self._comm, self._averaged)
        for filling in self._buckets:
            work, filling.work = filling.work, None
            absent, filling.absent = filling.absent, []
            if work is not None:
                work.wait()
            if absent:
                used = filling.used.tolist()
                for slot in absent:
                    slot.parameter.grad = filling.views[slot.position] if used[slot.position] else None
