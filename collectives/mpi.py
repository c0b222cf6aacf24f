"""The operations of a communicator over MPI: MPI's own collectives ("native"), or our schedules over its point-to-point calls.

Every operation is entered into the C++ core first, as one that is carried elsewhere: so it has a record in the rank's page, a deadline, and
fails with the communicator when a rank dies, with the same messages as over shm and tcp. What has failed is not waited for; its memory is kept.

MPI's own collectives are the default. A schedule is run where it is faster (mpi_choice.py), or where theirs would not keep our promises: half
precision (MPI has none, and ours adds in f32), min and max of floats (theirs lose a NaN), arithmetic of short integers (Open MPI's saturates where
it uses AVX), and pieces that lie beyond an MPI count. Ranks that issue different operations meet no partner and time out, unless the sizes tell
MPI first: there is no fingerprint in an MPI message.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from ringfold.collectives import carried
from ringfold.collectives._native import Outcome, check, core
from ringfold.collectives.algorithms import build
from ringfold.collectives.codes import FOLDING, MESSAGES
from ringfold.collectives.cost import Topology
from ringfold.collectives.errors import ConfigError
from ringfold.collectives.interpreter import Execution, Plan
from ringfold.collectives.mpi_choice import is_native
from ringfold.collectives.mpi_process import MpiProcess, mpi
from ringfold.collectives.mpi_requests import Mismatch, Native, PointToPoint, Receive, Send
from ringfold.collectives.page import State
from ringfold.collectives.session import SPIN_S, Session
from ringfold.collectives.transport import Request
from ringfold.collectives.work import Work

__all__ = ["MpiTransport"]

# An operation that has not moved for so long, though it was polled all the time, says in the page whom it waits for.
STANDS_AFTER_S = 0.25
STANDS_AGAIN_S = 0.1
# The core's error codes, see csrc/common/error.h.
MISMATCH, CLOSED, SYSTEM = 3, 4, 5


class MpiTransport:
    """Carries out the operations of one communicator; ranks are those of the communicator, which has more than one.

    Two MPI communicators: one for MPI's collectives and the user's messages, one for the messages of schedules, so that no tag of a
    user's meets one of ours.
    """

    name = "mpi"

    def __init__(
        self,
        session: Session,
        communicator: object,
        members: tuple[int, ...],
        rank: int,
        name: str,
        topology: Callable[[], Topology],
        fail: Callable[[Outcome], None],
    ) -> None:
        """Make the MPI communicators of these world ranks; collective over exactly these, who have all opened the core's `communicator`.

        topology: tells what is known of hosts and links when an operation begins. fail: raises what the outcome of an operation stands for.

        Raises:
            ConfigError: MPI cannot be used here, or its ranks are not the job's.
            CommunicationError: a member died or did not come in time.
        """
        self._session = session
        self._communicator = communicator
        self._rank = rank
        self._size = len(members)
        self._topology = topology
        self._fail = fail
        self._timeout_s = session.job.timeout_s
        self._spin_s = SPIN_S if session.has_core_each else 0.0
        self._process = mpi()
        self._process.initialise(self._timeout_s)
        self._mpi: Any = self._process.MPI
        self._check_world()
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._next_tag = 0
        self._closed = False
        self._in_flight: list[_Operation] = []
        opening = self._enter(Request("barrier", "sum", torch.uint8, 0, None, None), "native", self._timeout_s)

        def hopeless() -> None:
            if core.done(opening):
                check(core.wait(opening))

        make = f"MPI_Comm_create_group for axis {name}"
        self._comm, schedules = self._process.call(lambda: self._make(members), make, 2 * self._timeout_s, hopeless)
        core.leave(opening)
        self._wires = PointToPoint(self._mpi, schedules)

    def _check_world(self) -> None:
        world, job = self._mpi.COMM_WORLD, self._session.job
        if (world.size, world.rank) != (job.world_size, job.rank):
            raise ConfigError(
                f"transport mpi: this process is rank {world.rank} of {world.size} of MPI_COMM_WORLD, "
                f"but rank {job.rank} of {job.world_size} of the job: "
                "start the job with mpirun, mpiexec or srun --mpi of the MPI library that mpi4py has loaded "
                f"({self._mpi.Get_library_version().splitlines()[0].split(',')[0]})"
            )

    def _make(self, members: tuple[int, ...]) -> tuple[Any, Any]:
        world = self._mpi.COMM_WORLD
        everybody = world.Get_group()
        group = everybody.Incl(list(members))
        made = tuple(world.Create_group(group, tag) for tag in (0, 1))
        for comm in made:
            comm.Set_errhandler(self._mpi.ERRORS_RETURN)
        group.Free()
        everybody.Free()
        return made

    # -- the seam ---------------------------------------------------------------------------------------------------------------------

    def begin(self, request: Request, timeout_s: float, awaited: bool = False) -> Work:
        """Start an operation and return its Work, which keeps the tensors alive; `awaited`: the caller waits for it at once.

        Raises: ConfigError if the transport cannot do it; nothing was sent.
        """
        algorithm, start = self._choose(request)
        operation = _Operation(self._process, self._enter(request, algorithm, timeout_s), request, start)
        self._in_flight = [other for other in self._in_flight if not other.finished]
        self._in_flight.append(operation)
        self._process.drive(operation, awaited)
        return _MpiWork(operation, self, self._fail)

    def close(self) -> None:
        """End everything in flight and free what the transport holds; may be called again."""
        if self._closed:
            return
        self._closed = True
        if self._session.page.read().state is State.FAILED:
            self._process.healthy = False  # the others see this rank's end and will not wait for it in MPI_Finalize
        self._process.poll()
        if any(not operation.finished for operation in self._in_flight):
            self._process.healthy = False  # the core fails them now
        if self._process.healthy and not self._mpi.Is_finalized():
            self._comm.Free()
            self._wires.comm.Free()
        self._in_flight.clear()

    def wait(self, operation: _Operation) -> None:
        """Return when the operation is finished.

        Raises: KeyboardInterrupt, or whatever a signal handler raises; the operation has failed then, on every rank.
        """
        began = time.monotonic()
        try:
            self._process.wait(operation, self._spin_s)
        except BaseException:
            core.abandon(operation.handle, CLOSED, "interrupted by a signal while it waited")
            raise
        finally:
            core.waited(operation.handle, time.monotonic() - began)

    def poll(self) -> None:
        """Do what can be done without waiting."""
        self._process.poll()

    def explain(self, op: str, nbytes: int) -> str:
        """Return which way an operation on float32 vectors of that size takes, and why; and which schedule runs where it cannot be MPI's own."""
        count = max(0, nbytes) // 4
        request = Request(op, "sum", torch.float32, count, None, None, input_counts=() if nbytes < 0 and op == "all_to_all" else None)
        ours = str(carried.choose(request, self._topology()))
        library = self._mpi.Get_library_version().splitlines()[0].split(",")[0]
        if not is_native(request, self._session.folds):
            return f"{ours}\n  over the messages of {library}: {self._session.folds}"
        why = "its collectives have no Python between two steps"
        if op in FOLDING and self._session.folds is not None:
            why += f"; of large folds the faster way is taken: {self._session.folds}"
        otherwise = "  where that would break a promise (half precision, NaN in min and max, short integers):\n    " + ours.replace("\n", "\n    ")
        return f"{op} over mpi: native, by {library}\n  because {why}\n{otherwise}"

    # -- which way --------------------------------------------------------------------------------------------------------------------

    def _choose(self, request: Request) -> tuple[str, Callable[[], _Running]]:
        """Return the name of what carries out the request, and what starts it."""
        MPI, comm = self._mpi, self._comm
        if request.op in MESSAGES:
            greatest = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)
            if not 0 <= request.tag <= greatest:
                raise ConfigError(f"{request.op}: tag {request.tag} is not between 0 and {greatest}, the greatest that this MPI has")
            tensor = request.input if request.op == "send" else request.output
            assert tensor is not None
            message = Send if request.op == "send" else Receive
            return "none", lambda: message(MPI, comm, tensor.detach(), request.peer, request.tag)
        if is_native(request, self._session.folds):
            return "native", lambda: Native(MPI, comm, request, self._rank)
        plan, tag = self._plan(request), self._tag()
        return plan.schedule.algorithm, lambda: Execution(plan, request, self._wires, tag)

    def _plan(self, request: Request) -> Plan:
        topology = self._topology()
        choice = carried.choose(request, topology)
        key = (request.op, request.root, choice.algorithm, choice.variant, choice.segments)
        plan = self._plans.get(key)
        if plan is None:
            name, hosts = (request.op, choice.algorithm, choice.variant), topology.hosts
            schedule = build(*name, self._rank, self._size, choice.segments, request.root, hosts=hosts)
            plan = self._plans[key] = Plan(schedule)
        return plan

    def _tag(self) -> int:
        """Return the tag of the next schedule: operations in flight together do not mix, and so many are never in flight."""
        self._next_tag = (self._next_tag + 1) % 32768  # the greatest that MPI guarantees, MPI_TAG_UB, is 32767
        return self._next_tag

    def _enter(self, request: Request, algorithm: str, timeout_s: float) -> object:
        return carried.enter(self._session, self._communicator, self.name, request, algorithm, timeout_s)


