"""One worker process a rank: started in a session of its own, with its page, its variables and its pipes; killed with all it started.

    PR_SET_PDEATHSIG    kills a worker when the *thread* that started it ends, so workers are started by the launcher's main thread
    process group       holds the worker's children (DataLoader workers); it is killed as soon as the worker is dead
    the warden          kills the groups when the launcher is dead (warden.py)

Whether a worker's end was a failure, and whose, is decided in report.py.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import secrets
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping
from dataclasses import dataclass

from ringfold.collectives import environment
from ringfold.collectives.errors import LaunchError
from ringfold.collectives.page import Page
from ringfold.launch import machine
from ringfold.launch.options import RunOptions
from ringfold.launch.warden import Warden

_PR_SET_PDEATHSIG = 1
_DRAIN_NBYTES = 4 << 20  # of a dead worker: a pipe holds 64 KiB, so what comes after this is a grandchild's, and endless

# What a launcher says about this job only; the others (timeout, transport, QUIET, ...) the user may set.
_OWNED = (
    environment.RANK,
    environment.WORLD_SIZE,
    environment.LOCAL_RANK,
    environment.LOCAL_SIZE,
    environment.STORE,
    environment.SECRET,
    environment.PAGE_FD,
    environment.LAYOUT,
    environment.JOB,
    environment.LOG_DIR,
)

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Credentials:
    """What makes this job one: its id, the address of its store, and the secret that admits to it."""

    job_id: str
    secret: str
    store: str | None = None

    @classmethod
    def new(cls) -> Credentials:
        """Draw a new id and a new secret."""
        return cls(job_id=secrets.token_hex(8), secret=secrets.token_hex(32))

    @property
    def mark(self) -> str:
        """The variable that every process of this job, and no other, carries in its environment."""
        return f"{environment.JOB}={self.job_id}"


def rank_environment(
    options: RunOptions, rank: int, credentials: Credentials, page_fd: int, cores: int, inherited: Mapping[str, str]
) -> dict[str, str]:
    """Return all variables of one rank; secrets travel here and never on a command line, which everybody on the machine can read."""
    values = {name: value for name, value in inherited.items() if name not in _OWNED}
    size = str(options.world_size)
    values |= {
        environment.RANK: str(rank),
        environment.WORLD_SIZE: size,
        environment.LOCAL_RANK: str(rank),
        environment.LOCAL_SIZE: size,
        environment.JOB: credentials.job_id,
        environment.PAGE_FD: str(page_fd),
        "RANK": str(rank),
        "WORLD_SIZE": size,
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": size,
        "PYTHONUNBUFFERED": "1",
    }
    if credentials.store is not None:
        values |= {environment.STORE: credentials.store, environment.SECRET: credentials.secret}
    if options.layout is not None:
        values[environment.LAYOUT] = options.layout
    if options.timeout_s is not None:
        values[environment.TIMEOUT_S] = repr(options.timeout_s)
    if options.transport is not None:
        values[environment.TRANSPORT] = options.transport
    if options.interface is not None:
        values[environment.INTERFACE] = options.interface
    if options.log_dir is not None:
        values[environment.LOG_DIR] = str(options.log_dir)
    if options.verbose:
        values[environment.VERBOSE] = "1"
    if options.omp_threads is not None:
        values["OMP_NUM_THREADS"] = str(options.omp_threads)
    else:
        values.setdefault("OMP_NUM_THREADS", str(max(1, cores // options.world_size)))
    return values


@dataclass(frozen=True)
class TerminalSize:
    """Of the pseudo-terminal that rank 0 gets when the launcher prints to a real one."""

    rows: int
    columns: int


class Worker:
    """One rank's process, page and pipes; `returncode` is None while it lives, and negative for a signal as in subprocess."""

    def __init__(self, options: RunOptions, rank: int, credentials: Credentials, cores: int, warden: Warden, terminal: TerminalSize | None) -> None:
        """Start the process.

        Raises: LaunchError, if the system refuses.
        """
        self.rank = rank
        self.returncode: int | None = None
        self.ended_ns: int | None = None
        self.signalled_ns: int | None = None  # when the launcher first asked it to end
        self._warden = warden
        self._group_gets_signals = options.target.kind == "executable"
        self.stdout = self.stderr = out = err = -1
        self.page = Page.create(rank)
        launcher = os.getpid()
        try:
            self.stdout, out = _channel(terminal)
            self.stderr, err = _channel(terminal if os.isatty(2) else None)
            self._process = subprocess.Popen(
                options.target.command(),
                stdin=None if rank == 0 else subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=rank_environment(options, rank, credentials, self.page.fd, cores, os.environ),
                pass_fds=(self.page.fd,),
                start_new_session=True,
                preexec_fn=lambda: _die_with(launcher),
            )
        except (OSError, subprocess.SubprocessError) as error:
            self.close()
            raise LaunchError(
                f"rank {rank} of {options.world_size} could not be started: {error}\n"
                "The ranks before it have been ended. Try fewer ranks, or see `ulimit -a`."
            ) from None
        finally:
            for fd in (out, err):
                if fd >= 0:
                    os.close(fd)
        warden.add(self.pid)

    @property
    def pid(self) -> int:
        """The process, which leads its own session and group."""
        return self._process.pid

    def process_state(self) -> str:
        """Return the kernel's letter for the process, "" once it has ended."""
        return machine.process_state(self.pid) if self.returncode is None else ""

    def poll(self) -> bool:
        """Return whether the process has ended; if it has, kill what it left behind, then reap it."""
        if self.returncode is None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            self.ended_ns = time.monotonic_ns()
            # In this order: until it is reaped nobody else can have its number.
            _kill_group(self.pid, signal.SIGKILL)
            self._warden.remove(self.pid)
            self.returncode = self._process.wait()
        return self.returncode is not None

    def signal(self, number: int) -> None:
        """Ask the worker to end: SIGINT goes to its children too, as from a terminal; other signals are the worker's to act on."""
        if self.returncode is not None:
            return
        self.signalled_ns = self.signalled_ns or time.monotonic_ns()
        if number in (signal.SIGINT, signal.SIGKILL) or self._group_gets_signals:
            _kill_group(self.pid, number)
        else:
            os.kill(self.pid, number)

    def resize(self, terminal: TerminalSize) -> None:
        """Tell the worker that its terminal has another size."""
        if self.stdout >= 0:
            _set_size(self.stdout, terminal)
        if self.returncode is None:
            os.kill(self.pid, signal.SIGWINCH)

    def close_stream(self, fd: int) -> None:
        """Close one of the two reading ends."""
        os.close(fd)
        if fd == self.stdout:
            self.stdout = -1
        else:
            self.stderr = -1

    def close(self) -> None:
        """Close what is still open; the process must have ended."""
        for fd in (self.stdout, self.stderr):
            if fd >= 0:
                os.close(fd)
        self.stdout = self.stderr = -1
        self.page.close()


