"""ShardedGradients: each rank ends a backward with the sum of its own range of every bucket.

    stage 1      | own | .... | .... |   a buffer a bucket, for good: gradients may accumulate in it locally, under no_sync
    stage 2, 3   two buffers for all buckets; a gradient is freed once it is copied in, and the sum goes to a shard of 1/N

Under stages 2 and 3 every backward is reduced, those inside `no_sync` too: there is no room in which a whole gradient could accumulate.
What the optimizer sees are gradients of pieces, views of the shards. They accumulate until they are set to None or zeroed, as any gradient
does. A piece of a parameter that no rank used keeps `grad = None`. Sparse gradients are made dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from ringfold.collectives.errors import ConfigError
from ringfold.collectives.work import Work
from ringfold.parallel.bucket import Bucket, Slot
from ringfold.parallel.reducer import CONVERTED, Filling, GradientReducer, dense_gradient
from ringfold.parallel.traffic import Traffic
from ringfold.parallel.zero.counter import BinaryCounter
from ringfold.parallel.zero.cuts import Cut
from ringfold.parallel.zero.group import ShardGroup
from torch import nn

__all__ = ["BUFFERS", "ShardedGradients"]

BUFFERS = 2  # one that is being filled, and one that is being reduced


class _Shard(Filling):
    """A bucket of which this rank gets the sum of its range, in `shard`; `buffer` is where it is being filled."""

    __slots__ = ("buffer", "counter", "cuts", "earlier", "first_mark", "grads", "held", "is_kept", "memory", "shard", "views", "views_of")

    def __init__(
        self,
        bucket: Bucket,
        shard: torch.Tensor,
        kept: torch.Tensor | None,
        cuts: Sequence[Cut],
        rank: int,
        first_mark: int,
        counter: BinaryCounter | None,
    ) -> None:
        super().__init__(bucket)
        self.shard = shard
        begin = bucket.range(rank).start
        self.cuts = cuts
        self.grads = [shard[piece.slot.start + piece.start - begin :][: piece.numel] for piece, _ in cuts]
        self.first_mark = first_mark
        self.counter = counter
        self.is_kept = kept is not None
        self.buffer = kept
        self.memory = kept  # all of the buffer, which may be longer than this bucket
        self.views: list[torch.Tensor] = [] if kept is None else [slot.view(kept) for slot in bucket.slots]
        self.views_of: dict[int, list[torch.Tensor]] = {}  # by the address of a buffer
        self.held = [False] * len(cuts)  # for each cut, whether it has a gradient of earlier backwards
        self.earlier: torch.Tensor | None = None  # that gradient, where its memory is needed for the sum


class ShardedGradients(GradientReducer[_Shard]):
    """Sum gradients into shards of 1 / N over `group`; `cuts` are, for each bucket, the pieces that this rank owns.

    Gradients are reduced in the dtype of their buckets, those of 16 bits in `reduce_dtype` if that is given, and shards have the dtype of what is
    trained; narrow: that of the buckets, and a step has one backward. is_apart, as all narrow ones: `grad` of the pieces, which have another dtype
    or device, stays None, and `of` tells what the optimizer is to be given. exact: each backward is folded over ranks in pairs at once, and those
    of a step in a binary counter, until `combine()`.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        cuts: Mapping[Bucket, Sequence[Cut]],
        group: ShardGroup,
        averaged: bool,
        *,
        accumulates_locally: bool,
        exact: bool = False,
        reduce_dtype: torch.dtype | None = None,
        narrow: bool = False,
        is_apart: bool = False,
    ) -> None:
        super().__init__(named_parameters, group.whole, averaged)
        self._group = group
        self._accumulates_locally = accumulates_locally
        self._exact = exact
        self._reduce_dtype = reduce_dtype
        self.is_narrow = narrow
        self.is_apart = narrow or is_apart
        self._apart: dict[int, torch.Tensor] = {}  # by id of the optimizer's parameter
        self.on_sum: Callable[[Bucket], None] | None = None  # called when a bucket's pieces have their gradients, if that is before the end
        fillings, marks = [], 0
        for bucket, mine in cuts.items():
            # zeros in the gaps too: what is reduced must be a number
            flat = self._comm.empty(bucket.numel, dtype=bucket.dtype, device=bucket.device).zero_() if accumulates_locally else None
            trained = mine[0][1].dtype if mine and not narrow else bucket.dtype
            length = bucket.numel // bucket.ranks
            shard = torch.zeros(length, dtype=trained, device=bucket.device) if flat is None else flat[bucket.range(group.rank)]
            fillings.append(_Shard(bucket, shard, flat, mine, group.rank, marks, BinaryCounter() if exact else None))
            marks += len(bucket.slots)
        self._free: list[torch.Tensor] = []
        if fillings and not accumulates_locally:
            nbytes = max(bucket.numel * self.dtype_of(bucket).itemsize for bucket in cuts)
            device = next(iter(cuts)).device
            self._free = list(self._comm.empty(BUFFERS * nbytes, dtype=torch.uint8, device=device).zero_().split(nbytes))
        self._mine = torch.zeros(max(1, marks), dtype=torch.int32, device="cpu")  # 1 where this rank has a gradient
        self._used = self._comm.empty(max(1, marks), dtype=torch.int32).zero_()  # 1 where any has
        self._ever_used = torch.zeros(max(1, marks), dtype=torch.bool, device="cpu")  # in any backward of the step, in exact mode
        self._open(fillings)

    @property
    def reduces_every_backward(self) -> bool:
        """Whether backwards inside `no_sync` are reduced, too: all ranks then need the same number of these contexts."""
        return not self._accumulates_locally

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate locally (stage 1), or reduce the backwards inside, of which this rank may have none, and add to the shards."""
        return self._unsynchronised() if self._accumulates_locally else self._round()

    def of(self, piece: nn.Parameter) -> torch.Tensor | None:
        """Return the gradient of a piece, in the dtype in which it is kept."""
        return self._apart.get(id(piece)) if self.is_apart else piece.grad

    def drop(self) -> None:
        """Forget the gradients of a step."""
        self._apart.clear()
        for filling in self._buckets:
            for _, parameter in filling.cuts:
                parameter.grad = None

    def _give(self, piece: nn.Parameter, grad: torch.Tensor | None) -> None:
        if not self.is_apart:
            piece.grad = grad
        elif grad is None:
            self._apart.pop(id(piece), None)
        else:
            self._apart[id(piece)] = grad

    @property
    def shards_nbytes(self) -> int:
        """Bytes of gradients that this rank keeps: shards, or whole buckets where they accumulate locally."""
        return sum(memory.nbytes for f in self._buckets for memory in [f.buffer if f.is_kept and f.buffer is not None else f.shard])

    @property
    def buffers_nbytes(self) -> int:
        """Bytes of the buffers that buckets take in turn, between steps."""
        return sum(buffer.nbytes for buffer in self._free)

    def traffic(self) -> list[Traffic]:
        count = len(self._buckets)
        nbytes = sum(filling.bucket.numel * self.dtype_of(filling.bucket).itemsize for filling in self._buckets)
        flags = Traffic("which parameters were used", "all_reduce", 1, self._used.nbytes, self._comm.size)
        if self._exact:
            return [*(Traffic("gradients", "all_reduce", count, nbytes, 2) for _ in self._group.pairs), flags]
        found = [Traffic("gradients", "reduce_scatter", count, nbytes, self._group.size), flags]
        if self._group.replicas is not None:
            found.append(Traffic("gradients between groups", "all_reduce", count, nbytes // self._group.size, self._group.replicas.size))
        return found

    def begin_step(self) -> None:
        """Drop what backwards of a step that failed have left, in exact mode."""
        self._ever_used.zero_()
        for filling in self._buckets:
            filling.counter = BinaryCounter()

    def combine(self) -> None:
        """Give the pieces the gradients of a whole step, in exact mode; they had none before."""
        used, self._ever_used = self._ever_used.tolist(), torch.zeros_like(self._ever_used)
        for filling in self._buckets:
            assert filling.counter is not None  # narrows the type: exact mode
            filling.counter.take(filling.shard)
            for (piece, parameter), grad in zip(filling.cuts, filling.grads, strict=True):
                self._give(parameter, grad if used[filling.first_mark + piece.slot.position] else None)

    def begin(self) -> None:
        super().begin()
        self._mine.zero_()

    def reset(self) -> None:
        super().reset()
        for filling in self._buckets:
            self._give_back(filling)

    def close(self) -> None:
        self._is_open = False  # the communicators are the group's
        super().close()

    @contextmanager
    def _round(self) -> Iterator[None]:
        self.begin()
        yield
        self.finish()

    def dtype_of(self, bucket: Bucket) -> torch.dtype:
        """Return the dtype in which a bucket is reduced."""
        return self._reduce_dtype if self._reduce_dtype is not None and bucket.dtype.itemsize == 2 else bucket.dtype

    def _take(self, filling: _Shard, slot: Slot) -> None:
        if filling.buffer is None:
            if filling is not self._buckets[self._launched]:
                return  # it stays the parameter's until the bucket's turn comes: the buffers are for those that come first
            self._acquire(filling)
        self._put_aside(filling)
        view = filling.views[slot.position]
        if slot.parameter.grad is view:
            return
        try:
            view.copy_(dense_gradient(slot.parameter))
            slot.parameter.grad = view if filling.is_kept else None
        except RuntimeError as error:
            raise ConfigError(f"{slot.name} is not the {tuple(view.shape)} {view.dtype} it was ({error}): {CONVERTED}") from error

    def _launch(self, filling: _Shard) -> None:
        if filling.buffer is None:
            self._acquire(filling)
        flat = filling.buffer
        assert flat is not None  # narrows the type
        self._put_aside(filling)
        for slot in filling.bucket.slots:
            is_here = filling.ready_in[slot.position] == self._backward
            if slot.parameter.grad is not None:
                self._take(filling, slot)
            elif not is_here:
                filling.views[slot.position].zero_()
            self._mine[filling.first_mark + slot.position] = is_here or slot.parameter.grad is not None
        if self._exact:
            for pair in self._group.pairs:
                pair.all_reduce(flat)
            filling.work = Work()
            return
        filling.held = [held or self.of(parameter) is not None for held, (_, parameter) in zip(filling.held, filling.cuts, strict=True)]
        is_direct = not any(filling.held) and flat.dtype == filling.shard.dtype
        output = filling.shard if is_direct else flat[filling.bucket.range(self._group.rank)]  # which are one where the buffer is kept
        filling.work = self._group.shard.reduce_scatter(output, flat, "avg" if self._averaged else "sum", async_op=True)

    def _complete(self) -> Iterator[None]:
        self._used.copy_(self._mine)
        flags = self._comm.all_reduce(self._used, "max", async_op=True)
        yield
        for filling in self._buckets:
            self._settle(filling)
        if flags is not None:
            flags.wait()
        if self._exact:
            self._ever_used |= self._used.bool()
            return
        used = self._used.tolist()
        for filling in self._buckets:
            for (piece, parameter), grad, held in zip(filling.cuts, filling.grads, filling.held, strict=True):
                self._give(parameter, grad if held or used[filling.first_mark + piece.slot.position] else None)
            filling.held = [False] * len(filling.cuts)
            if filling.is_kept:
                for slot in filling.bucket.slots:
                    slot.parameter.grad = None

    def _settle(self, filling: _Shard) -> None:
        """Wait for the sum of a bucket, add it to what its pieces had, and free the buffer."""
        work, filling.work = filling.work, None
        if work is None:
            return
        work.wait()
        buffer = filling.buffer
        assert buffer is not None  # narrows the type
        if filling.counter is not None:
            filling.counter.add(buffer[filling.bucket.range(self._group.rank)].to(filling.shard.dtype))
            self._give_back(filling)
            return
        adds = any(filling.held) and not filling.is_kept
        is_direct = not any(filling.held) and buffer.dtype == filling.shard.dtype
        total = filling.shard if is_direct else buffer[filling.bucket.range(self._group.rank)]
        if self._group.replicas is not None:
            self._group.replicas.all_reduce(total, "avg" if self._averaged else "sum")
        if filling.is_kept and filling.earlier is not None:
            filling.shard.add_(filling.earlier)
            filling.earlier = None
        elif adds:
            for (_, parameter), grad, held in zip(filling.cuts, filling.grads, filling.held, strict=True):
                if not held:
                    grad.zero_()
                elif (own := self.of(parameter)) is not None and own.data_ptr() != grad.data_ptr():
                    grad.copy_(own)  # the user's own tensor
            filling.shard.add_(total)
        elif not is_direct and not filling.is_kept:
            filling.shard.copy_(total)
        self._give_back(filling)
        marks = self._mine[filling.first_mark :][: len(filling.bucket.slots)]
        if self.on_sum is not None and marks.all():  # used on this rank, so nobody has to be asked
            for (_, parameter), grad in zip(filling.cuts, filling.grads, strict=True):
                self._give(parameter, grad)
            self.on_sum(filling.bucket)

    def _put_aside(self, filling: _Shard) -> None:
        """Where a bucket's own buffer is about to be filled, and its pieces have gradients of earlier backwards in it, keep these."""
        if not filling.is_kept or all(self.of(parameter) is None for _, parameter in filling.cuts):
            return
        filling.earlier = torch.zeros_like(filling.shard) if filling.earlier is None else filling.earlier
        begin = filling.bucket.range(self._group.rank).start
        for number, (piece, parameter) in enumerate(filling.cuts):
            grad = self.of(parameter)
            if grad is not None:
                filling.held[number] = True
                filling.earlier[piece.slot.start + piece.start - begin :][: piece.numel].add_(grad)
                self._give(parameter, None)

    def _acquire(self, filling: _Shard) -> None:
        """Give a bucket a buffer: a free one, or that of the bucket which was sent first."""
        if not self._free:
            self._settle(next(sent for sent in self._buckets if sent.work is not None))
        filling.memory = memory = self._free.pop()
        filling.buffer = memory.view(self.dtype_of(filling.bucket))[: filling.bucket.numel]
        views = filling.views_of.get(memory.data_ptr())
        if views is None:
            views = filling.views_of[memory.data_ptr()] = [slot.view(filling.buffer) for slot in filling.bucket.slots]
        filling.views = views

    def _give_back(self, filling: _Shard) -> None:
        if not filling.is_kept and filling.memory is not None:
            self._free.append(filling.memory)
            filling.memory = filling.buffer = None
