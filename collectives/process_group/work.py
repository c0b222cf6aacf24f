"""What an operation of the process group returns, and the threads that complete torch's futures.

`Work.wait` goes straight to the core. Only who asks for the future needs a thread, since torch runs the callbacks of a future where it is
completed, and they may issue collectives and wait for them: so that must not be the core's thread, and one thread would not do. The works of
a `Lane` are waited for one after another, by one thread at a time, the leader: it hands the lead over to another before it runs callbacks.
Whatever callbacks wait for, somebody leads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from queue import SimpleQueue
from time import monotonic, sleep
from typing import Any, Protocol

import torch
import torch.distributed as dist
from ringfold.collectives.errors import CollectiveTimeout, CommunicationError
from ringfold.collectives.process_group.uncompiled import uncompiled
from torch import Tensor
from torch.futures import Future

__all__ = ["DONE", "Lane", "Threads", "Together", "Work"]

LONGEST_PAUSE_S = 0.001


class Native(Protocol):
    """What Work needs of a communicator's Work."""

    def wait(self) -> object: ...

    def done(self) -> bool: ...


class Together:
    """Several operations as one."""

    def __init__(self, works: Sequence[Native]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()

    def done(self) -> bool:
        return all(work.done() for work in self._works)


class Threads:
    """Threads that run what they are given: as many as are busy at one time, kept until `close`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._started: list[threading.Thread] = []
        self._is_closed = False

    def run(self, task: Callable[[], None]) -> bool:
        """Run the task on a thread of its own; False if closed."""
        with self._lock:
            if self._is_closed:
                return False
            if self._idle:
                self._idle -= 1
            else:
                # Not joined at the interpreter's end: a rank that ends by an exception must not wait for peers that wait for it.
                thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._started.append(thread)
                thread.start()
            self._tasks.put(task)
            return True

    def complete(self, work: Native, future: Future[None]) -> None:
        """Set the future's result when the work has ended, whatever becomes of others."""
        Lane(self).complete(work, future)

    def close(self) -> None:
        """Let every thread finish what it does, and end it; what the tasks wait for must have ended."""
        with self._lock:
            self._is_closed = True
            started, self._started = self._started, []
        for _ in started:
            self._tasks.put(None)
        for thread in started:
            if thread is not threading.current_thread():
                thread.join()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # it may hold tensors, and the next may be long in coming
            with self._lock:
                self._idle += 1


class Lane:
    """Completes the futures of works that end in the order in which they began."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._lock = threading.Lock()
        self._pending: deque[tuple[Native, Future[None]]] = deque()
        self._is_led = False

    def complete(self, work: Native, future: Future[None]) -> None:
        """Set the future's result when the work has ended, well or not."""
        with self._lock:
            self._pending.append((work, future))
            if self._is_led:
                return
            self._is_led = True
        if not self._threads.run(self._lead):
            self._lead()

    def _lead(self) -> None:
        is_leader = True
        while is_leader:
            work, future = self._pending.popleft()
            with suppress(Exception):  # the future's own callback asks the work again
                work.wait()
            with self._lock:
                self._is_led = bool(self._pending)
                is_leader = self._is_led and not self._threads.run(self._lead)
            future.set_result(None)


@uncompiled
class Work(dist.Work):
    """One operation of torch: `native` is the communicator's, `outputs` the tensors that hold its result.

    order: the lane of the works that end in the order in which they began, or threads, for one that ends when it ends.
    finish: what is to be done once when it is complete, before anybody learns of it.
    device: the GPU whose streams are ordered by the work; None where the CPU waits.
    """

    def __init__(
        self,
        native: Native,
        outputs: Any,
        order: Lane | Threads,
        finish: Callable[[], None] | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self._native = native
        self._outputs = outputs
        self._order = order
        self._finish = finish
        self._lock = threading.Lock() if finish is not None else None
        self._device = device
        self._future: Future[Any] | None = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until the operation is complete, or for `timeout` if it is not zero; on a GPU have the current stream wait instead.

        Raises:
            CommunicationError: see Communicator; CollectiveTimeout also at this call's timeout, after which the operation goes on.
        """
        if timeout:
            self._wait_until(monotonic() + timeout.total_seconds(), timeout)
        self._native.wait()
        if self._lock is not None:
            with self._lock:
                finish, self._finish = self._finish, None
                if finish is not None:
                    finish()
        return True

    def _wait_until(self, deadline: float, timeout: timedelta) -> None:
        pause_s = LONGEST_PAUSE_S / 64
        while not self._native.done():
            if monotonic() >= deadline:
                raise CollectiveTimeout(f"wait(timeout={timeout}): the operation is not complete, and goes on; wait again, or raise the timeout")
            sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def is_completed(self) -> bool:
        """Tell whether `wait` would return or raise at once."""
        return self._native.done()

    done = is_completed

    def is_success(self) -> bool:
        """Tell whether the operation is complete and has not failed."""
        return self.is_completed() and self.exception() is None

    def exception(self) -> Exception | None:
        """Return what the operation failed with; None if it has not."""
        if self.is_completed():
            try:
                self.wait()
            except CommunicationError as error:
                return error
        return None

    def synchronize(self) -> None:
        """Wait, as `wait` does."""
        self.wait()

    def result(self) -> Any:
        """Return the output tensors."""
        return self._outputs

    def source_rank(self) -> int:
        """Return the rank whose message a recv from anybody has taken."""
        return int(self._native.source)  # type: ignore[attr-defined]

    _source_rank = source_rank

    def get_future(self) -> Future[Any]:
        """Return the future of the outputs, always the same; its callbacks run on a thread that may wait."""
        if self._future is None:
            completed: Future[None] = Future() if self._device is None else Future(devices=[self._device])
            # A result that is computed in a callback, since only there an exception becomes one that C++ (DDP's reducer) sees.
            self._future = completed.then(self._resolve)
            if self._device is None:
                self._order.complete(self._native, completed)
            else:  # as of a stream: the callback has one of its own, which waits, and whoever takes the result waits for that
                completed.set_result(None)
        return self._future

    def _resolve(self, _: Future[None]) -> Any:
        self.wait()
        return self._outputs


@uncompiled
class Completed(dist.Work):
    """A work that was complete before its call returned."""

    def wait(self, timeout: timedelta | None = None) -> bool:  # noqa: ARG002
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def exception(self) -> None:
        return None

    def synchronize(self) -> None:
        pass

    def result(self) -> list[Tensor]:
        return []

    def get_future(self) -> Future[list[Tensor]]:
        future: Future[list[Tensor]] = Future()
        future.set_result([])
        return future


# torch drops the work of a call with async_op=False once it has waited for it.
DONE = Completed()