def read_available(fd: int, limit_nbytes: int = 65536) -> bytes | None:
    """Return what can be read at once, b"" if nothing can, None at the end of the stream."""
    try:
        return os.read(fd, limit_nbytes) or None
    except BlockingIOError:
        return b""
    except OSError:
        return None  # a pseudo-terminal whose other side is closed says EIO


def read_rest(fd: int) -> bytes:
    """Return what a dead worker has left in its pipe, without waiting for the end: a grandchild may hold it open."""
    parts: list[bytes] = []
    while sum(map(len, parts)) < _DRAIN_NBYTES and (data := read_available(fd)):
        parts.append(data)
    return b"".join(parts)


def _channel(terminal: TerminalSize | None) -> tuple[int, int]:
    """Return the reading (non-blocking) and the writing end of a pipe or pseudo-terminal."""
    if terminal is None:
        reader, writer = os.pipe()
    else:
        reader, writer = os.openpty()
        attributes = termios.tcgetattr(writer)
        attributes[1] &= ~termios.OPOST  # the real terminal turns \n into \r\n, once is enough
        termios.tcsetattr(writer, termios.TCSANOW, attributes)
        _set_size(writer, terminal)
    os.set_blocking(reader, False)
    return reader, writer


def _set_size(fd: int, terminal: TerminalSize) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("4H", terminal.rows, terminal.columns, 0, 0))


def _die_with(launcher: int) -> None:
    """Run in the worker before its program does: end when the launcher does, and listen to signals whatever the launcher ignores."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:
        os._exit(1)  # the launcher ended before the line above
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _kill_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass
