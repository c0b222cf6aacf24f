"""GradientBuckets: gradients live in a few flat tensors, and each of these is reduced as soon as backward has filled it.

Parameters are taken in reverse order of their index, which is roughly the order in which backward finishes them, and never in the order
in which hooks fire: that changes under torch.compile, and must be the same on all ranks. A bucket holds one dtype, on one device:

    | gradient of p9 | gradient of p8 | ... | used p9 | used p8 | ... |     each gradient starts at a multiple of 64 bytes

`used` is 1 where this rank has a gradient. It is summed with the rest, so that a parameter that no rank used keeps `grad = None`
(AdamW would decay it otherwise), and one that only some ranks used gets their sum, without one more message.

Buckets are launched strictly in their order, over a communicator of their own: neither a rank that leaves parameters out nor a collective
that the model issues in its backward (synchronised BatchNorm) can change what meets what.

The gradients are views: `torch.save(p.grad)` writes the whole bucket, and a reference to one changes with the next step. Clone it.
Second derivatives (`create_graph=True`) do not pass through the reduction. The idea is that of PyTorch DDP (Li et al., arXiv:2006.15704).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import CommunicationError, ConfigError
from ringfold.collectives.work import Work
from ringfold.parallel.agreement import require_agreement
from ringfold.parallel.sparse import reduce_sparse
from torch import nn

Group = list[tuple[str, nn.Parameter]]

_ALIGNMENT_NBYTES = 64
_CONVERTED = "the model was converted or moved after it was made parallel. Do that before, or close() the parallel model and make it again"
_FIRST_BUCKET_MB = 1.0  # small, so that communication starts early


@dataclass(slots=True)
class _Slot:
    """The place of one parameter's gradient in its bucket."""

    name: str
    parameter: nn.Parameter
    bucket: _Bucket
    position: int  # among the slots of the bucket, and of its `used` element
    offset_nbytes: int  # in the bucket
    view: torch.Tensor
    ready_in: int = -1  # the last backward, by number, in which the gradient became ready


@dataclass(slots=True)
class _Bucket:
    flat: torch.Tensor
    used: torch.Tensor
    slots: list[_Slot] = field(default_factory=list)
    waiting_for: int = 0
    work: Work | None = None
    absent: list[_Slot] = field(default_factory=list)  # the slots for which this rank has no gradient, once launched


