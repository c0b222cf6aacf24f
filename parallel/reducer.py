"""GradientReducer: send each bucket of gradients as soon as backward has filled it, in one order on all ranks.

What a gradient is moved into, and what is sent, is the business of its two kinds: GradientBuckets (buckets.py: every rank ends with the
whole gradient) and ShardedGradients (zero/gradients.py: each rank ends with its own range). Here is when.

Buckets are launched strictly in their order, over a communicator of their own: neither a rank that leaves parameters out nor a collective
that the model issues in its backward (synchronised BatchNorm) can change what meets what. The idea is that of PyTorch DDP (Li et al.,
arXiv:2006.15704). Second derivatives (`create_graph=True`) do not pass through the reduction.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Generic, TypeVar

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import CommunicationError, ConfigError
from ringfold.collectives.work import Work
from ringfold.parallel.agreement import require_agreement
from ringfold.parallel.bucket import Bucket, Slot
from ringfold.parallel.traffic import Traffic
from torch import nn

__all__ = ["CONVERTED", "Filling", "GradientReducer", "dense_gradient"]

CONVERTED = "the model was converted or moved after it was made parallel. Do that before, or close() the parallel model and make it again"


class Filling:
    """One bucket in the course of a step."""

    __slots__ = ("bucket", "is_sent", "ready_in", "waiting_for", "work")

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.waiting_for = 0  # gradients that this backward has not announced yet
        self.ready_in = [-1] * len(bucket.slots)  # for each slot the last backward, by number, in which its gradient became ready
        self.work: Work | None = None
        self.is_sent = False  # in this backward


F = TypeVar("F", bound=Filling)


class GradientReducer(ABC, Generic[F]):
    """Reduce the gradients of `named_parameters` over `comm`; made by all ranks together.

    Frozen parameters are left alone, and one that is listed twice counts once. Hooks start the reduction by themselves in every backward
    outside `no_sync`. Where a step is more than one call of backward, or where gradients come from elsewhere than a hook, put it between
    `begin()` and `finish()`.

    Raises:
        ConfigError: names, shapes, dtypes or requires_grad differ between ranks.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], comm: Communicator, averaged: bool, sparse: Collection[str] = ()
    ) -> None:
        unique = {id(parameter): (name, parameter) for name, parameter in reversed(list(named_parameters))}
        named = list(reversed(unique.values()))
        require_agreement("parameters", {name: _describe(parameter, name in sparse) for name, parameter in named}, comm)
        self._comm = comm
        self._averaged = averaged
        self._trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        self._frozen = [(name, parameter) for name, parameter in named if not parameter.requires_grad]
        self._buckets: list[F] = []
        self._slots: dict[int, tuple[F, Slot]] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._is_open = False
        self._backward = 0  # the number of the backward that is being collected, or was last
        self._collecting = False
        self._synchronised = True
        self._launched = 0

    @property
    def nbytes_of_each(self) -> list[int]:
        """The size of each bucket, in the order in which they are launched."""
        return [filling.bucket.nbytes for filling in self._buckets]

    def traffic(self) -> list[Traffic]:
        """Return what one reduction sends."""
        return []

    @property
    def is_collecting(self) -> bool:
        """Whether a step has begun and not finished: true between steps only if a backward has raised."""
        return self._collecting

    @property
    def reduces_every_backward(self) -> bool:
        """Whether there is no accumulating on this rank only."""
        return False

    def gradient_ready(self, parameter: nn.Parameter) -> None:
        """Take `parameter.grad` as complete for this backward; launch what can be launched.

        Raises:
            CommunicationError: the gradient of this backward has already been sent.
        """
        if self._synchronised and not self._collecting and self._is_open:
            self._begin_in_backward()
        place = self._slots.get(id(parameter))
        if place is None:
            return  # a sparse gradient is reduced by finish()
        filling, slot = place
        if parameter.grad is None:
            raise ConfigError(f"gradient_ready({slot.name}) was called, but the parameter has no gradient")
        if not filling.is_sent:
            self._take(filling, slot)
        if not self._synchronised:
            return
        if filling.ready_in[slot.position] != self._backward:
            filling.ready_in[slot.position] = self._backward
            filling.waiting_for -= 1
            if not filling.waiting_for:
                self._launch_complete()
        elif filling.is_sent:
            raise CommunicationError(
                f"the gradient of {slot.name} became ready a second time in one backward, after it had been sent: the parameter is used in "
                "several checkpointed regions. Use checkpoint(..., use_reentrant=False), or run backward inside no_sync() and then finish()"
            )

    def begin(self) -> None:
        """Open a step by hand: whatever becomes ready from now on belongs to it, until `finish()`. What a failed step left is dropped."""
        self.reset()
        self._backward += 1
        for filling in self._buckets:
            filling.waiting_for = len(filling.bucket.slots)
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
        for filling in self._buckets[: self._launched]:
            work, filling.work, filling.is_sent = filling.work, None, False
            if work is not None:
                try:
                    work.wait()
                except CommunicationError:
                    pass  # the step that failed has raised already; a broken communicator says so again when it is next used
        self._launched = 0
        self._collecting = False

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate gradients on this rank only, for every backward that runs inside; the next one outside reduces the whole sum."""
        return self._unsynchronised()

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

    @contextmanager
    def _unsynchronised(self) -> Iterator[None]:
        before, self._synchronised = self._synchronised, False
        try:
            yield
        finally:
            self._synchronised = before

    @abstractmethod
    def _take(self, filling: F, slot: Slot) -> None:
        """Move `slot.parameter.grad`, which is complete for this backward, to where it is sent from, if that can be now."""

    @abstractmethod
    def _launch(self, filling: F) -> None:
        """Set `filling.work` to the reduction of the bucket, with zeros for gradients that this rank does not have."""

    @abstractmethod
    def _complete(self) -> Iterator[None]:
        """Wait for what was launched and give parameters their gradients; yield between phases that wait only for what earlier ones sent."""

    def _open(self, fillings: Sequence[F]) -> None:
        """Let hooks fill these buckets."""
        self._buckets = list(fillings)
        self._slots = {id(slot.parameter): (filling, slot) for filling in fillings for slot in filling.bucket.slots}
        self._is_open = True
        # A hook that held the reducer would keep it, and the model, alive for ever: the cycle runs through C++, where no collector looks.
        reference = weakref.ref(self)

        def hook(parameter: torch.Tensor) -> None:
            reducer = reference()
            if reducer is not None:
                reducer.gradient_ready(parameter)  # type: ignore[arg-type]

        self._hooks = [parameter.register_post_accumulate_grad_hook(hook) for _, parameter in self._trained]

    def _begin_in_backward(self) -> None:
        """Begin the step of the backward that is running, and have autograd finish it."""
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
            self._launch_next()
        yield from self._complete()

    def _launch_complete(self) -> None:
        while self._launched < len(self._buckets) and not self._buckets[self._launched].waiting_for:
            self._launch_next()

    def _launch_next(self) -> None:
        filling = self._buckets[self._launched]
        self._launch(filling)
        filling.is_sent = True
        self._launched += 1


def dense_gradient(parameter: nn.Parameter) -> torch.Tensor:
    """Return the gradient of a parameter as an ordinary tensor, without a graph."""
    grad = parameter.grad
    assert grad is not None  # narrows the type: who calls has looked
    return (grad.to_dense() if grad.is_sparse else grad).detach()


def _describe(parameter: nn.Parameter, is_sparse: bool) -> str:
    words = [str(tuple(parameter.shape)), str(parameter.dtype).removeprefix("torch."), "trained" if parameter.requires_grad else "frozen"]
    return " ".join(words + ["sparse"] * is_sparse)


def _at_end_of_backward(callback: Callable[[], None]) -> None:
    """Have autograd call `callback` when the backward that is running has run; its exceptions come out of `backward()`."""
    try:
        torch.autograd.Variable._execution_engine.queue_callback(callback)
    except RuntimeError as error:
        raise ConfigError(f"a gradient became ready outside of backward ({error}): put the step between begin() and finish()") from error
