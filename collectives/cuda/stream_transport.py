"""Operations in stream order: put on a stream that waits for the caller's, complete when an event on it is, watched by one thread.

`begin` returns when everything has been put on the stream; `Work.wait` makes the caller's current stream wait, not the CPU. Every operation is
entered into the C++ core as one that is carried elsewhere, so it has a record in the rank's page, a deadline, and fails with the communicator when a
rank dies. Who finds that out is the thread that watches: it then has the transport end whatever the stream waits for, so that no stream waits for
ever, and the failure is raised by the next wait or operation. What was computed from the result meanwhile means nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from ringfold.collectives import carried
from ringfold.collectives._native import Outcome, core
from ringfold.collectives.algorithms import build
from ringfold.collectives.errors import CommunicationError, ConfigError
from ringfold.collectives.interpreter import Execution, Plan
from ringfold.collectives.page import State
from ringfold.collectives.rounds import Round, rounds
from ringfold.collectives.transport import Request
from ringfold.collectives.work import Work
from torch import Tensor

if TYPE_CHECKING:
    from ringfold.collectives.communicator import Communicator

__all__ = ["Message", "StreamTransport"]

# How late the thread may be in finding that an operation is complete, or has failed.
POLL_S = 2e-3
# How long a rank that closes waits for others to have read what it has for them, before it lets its stream go; they are about to, or they are gone.
CLOSE_S = 5.0
# The core's error code of what is neither a lost peer nor a timeout, see csrc/common/error.h.
SYSTEM = 5

Message = tuple[int, Tensor]  # the other end, and what it is sent, or where it is received


@dataclass(slots=True, eq=False)
class _Operation:
    """One operation on the stream; keeps its tensors until it is complete."""

    handle: object
    request: Request | None
    event: torch.cuda.Event
    complete: bool = False

    def settle(self) -> bool:
        """Note in the core's books if the operation is complete; tell whether it is. Any thread may call it."""
        if not self.complete and self.event.query():
            self.complete = True
            self.request = None
            core.leave(self.handle)
        return self.complete


class StreamTransport:
    """What nccl.py and shared_device.py have in common; ranks are those of the communicator, which has more than one."""

    name: str

    def __init__(self, communicator: Communicator, handle: object, fail: Callable[[Outcome], None], device: torch.device) -> None:
        """Make a transport for tensors on `device`. handle: the core's communicator. fail: raises what the outcome of an operation stands for."""
        self.device = device
        self.rank = communicator.rank
        self.size = communicator.size
        self._communicator = communicator
        self._session = communicator.session
        self._handle = handle
        self._fail = fail
        self.stream = torch.cuda.Stream(device, priority=-1)
        self._schedules: dict[tuple[object, ...], tuple[Plan, list[Round]]] = {}
        self._watch = _Watch(self)

    # -- what a transport does for itself ---------------------------------------------------------------------------------------------

    def why_not_native(self, request: Request) -> str | None:
        """Return why the transport's own collective cannot carry out the request, None if it can."""
        raise NotImplementedError

    def prepare(self, request: Request) -> None:
        """Do what takes all ranks together before the request can be put on the stream."""

    def run_native(self, request: Request) -> None:
        """Put the transport's own collective on the current stream, which is `self.stream`."""
        raise NotImplementedError

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Put messages on the current stream that pass as one group: at most one to each rank and one from each, none to itself.

        All ranks do it at the same place among their operations; some may have nothing to send or to receive.
        """
        raise NotImplementedError

    def release(self) -> None:
        """End whatever the stream waits for; called by the watching thread, again and again until nothing is in flight."""
        raise NotImplementedError

    def drain(self) -> None:
        """Put on the stream what must have happened before this rank's memory may go."""

    def free(self) -> None:
        """Free everything; nothing is in flight."""

    # -- the seam ---------------------------------------------------------------------------------------------------------------------

    def begin(self, request: Request, timeout_s: float, awaited: bool = False) -> Work:  # noqa: ARG002  # waiting costs nothing here
        """Put an operation on the stream and return its Work.

        Raises: ConfigError if the transport cannot do it; nothing was sent.
        """
        algorithm, run = self._choose(request)
        self.prepare(request)
        handle = carried.enter(self._session, self._handle, self.name, request, algorithm, timeout_s)
        if core.done(handle):  # the communicator has failed before
            self._watch.failed = True
            return Work(handle, (), self._fail)
        caller = torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
                self.stream.wait_stream(caller)
                run()
                event = torch.cuda.Event()
                event.record(self.stream)
        except Exception as error:
            core.abandon(handle, SYSTEM, repr(error))
            self._watch.failed = True  # what was put on the stream may wait for others
            raise
        operation = _Operation(handle, request, event)
        self._watch.add(operation)
        return _StreamWork(operation, self, self._fail)

    def poll(self) -> None:
        """Note in the core's books what is complete, which the watching thread does a little later."""
        self._watch.settle()

    def close(self) -> None:
        """Wait until nothing is in flight and free what the transport holds; may be called again."""
        if not self._watch.is_open:
            return
        drained = torch.cuda.Event()
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            if not self._has_failed():
                self.drain()
            drained.record(self.stream)
        patience = time.monotonic() + CLOSE_S
        while not (is_drained := drained.query()) and time.monotonic() < patience + CLOSE_S:
            if self._has_failed() or time.monotonic() > patience:
                self.release()
            time.sleep(POLL_S / 10)
        self._watch.close()
        if is_drained:  # else the GPU may still use it, and has it until the process ends
            self.free()

    def _has_failed(self) -> bool:
        return self._watch.failed or self._session.page.read().state is State.FAILED

    # -- schedules --------------------------------------------------------------------------------------------------------------------

    def _choose(self, request: Request) -> tuple[str, Callable[[], None]]:
        """Return the name of what carries out the request, and what puts it on the current stream."""
        if request.op in ("gather", "scatter", "all_to_all") and request.algorithm in (None, "native"):
            return "native", lambda: self._pieces(request)
        why = self.why_not_native(request)
        if why is None and request.algorithm in (None, "native"):
            return "native", lambda: self.run_native(request)
        if request.algorithm == "native":
            raise ConfigError(f"{request.op} with algorithm='native': {why}. Leave the algorithm out, and a schedule of ringfold's runs instead")
        plan, of_rank = self._schedule(request)
        return plan.schedule.algorithm, lambda: self._run_rounds(request, plan, of_rank)

    def _schedule(self, request: Request) -> tuple[Plan, list[Round]]:
        topology = self._communicator.topology
        choice = carried.choose(request, topology)
        key = (request.op, request.root, choice.algorithm, choice.variant)
        known = self._schedules.get(key)
        if known is None:
            # One segment: whoever carries out a message pipelines it himself.
            name = (request.op, choice.algorithm, choice.variant)
            plans = [Plan(build(*name, rank, self.size, 1, request.root, hosts=topology.hosts)) for rank in range(self.size)]
            known = self._schedules[key] = plans[self.rank], rounds(plans)[self.rank]
        return known

    def _run_rounds(self, request: Request, plan: Plan, of_rank: Sequence[Round]) -> None:
        group = _Group()
        run = Execution(plan, request, group, 0)
        for round_ in of_rank:
            posted = [run.post(step) for step in round_.messages]
            self.exchange(*group.take())
            for message in posted:
                run.complete(message)
            for step in round_.local:
                run.run_local(step)

    def _pieces(self, request: Request) -> None:
        """Carry out what is but messages: gather, scatter, all_to_all."""
        root, me = request.root, self.rank
        to = _split(request.input, request.input_counts, self.size) if request.op != "gather" else _only(root, request.input)
        out_of = _split(request.output, request.output_counts, self.size) if request.op != "scatter" else _only(root, request.output)
        if me in to and me in out_of and out_of[me].data_ptr() != to[me].data_ptr():
            out_of[me].copy_(to[me])
        self.exchange([each for each in to.items() if each[0] != me], [each for each in out_of.items() if each[0] != me])


