"""`run_ranks` and `spawn_ranks`: start ranks, wait for them under a deadline, tell what became of each.

A failure is re-raised in the test as the same exception, with the rank and its traceback as notes. Where several ranks fail, the one
raised is the first that is not a mere consequence (PeerLost and timeouts usually are somebody else's failure); the others are listed
beside it. A rank still running at the deadline is asked for the stacks of all its threads, then killed.
"""

from __future__ import annotations

import os
import pickle
import secrets
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.harness.forkserver import FDS_PER_RANK, server
from tests.harness.rank import STACKS_SIGNAL

CONSEQUENCES = frozenset({"PeerLost", "CollectiveTimeout", "ConnectError"})
GRACE_S = 15.0  # after a real failure the others have this long to end by themselves
STACKS_S = 2.0  # how long a hung rank may take to write its stacks


class RankError(Exception):
    """A rank failed with an exception that could not be pickled, or without one (killed, exited)."""


class RanksHung(Exception):
    """Ranks were still running at the deadline; the message holds the stacks of each."""


@dataclass
class Outcome:
    """What became of one rank. Times are CLOCK_MONOTONIC nanoseconds, comparable between ranks and the test."""

    rank: int
    pid: int
    value: Any = None
    returned: bool = False
    closed: bool = False  # the world was closed without an error
    hung: bool = False
    kind: str = ""  # class name of the exception
    message: str = ""
    traceback: str = ""
    exception: BaseException | None = None
    ended_ns: int = 0  # end of the function, or of the process where it was killed before
    exited_ns: int = 0
    exit_status: int | None = None  # negative: the signal that killed it
    stacks: str = ""
    stdout: str = ""
    stderr: str = ""
    orphans: tuple[int, ...] = ()  # processes of its session that outlived it; killed by the harness

    @property
    def failed(self) -> bool:
        return not (self.returned and self.closed and self.exit_status == 0)

    @property
    def is_consequence(self) -> bool:
        return self.hung or self.kind in CONSEQUENCES

    def __str__(self) -> str:
        if self.hung:
            return f"rank {self.rank} (pid {self.pid}) was still running at the deadline\n{self.stacks}"
        if self.kind:
            return f"rank {self.rank} (pid {self.pid}) raised {self.kind}: {self.message}\n{self.traceback}"
        if self.exit_status is not None and self.exit_status < 0:
            return f"rank {self.rank} (pid {self.pid}) was killed by {signal.Signals(-self.exit_status).name}\n{self.stderr[-2000:]}"
        if self.failed:
            return f"rank {self.rank} (pid {self.pid}) exited with status {self.exit_status} before its end\n{self.stderr[-2000:]}"
        return f"rank {self.rank} (pid {self.pid}) succeeded"


@dataclass
class _Process:
    rank: int
    pid: int
    fds: list[int]
    pidfd: int
    exited_ns: int = 0
    exit_status: int | None = None
    hung: bool = False
    orphans: tuple[int, ...] = field(default=())

    def text(self, which: int) -> str:
        fd = self.fds[which]
        return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")