class _Running(Protocol):
    """What an _Operation drives: MPI requests, or an Execution."""

    @property
    def steps(self) -> int: ...
    @property
    def steps_done(self) -> int: ...
    @property
    def finished(self) -> bool: ...
    @property
    def waiting_for(self) -> int: ...
    def advance(self) -> bool: ...


class _Operation:
    """One operation in flight, in the core's books and in MPI's."""

    def __init__(self, process: MpiProcess, handle: object, request: Request, start: Callable[[], _Running]) -> None:
        self.handle = handle
        self.request = request
        self.finished = False
        self.running: _Running | None = None
        self._process = process
        self._start = start
        self._moved_at = self._polled_at = self._stood_at = time.monotonic()

    def advance(self) -> bool:
        if core.done(self.handle):  # it has failed
            if self.running is not None:
                self._process.abandon(self)
            self.finished = True
            return True
        try:
            if self.running is None:
                self.running = self._start()
            moved = self.running.advance()
        except Exception as error:  # of MPI, or no memory: this may be any thread, so the waiter hears of it from the core
            core.abandon(self.handle, *self._explain(error))
            return True
        if self.running.finished:
            core.leave(self.handle)
            self.finished = True
            return True
        self._stand(moved)
        return moved

    def _explain(self, error: Exception) -> tuple[int, str]:
        MPI = self._process.MPI
        if isinstance(error, MPI.Exception):
            return MISMATCH if error.Get_error_class() == MPI.ERR_TRUNCATE else SYSTEM, f"MPI reports: {error.Get_error_string()}"
        return MISMATCH if isinstance(error, Mismatch) else SYSTEM, str(error) if isinstance(error, Mismatch) else repr(error)

    def _stand(self, moved: bool) -> None:
        """Tell the core whom the operation waits for, if it has been polled in vain for a while."""
        assert self.running is not None
        now = time.monotonic()
        if moved or now - self._polled_at > STANDS_AGAIN_S:  # or nobody polled, so that nothing could arrive
            self._moved_at = now
        self._polled_at = now
        if now - self._moved_at > STANDS_AFTER_S and now - self._stood_at > STANDS_AGAIN_S:
            self._stood_at = now
            core.stand(self.handle, self.running.waiting_for, self.running.steps_done, self.running.steps)


class _MpiWork(Work):
    """The Work of an operation over MPI."""

    __slots__ = ("_operation", "_transport")

    def __init__(self, operation: _Operation, transport: MpiTransport, fail: Callable[[Outcome], None]) -> None:
        super().__init__(operation.handle, (operation.request,), fail)
        self._operation = operation
        self._transport = transport

    def wait(self) -> None:
        """Block until the operation is complete; see Work.wait."""
        if not self._operation.finished:
            self._transport.wait(self._operation)
        super().wait()

    def done(self) -> bool:
        """Tell whether `wait` would return at once."""
        if not self._operation.finished:
            self._transport.poll()
        return self._operation.finished

    @property
    def source(self) -> int:
        """The rank at the other end of a message; see Work.source."""
        running = self._operation.running
        return running.waiting_for if isinstance(running, Send | Receive) else -1