class GradientBuckets:
    """Reduce the gradients of `named_parameters` over `comm`; made by all ranks together.

    With `averaged` the reduction divides by the number of ranks; else it is a plain sum, and gradients must be None at the start of a
    step (a sum that has already been reduced would be summed again). `sparse` names parameters with sparse gradients, which are gathered
    instead (`sparse_parameter_names`). Frozen parameters are left alone, and one that is listed twice counts once. With one rank there
    is nothing to reduce, and gradients stay where autograd puts them.

    Hooks start the reduction by themselves in every backward outside `no_sync`. Where a step is more than one call of backward, or where
    gradients come from elsewhere than a hook, put it between `begin()` and `finish()`.

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
        unique = {id(parameter): (name, parameter) for name, parameter in reversed(list(named_parameters))}
        named = list(reversed(unique.values()))
        require_agreement("parameters", {name: _describe(parameter, name in sparse) for name, parameter in named}, comm)
        self._averaged = averaged
        self._trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        self._frozen = [(name, parameter) for name, parameter in named if not parameter.requires_grad]
        self._sparse = [parameter for name, parameter in self._trained if name in sparse]
        self._slots: dict[int, _Slot] = {}
        self._buckets: list[_Bucket] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._comm = comm
        self._is_open = comm.size > 1
        if self._is_open:
            self._comm = comm.subgroup(range(comm.size), f"gradients of {comm.name}")
            dense = [(name, parameter) for name, parameter in self._trained if name not in sparse]
            for group in _partition(dense, int(bucket_mb * 2**20)):
                self._add_bucket(group)
            self._install()
        self._backward = 0  # the number of the backward that is being collected, or was last
        self._collecting = False
        self._synchronised = True
        self._launched = 0

    @property
    def nbytes_of_each(self) -> list[int]:
        """The size of each bucket, in the order in which they are launched."""
        return [bucket.flat.nbytes for bucket in self._buckets]

    @property
    def is_collecting(self) -> bool:
        """Whether a step has begun and not finished: true between steps only if a backward has raised."""
        return self._collecting

    def gradient_ready(self, parameter: nn.Parameter) -> None:
        """Take `parameter.grad` as complete for this backward; launch what can be launched.

        Raises:
            CommunicationError: the gradient of this backward has already been sent.
        """
        slot = self._slots.get(id(parameter))
        if slot is None:
            self._begin_in_backward()  # a sparse gradient is reduced by finish()
            return
        if parameter.grad is not slot.view:
            _move_into_view(slot)
        if not self._synchronised:
            return
        if not self._collecting:
            self._begin_in_backward()
        bucket = slot.bucket
        if slot.ready_in != self._backward:
            slot.ready_in = self._backward
            bucket.waiting_for -= 1
            if not bucket.waiting_for:
                self._launch_complete()
        elif bucket.work is not None:
            raise CommunicationError(
                f"the gradient of {slot.name} became ready a second time in one backward, after it had been sent: the parameter is used in "
                "several checkpointed regions. Use checkpoint(..., use_reentrant=False), or run backward inside no_sync() and then finish()"
            )

    def begin(self) -> None:
        """Open a step by hand: whatever becomes ready from now on belongs to it, until `finish()`. What a failed step left is dropped."""
        self.reset()
        self._backward += 1
        for bucket in self._buckets:
            bucket.waiting_for = len(bucket.slots)
            bucket.absent.clear()
        self._collecting = True

    def finish(self) -> None:
        """Launch what is left, with zeros for parameters without a gradient, and wait for all of it.

        A rank that ran no backward in this step calls it too: the others wait for its zeros.

        Raises:
            ConfigError: a parameter that was frozen when the buckets were made requires a gradient now.
            CommunicationError: a reduction failed; the gradients are then undefined.
        """
        if not self._is_open:
            return
        if not self._collecting:
            self.begin()
        try:
            for _ in self._finishing():
                pass
        finally:
            self.reset()

    def reset(self) -> None:
        """Drop a step that was begun and not finished: wait until no reduction writes to the buckets, whatever became of it."""
        for bucket in self._buckets[: self._launched]:
            work, bucket.work = bucket.work, None
            if work is not None:
                try:
                    work.wait()
                except CommunicationError:
                    pass  # the step that failed has raised already; a broken communicator says so again when it is next used
        self._launched = 0
        self._collecting = False

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients on this rank only, for every backward that runs inside; the next one outside reduces the whole sum."""
        before, self._synchronised = self._synchronised, False
        try:
            yield
        finally:
            self._synchronised = before

    def close(self) -> None:
        """Take the hooks off the parameters and close the communicator; gradients stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self.reset()
        self._slots.clear()
        self._buckets.clear()
        if self._is_open:
            self._is_open = False
            self._comm.close()

    def _add_bucket(self, group: Group) -> None:
        dtype, device = group[0][1].dtype, group[0][1].device
        offsets, end = [], 0
        for _, parameter in group:
            offsets.append(end)
            end += _aligned_numel(parameter)
        flat = self._comm.empty(end + len(group), dtype=dtype, device=device).zero_()  # zeros in the gaps too: what is reduced must be a number
        bucket = _Bucket(flat=flat, used=flat[end:])
        for position, ((name, parameter), offset) in enumerate(zip(group, offsets, strict=True)):
            view = flat[offset : offset + parameter.numel()].as_strided(parameter.shape, _strides_of_gradient(parameter))
            slot = _Slot(name, parameter, bucket, position, offset * flat.element_size(), view)
            bucket.slots.append(slot)
            self._slots[id(parameter)] = slot
        self._buckets.append(bucket)

    def _install(self) -> None:
        # A hook that held the buckets would keep them, and the model, alive for ever: the cycle runs through C++, where no collector looks.
        reference = weakref.ref(self)

        def hook(parameter: torch.Tensor) -> None:
            buckets = reference()
            if buckets is not None:
                buckets.gradient_ready(parameter)  # type: ignore[arg-type]

        self._hooks = [parameter.register_post_accumulate_grad_hook(hook) for _, parameter in self._trained]

    def _begin_in_backward(self) -> None:
        """Begin the step of the backward that is running, and have autograd finish it."""
        if self._synchronised and not self._collecting and self._is_open:
            _at_end_of_backward(self._finish_in_backward)
            self.begin()

    def _finish_in_backward(self) -> None:
        """Begin to finish, in phases: those of all buckets that this backward has filled take turns, so that none waits before all have sent.

        Ranks that fill the buckets of two models in different orders would wait for each other otherwise.
        """
        phases = self._finishing()

        def advance() -> None:
            try:
                if next(phases, self) is self:
                    self.reset()
                else:
                    _at_end_of_backward(advance)
            except BaseException:
                self.reset()
                raise

        advance()

    def _finishing(self) -> Iterator[None]:
        """Launch what is left and wait for all; yield between phases, each of which waits only for what the ones before it have sent."""
        thawed = [name for name, parameter in self._frozen if parameter.requires_grad]
        if thawed:
            raise ConfigError(
                f"frozen when the model was made parallel, and requiring a gradient now, which would not be reduced: {', '.join(thawed)}. "
                "Freeze and unfreeze before, or close() the parallel model and make it again"
            )
        while self._launched < len(self._buckets):
            self._launch(self._buckets[self._launched])
        sparse = reduce_sparse(self._sparse, self._comm, self._averaged)
        for _ in sparse:
            yield
        for bucket in self._buckets:
            self._complete(bucket)

    def _launch_complete(self) -> None:
        while self._launched < len(self._buckets) and not self._buckets[self._launched].waiting_for:
            self._launch(self._buckets[self._launched])

    def _launch(self, bucket: _Bucket) -> None:
        base = bucket.flat.data_ptr()
        moved = [slot.name for slot in bucket.slots if slot.view.data_ptr() not in (0, base + slot.offset_nbytes)]  # 0: no elements
        if moved:
            raise ConfigError(f"gradients of {', '.join(moved)} have left their bucket: {_CONVERTED}")
        bucket.used.fill_(1.0)
        if bucket.waiting_for:
            for slot in bucket.slots:
                if slot.ready_in != self._backward:
                    self._settle(slot)
        bucket.work = self._comm.all_reduce(bucket.flat, "avg" if self._averaged else "sum", async_op=True)
        self._launched += 1

    def _settle(self, slot: _Slot) -> None:
        """Bring in a gradient that no hook announced in this backward: from earlier ones under `no_sync`, or none at all."""
        if slot.parameter.grad is None:
            slot.view.zero_()
            slot.bucket.used[slot.position] = 0.0
            slot.bucket.absent.append(slot)
        elif slot.parameter.grad is not slot.view:
            _move_into_view(slot)

    def _complete(self, bucket: _Bucket) -> None:
        work, bucket.work = bucket.work, None
        absent, bucket.absent = bucket.absent, []
        if work is not None:
            work.wait()
        if absent:
            used = bucket.used.tolist()
            for slot in absent:
                slot.parameter.grad = slot.view if used[slot.position] else None


def _partition(named: Group, limit_nbytes: int) -> list[Group]:
    """Group parameters, last one first, by dtype and device, into buckets of at most `limit_nbytes` (a larger parameter has its own)."""
    closed: list[Group] = []
    filling: dict[tuple[torch.dtype, torch.device], Group] = {}
    filled_nbytes: dict[tuple[torch.dtype, torch.device], int] = {}
    for name, parameter in reversed(named):
        kind, nbytes = (parameter.dtype, parameter.device), _aligned_numel(parameter) * parameter.element_size()
        limit = limit_nbytes if closed else min(limit_nbytes, int(_FIRST_BUCKET_MB * 2**20))
        if kind in filling and filled_nbytes[kind] + nbytes > limit:
            closed.append(filling.pop(kind))
        if kind not in filling:
            filling[kind], filled_nbytes[kind] = [], 0
        filling[kind].append((name, parameter))
        filled_nbytes[kind] += nbytes
    return closed + list(filling.values())


def _aligned_numel(parameter: nn.Parameter) -> int:
    step = _ALIGNMENT_NBYTES // parameter.element_size()
    return -(-parameter.numel() // step) * step


def _strides_of_gradient(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the parameter's own strides if it fills its memory without gaps (channels_last, transposed), else contiguous ones.

    Autograd and the fused optimizers are fast only when a gradient is laid out like its parameter.
    """
    expected = 1
    for size, stride in sorted(zip(parameter.shape, parameter.stride(), strict=True), key=lambda pair: (pair[1], pair[0])):
        if size != 1 and stride != expected:
            return torch.empty(parameter.shape, device="meta").stride()
        expected *= size
    return parameter.stride()