class Ranks:
    """Processes in flight. A context manager: leaving it kills what is left."""

    def __init__(self, processes: list[_Process], resources: ExitStack) -> None:
        self._processes = processes
        self._resources = resources

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def kill(self, rank: int, number: int = signal.SIGKILL) -> int:
        """Send a signal to one rank (not to its children) and return the time of it in CLOCK_MONOTONIC ns."""
        now_ns = time.monotonic_ns()
        signal.pidfd_send_signal(self._processes[rank].pidfd, number)
        return now_ns

    def alive(self, rank: int) -> bool:
        return not select.select([self._processes[rank].pidfd], [], [], 0)[0]

    def wait_for_line(self, rank: int, text: str, timeout_s: float = 20.0) -> None:
        """Wait until the rank has printed `text`. Raises RanksHung at the deadline, RankError if it ended without it."""
        process = self._processes[rank]
        deadline = time.monotonic() + timeout_s
        while text not in process.text(1):
            if not self.alive(rank) and text not in process.text(1):
                raise RankError(f"rank {rank} ended before it printed {text!r}:\n{process.text(2)}")
            if time.monotonic() > deadline:
                raise RanksHung(f"rank {rank} did not print {text!r} within {timeout_s} s, but: {process.text(1)!r}")
            time.sleep(0.002)

    def wait(self, timeout_s: float = 60.0, grace_s: float | None = None) -> list[Outcome]:
        """Wait for every rank; at the deadline (or `grace_s` after a real failure) dump stacks and kill. Never raises for a rank."""
        deadline = time.monotonic() + timeout_s
        while living := [process for process in self._processes if process.exit_status is None]:
            poll = select.poll()
            for process in living:
                poll.register(process.pidfd, select.POLLIN)
            ended = {fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)}
            now_ns = time.monotonic_ns()
            for process in living:
                if process.pidfd in ended:
                    process.exited_ns = now_ns
                    self._reap(process)
                    if grace_s is not None and (outcome := self._outcome(process)).failed and not outcome.is_consequence:
                        deadline = min(deadline, time.monotonic() + grace_s)
            if not ended and time.monotonic() >= deadline:
                self._kill_hung(living)
        outcomes = [self._outcome(process) for process in self._processes]
        self.close()
        return outcomes

    def close(self) -> None:
        """Kill what is left and give everything back; may be called twice."""
        for process in self._processes:
            if process.exit_status is None:
                self._kill_and_reap(process)
        for process in self._processes:
            os.close(process.pidfd)
        self._processes = []
        self._resources.close()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _kill_hung(self, living: list[_Process]) -> None:
        for process in living:
            process.hung = True
            signal.pidfd_send_signal(process.pidfd, STACKS_SIGNAL)
        # A dump ends with the stack of the thread that took the signal: wait until the files stand still.
        sizes: list[int] = []
        deadline = time.monotonic() + STACKS_S
        while time.monotonic() < deadline:
            now = [os.fstat(process.fds[3]).st_size for process in living]
            if now == sizes and all(now):
                break
            sizes = now
            time.sleep(0.05)
        for process in living:
            self._kill_and_reap(process)

    def _kill_and_reap(self, process: _Process) -> None:
        signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)  # a zombie takes it too
        self._reap(process)

    def _reap(self, process: _Process) -> None:
        status = server().reap(process.pid)
        process.exit_status = os.waitstatus_to_exitcode(status)
        process.exited_ns = process.exited_ns or time.monotonic_ns()
        process.orphans = session_members(process.pid)
        for pid in process.orphans:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _outcome(self, process: _Process) -> Outcome:
        outcome = Outcome(process.rank, process.pid, hung=process.hung, exited_ns=process.exited_ns, exit_status=process.exit_status)
        outcome.orphans = process.orphans
        outcome.ended_ns = process.exited_ns
        outcome.stdout, outcome.stderr, outcome.stacks = (process.text(i) for i in (1, 2, 3))
        for i, record in enumerate(read_records(process.fds[0])):
            if i == 0:
                outcome.ended_ns = record["ended_ns"]
            if record["closed"]:
                outcome.closed = True
            elif "kind" in record:
                outcome.kind, outcome.message, outcome.traceback = record["kind"], record["message"], record["traceback"]
                outcome.exception = pickle.loads(record["exception"]) if record["exception"] else None
            else:
                outcome.returned, outcome.value = True, pickle.loads(record["value"])
        return outcome


