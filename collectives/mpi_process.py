"""MPI in this process: loaded and initialised when first used, driven while operations are in flight, finalised at the process's end.

MPI waits without a deadline wherever ranks must come together (MPI_Init, MPI_Comm_create_group, MPI_Finalize). So one thread of ours makes
those calls and others wait for it, each with a deadline; what MPI never returns from stays behind in that thread. Between such calls the
thread drives whatever is in flight and not waited for, so that operations go on while the script computes, as those of the C++ core do.

MPI outlives a job: rf.init() and rf.shutdown() may be repeated, MPI_Init may not. A process that has given up on an operation cannot know that
the others reach MPI_Finalize, and leaves without it. What the script itself has initialised, it finalises.
"""

from __future__ import annotations

import atexit
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ringfold.collectives.errors import CollectiveTimeout, CommunicationError, ConfigError

__all__ = ["Driven", "MpiProcess", "mpi", "segments"]

T = TypeVar("T")

# The next poll comes at once, after whoever else wants this core (MPICH's own all_reduce of 16 KiB by 4 ranks on 2 cores takes 0.3 ms so; with 20
# of them before the first pause 1.5 ms). Then after an eighth of the time that has passed, up to a millisecond: so late an operation may be.
YIELDS = 400
FIRST_PAUSE_S = 20e-6
LONGEST_PAUSE_S = 1e-3
# What the thread of ours costs a script that computes meanwhile.
BACKGROUND_PAUSE_S = 500e-6


class Driven(Protocol):
    """An operation in flight."""

    finished: bool

    def advance(self) -> bool:
        """Do what can be done without waiting, and set `finished` at the end, also of a failure; return whether anything moved."""