def _move_into_view(slot: _Slot) -> None:
    """Copy a gradient that autograd or the user made elsewhere into the bucket, and let the parameter have the view.

    Copying a fresh gradient is cheaper than clearing the bucket and having autograd add to it.
    """
    grad = slot.parameter.grad
    if grad is None:
        raise ConfigError(f"gradient_ready({slot.name}) was called, but the parameter has no gradient")
    if grad.is_sparse:
        grad = grad.to_dense()
    slot.view.copy_(grad.detach() if grad.requires_grad else grad)
    try:
        slot.parameter.grad = slot.view
    except RuntimeError as error:
        raise ConfigError(f"{slot.name} is not the {tuple(slot.view.shape)} {slot.view.dtype} it was ({error}): {_CONVERTED}") from error


def _describe(parameter: nn.Parameter, is_sparse: bool) -> str:
    words = [str(tuple(parameter.shape)), str(parameter.dtype).removeprefix("torch."), "trained" if parameter.requires_grad else "frozen"]
    return " ".join(words + ["sparse"] * is_sparse)


def _at_end_of_backward(callback: Callable[[], None]) -> None:
    """Have autograd call `callback` when the backward that is running has run; its exceptions come out of `backward()`."""
    try:
        torch.autograd.Variable._execution_engine.queue_callback(callback)
    except RuntimeError as error:
        raise ConfigError(f"a gradient became ready outside of backward ({error}): put the step between begin() and finish()") from error