def spawn_ranks(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    transport: str = "shm",
    collective_timeout_s: float = 30.0,
    env: Mapping[str, str] | None = None,
    joined: bool = True,
) -> Ranks:
    """Start `size` processes that call `function(world, *args)` and return their handle.

    `function` is a module-level function of an importable module. With `joined=False` it is called as `function(*args)`: the environment
    says how to join (for tests of `rf.init` and of rendezvous), but nothing has. `env` wins over what the harness sets.
    """
    if function.__module__ == "__main__" or "<" in function.__qualname__:
        raise TypeError(f"ranks import the function by name: {function.__qualname__} must stand at the top of a test module")
    from ringfold.collectives import environment
    from ringfold.collectives.store import StoreServer

    with ExitStack() as resources:
        secret, job = secrets.token_hex(32), f"test-{secrets.token_hex(4)}"
        store = resources.enter_context(StoreServer(secret=secret.encode()))
        shared = {
            environment.WORLD_SIZE: str(size),
            environment.LOCAL_SIZE: str(size),
            environment.STORE: store.address,
            environment.SECRET: secret,
            environment.JOB: job,
            environment.TIMEOUT_S: str(collective_timeout_s),
            environment.TRANSPORT: transport,
            environment.DEVICE: "cpu",
            environment.FLIGHT_DIR: os.environ.get(environment.FLIGHT_DIR, ""),  # conftest.py's
        }
        own = [{environment.RANK: str(rank), environment.LOCAL_RANK: str(rank)} for rank in range(size)]
        environ = [{**shared, **variables, **(env or {})} for variables in own]
        payload = pickle.dumps({"environ": environ, "joined": joined, "call": pickle.dumps((function, args))})
        payload_fd = memory_file("payload")
        resources.callback(os.close, payload_fd)
        os.pwrite(payload_fd, payload, 0)
        fds = [[memory_file(f"rank{rank}") for _ in range(FDS_PER_RANK)] for rank in range(size)]
        for fd in (fd for four in fds for fd in four):
            resources.callback(os.close, fd)
        pids = server().fork(payload_fd, fds, function.__module__)
        processes = [_Process(rank, pid, fds[rank], os.pidfd_open(pid)) for rank, pid in enumerate(pids)]
        return Ranks(processes, resources.pop_all())


def run_ranks(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    transport: str = "shm",
    timeout_s: float = 60.0,
    env: Mapping[str, str] | None = None,
    joined: bool = True,
) -> list[Any]:
    """Call `function(world, *args)` on `size` ranks and return their results in rank order.

    Raises: the exception of the first rank that really failed, with rank and traceback as notes; RanksHung at the deadline.
    """
    # Half the deadline, so that a collective that waits in vain is reported by its own error and not by ours.
    ranks = spawn_ranks(size, function, *args, transport=transport, collective_timeout_s=timeout_s / 2, env=env, joined=joined)
    with ranks:
        outcomes = ranks.wait(timeout_s, grace_s=GRACE_S)
    for outcome in outcomes:
        for line in outcome.stdout.splitlines():
            print(f"[{outcome.rank}] {line}")
        for line in outcome.stderr.splitlines():
            print(f"[{outcome.rank}] {line}", file=sys.stderr)
    failures = sorted((o for o in outcomes if o.failed), key=lambda o: (o.is_consequence, o.hung, o.ended_ns))
    if not failures:
        return [outcome.value for outcome in outcomes]
    first, *others = failures
    if first.hung:
        raise RanksHung(f"{len(failures)} of {size} ranks did not end within {timeout_s} s\n" + "\n".join(map(str, failures)))
    error = first.exception or RankError(str(first))
    error.add_note("\n".join(["", f"the first failure: {first}", *map(str, others)]))
    raise error


def memory_file(name: str) -> int:
    return os.memfd_create(f"harness-{name}", os.MFD_CLOEXEC)


def read_records(fd: int) -> list[dict[str, Any]]:
    """Return the complete records of a rank's memory file."""
    data, at, records = os.pread(fd, os.fstat(fd).st_size, 0), 0, []
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        if at + 8 + length > len(data):
            break
        records.append(pickle.loads(data[at + 8 : at + 8 + length]))
        at += 8 + length
    return records


def session_members(session: int) -> tuple[int, ...]:
    """Return the living processes (not zombies) of a session."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                # after the name, which may hold blanks and brackets: state ppid pgrp session
                state, _, _, number = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(number) == session and state != "Z":
                    members.append(int(entry.name))
    return tuple(members)