class MpiProcess:
    """The one place where this process drives MPI; made by `mpi()`."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.healthy = True  # no operation was given up
        self.MPI: Any = None  # mpi4py.MPI, once it is initialised
        self._owns_mpi = False
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._in_flight: list[Driven] = []
        self._abandoned: list[Driven] = []
        self._waiters = 0
        self._counting = threading.Lock()
        self._turn = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="ringfold-mpi", daemon=True)
        self._thread.start()

    def initialise(self, timeout_s: float) -> None:
        """Load and initialise MPI, unless the script has; the first time collective over all ranks.

        Raises: ConfigError: mpi4py or an MPI library is missing, or was initialised without threads. CollectiveTimeout.
        """
        if self.MPI is None:
            self.MPI = self.call(self._load, "MPI_Init", timeout_s)

    def _load(self) -> Any:
        try:
            mpi4py = import_module("mpi4py")
            if "mpi4py.MPI" not in sys.modules:
                mpi4py.rc.initialize = mpi4py.rc.finalize = False
            MPI = import_module("mpi4py.MPI")
        except (ImportError, RuntimeError) as error:
            raise ConfigError(
                f"transport mpi needs mpi4py and the MPI library of the mpirun that started this process ({error}): "
                "pip install 'ringfold[mpi]', and for an unusual place of the library set MPI4PY_LIBMPI"
            ) from None
        if not MPI.Is_initialized():
            MPI.Init_thread(MPI.THREAD_MULTIPLE)
            self._owns_mpi = True
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise ConfigError(
                "MPI was initialised for one thread only, but ringfold drives it from a second one while the script computes: "
                "leave mpi4py.rc.thread_level at 'multiple', or import mpi4py.MPI after rf.init()"
            )
        MPI.COMM_WORLD.Set_errhandler(MPI.ERRORS_RETURN)
        return MPI

    def call(self, function: Callable[[], T], what: str, timeout_s: float, check: Callable[[], None] = lambda: None) -> T:
        """Run a call that may wait for other ranks and return its result; `check` is asked meanwhile whether there is still hope, and raises if not.

        Raises: CollectiveTimeout; whatever the call or `check` raises.
        """
        result: list[T] = []
        failure: list[BaseException] = []
        ended = threading.Event()

        def run() -> None:
            try:
                result.append(function())
            except BaseException as error:
                failure.append(error)
            ended.set()

        self._calls.put(run)
        deadline = time.monotonic() + timeout_s
        try:
            while not ended.wait(min(0.02, max(0.0, deadline - time.monotonic()))):
                check()
                if time.monotonic() >= deadline:
                    raise CollectiveTimeout(f"{what} did not return within {timeout_s:.1f} s: did every rank come there?")
        except BaseException:
            self.healthy = False
            raise
        if failure:
            raise failure[0]
        return result[0]

    def share(self, message: bytes | None, timeout_s: float) -> bytes:
        """Return the message of rank 0 of MPI_COMM_WORLD; collective over all of it.

        Raises: ConfigError, CommunicationError: see `initialise`. CollectiveTimeout.
        """
        self.initialise(timeout_s)
        MPI = self.MPI
        size = bytearray((len(message) if message else 0).to_bytes(8, "little"))
        self._poll(MPI.COMM_WORLD.Ibcast([size, MPI.BYTE], 0), "the broadcast of the job's address", timeout_s)
        content = bytearray(message) if message else bytearray(int.from_bytes(size, "little"))
        self._poll(MPI.COMM_WORLD.Ibcast([content, MPI.BYTE], 0), "the broadcast of the job's address", timeout_s)
        return bytes(content)

    def _poll(self, request: Any, what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not request.Test():
            if time.monotonic() >= deadline:
                self.healthy = False
                raise CollectiveTimeout(f"{what} over MPI did not end within {timeout_s:.1f} s: did every rank reach init()?")
            time.sleep(FIRST_PAUSE_S)

    # -- operations in flight ---------------------------------------------------------------------------------------------------------

    def drive(self, operation: Driven, awaited: bool) -> None:
        """Take the operation's first steps, and go on until it is finished; `awaited`: the caller does so himself."""
        with self._turn:
            operation.advance()
            if not operation.finished:
                self._in_flight.append(operation)
        if not operation.finished and not awaited and self._waiters == 0:
            self._calls.put(lambda: None)  # wakes the thread

    def wait(self, operation: Driven, spin_s: float) -> None:
        """Return when the operation is finished; its own deadline sees to that. Polls without pause for `spin_s` after whatever moved last."""
        with self._counting:
            self._waiters += 1
        try:
            idle, moved_at = 0, time.monotonic()
            while not operation.finished:
                if self._progress():
                    idle, moved_at = 0, time.monotonic()
                    continue
                idle += 1
                if time.monotonic() - moved_at < spin_s:
                    continue
                if idle < YIELDS:
                    os.sched_yield()
                    continue
                # In MPI's own collectives nothing is seen to move until the end, and each of their steps may wait for the next poll.
                time.sleep(min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, (time.monotonic() - moved_at) / 8)))
        finally:
            with self._counting:
                self._waiters -= 1
            if self._waiters == 0 and self._in_flight:
                self._calls.put(lambda: None)

    def poll(self) -> None:
        """Do what can be done without waiting."""
        self._progress()

    def abandon(self, operation: Driven) -> None:
        """Keep a failed operation's memory for ever: MPI may still write to it."""
        self.healthy = False
        self._abandoned.append(operation)

    def _progress(self) -> bool:
        if not self._turn.acquire(blocking=False):
            return False  # somebody else is at it
        try:
            moved = False
            for operation in list(self._in_flight):
                moved = operation.advance() or moved
            self._in_flight = [operation for operation in self._in_flight if not operation.finished]
            return moved
        finally:
            self._turn.release()

    def _run(self) -> None:
        while True:
            is_wanted = bool(self._in_flight) and self._waiters == 0
            try:
                call = self._calls.get(timeout=BACKGROUND_PAUSE_S) if is_wanted else self._calls.get()
            except queue.Empty:
                while self._waiters == 0 and self._progress():
                    pass
                continue
            call()
            del call  # what it refers to may hold tensors

    def finalise(self, timeout_s: float) -> None:
        """Finalise MPI at the process's end, if it is ours to do so and the other ranks can be expected to."""
        if self._owns_mpi and not self.MPI.Is_finalized():
            if not self.healthy:
                return _unlink_segments()
            try:
                self.call(self.MPI.Finalize, "MPI_Finalize", timeout_s)
            except CommunicationError as error:
                print(f"ringfold: {error}", file=sys.stderr)
                _unlink_segments()


def segments() -> list[Path]:
    """Return the named shared memory of MPICH that this process has mapped; MPICH takes the names away in MPI_Finalize only."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({Path(path) for line in lines if (path := line.split(maxsplit=5)[-1]).startswith("/dev/shm/mpich_shm_")})


def _unlink_segments() -> None:
    """Leave no shared memory behind where MPI_Finalize is not called; whoever has it mapped keeps it."""
    for path in segments():
        path.unlink(missing_ok=True)


_process: MpiProcess | None = None
_start = threading.Lock()
# A rank may be done that much earlier than another, which still writes a checkpoint. Whoever leaves without MPI_Finalize is taken for a failure
# by mpirun, which ends the others too; and by the death of another this wait is ended.
FINALISE_TIMEOUT_S = 1800.0


def mpi() -> MpiProcess:
    """Return this process's MpiProcess, MPI not yet initialised.

    Raises: ConfigError in a forked child, where MPI cannot be used.
    """
    global _process
    with _start:
        if _process is None:
            _process = MpiProcess()
        if _process.pid != os.getpid():
            raise ConfigError("transport mpi cannot be used in a child forked by a process that uses it: start workers with mpirun")
        return _process


@atexit.register
def _finalise() -> None:
    # Registered when this module is loaded, before anybody joins a job, so that a forgotten rf.shutdown() has happened by now.
    if _process is not None and _process.pid == os.getpid():
        _process.finalise(FINALISE_TIMEOUT_S)