def _split(whole: Tensor | None, counts: Sequence[int] | None, size: int) -> dict[int, Tensor]:
    """Return each rank's piece of what has one for each, if it is here."""
    if whole is None:
        return {}
    return dict(enumerate(whole.split(list(counts) if counts is not None else [whole.numel() // size] * size)))


def _only(rank: int, tensor: Tensor | None) -> dict[int, Tensor]:
    return {} if tensor is None else {rank: tensor}


class _Group:
    """The messages of a round, as an Execution posts them."""

    def __init__(self) -> None:
        self._sends: list[Message] = []
        self._receives: list[Message] = []

    def isend(self, tensor: Tensor, peer: int, _: int) -> _Group:
        self._sends.append((peer, tensor))
        return self

    def irecv(self, tensor: Tensor, peer: int, _: int) -> _Group:
        self._receives.append((peer, tensor))
        return self

    def test(self) -> bool:
        return True

    def take(self) -> tuple[list[Message], list[Message]]:
        """Return the sends and receives since the last call."""
        taken = self._sends, self._receives
        self._sends, self._receives = [], []
        return taken


class _StreamWork(Work):
    """The Work of an operation on a stream."""

    __slots__ = ("_operation", "_transport")

    def __init__(self, operation: _Operation, transport: StreamTransport, fail: Callable[[Outcome], None]) -> None:
        super().__init__(operation.handle, (), fail)
        self._operation = operation
        self._transport = transport

    def wait(self) -> None:
        """Have the current stream wait for the operation; see Work.wait. Of a failure that comes later the next operation tells."""
        if not self._operation.settle():
            torch.cuda.current_stream(self._transport.device).wait_event(self._operation.event)
        if core.done(self._handle):
            super().wait()

    def done(self) -> bool:
        """Tell whether the operation is complete, or has failed."""
        return self._operation.settle() or core.done(self._handle)


class _Watch:
    """The thread that sees operations complete or fail."""

    def __init__(self, transport: StreamTransport) -> None:
        self.is_open = True
        self.failed = False
        self._transport = transport
        self._in_flight: list[_Operation] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="ringfold-cuda", daemon=True)
        self._thread.start()

    def add(self, operation: _Operation) -> None:
        with self._changed:
            self._in_flight.append(operation)
            self._changed.notify()

    def settle(self) -> None:
        for operation in list(self._in_flight):
            operation.settle()

    def close(self) -> None:
        """End the thread; nothing is in flight any more."""
        with self._changed:
            self.is_open = False
            self._changed.notify()
        self._thread.join()
        self.settle()
        self._in_flight = []
        del self._transport  # it refers to us

    def _run(self) -> None:
        torch.cuda.set_device(self._transport.device)
        while True:
            with self._changed:
                while self.is_open and not self._in_flight:
                    self._changed.wait()
                if not self.is_open:
                    return
                operations = list(self._in_flight)
            for operation in operations:
                self._look_at(operation)
            with self._changed:
                self._in_flight = [operation for operation in self._in_flight if not operation.complete]
            time.sleep(POLL_S)

    def _look_at(self, operation: _Operation) -> None:
        try:
            if not operation.settle() and core.done(operation.handle):
                self.failed = True
                self._transport.release()
        except (CommunicationError, RuntimeError) as error:  # of CUDA: the GPU itself has failed
            self.failed = operation.complete = True
            core.abandon(operation.handle, SYSTEM, repr(error))
