"""The driver's end of a group: the ranks of one library, started by its own launcher, asked one thing at a time.

Every wait has a deadline. Nothing outlives the driver: `close` ends the ranks, and should the driver be killed, each rank sees the end of its
socket, and the launcher and what it started get SIGKILL from the kernel.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ringfold.benchmarks._libraries import LIBRARIES, launch
from ringfold.benchmarks._rank import LEAVE_S, SLOT

__all__ = ["Group", "GroupFailed"]

START_S = 60.0  # imports torch on all ranks, on cores that they may have to share
LOOK_S = 0.2
FOLDER = "ringfold-bench-"
TAIL_NBYTES = 2000
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class GroupFailed(Exception):
    """A library's ranks did not start, failed, or did not answer in time; the message says which and what they printed."""


def _die_with_driver() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Group:
    """`size` ranks of one library, which wait for requests until `close`.

    Raises: GroupFailed, from any method but `close`; the group is then to be closed.
    """

    def __init__(self, name: str, size: int, max_nbytes: int, timeout_s: float, transport: str = "auto") -> None:
        self.name, self.size, self.timeout_s = name, size, timeout_s
        self._stops = LIBRARIES[name].spins_when_idle
        self._connections: list[socket.socket] = []
        self.pids: list[int] = []
        shared = Path("/dev/shm")
        root = shared if shared.is_dir() else Path(tempfile.gettempdir())
        _sweep(root)
        self._folder = Path(tempfile.mkdtemp(prefix=FOLDER, dir=root))
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (closed by close)
        self._launcher: subprocess.Popen[bytes] | None = None
        try:
            self._start(max_nbytes, transport)
        except BaseException:
            self.close()
            raise
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)  # all have met

    def _start(self, max_nbytes: int, transport: str) -> None:
        (self._folder / "barrier").write_bytes(bytes(self.size * SLOT * 8))
        command, environment = launch(self.name, self.size, [str(self._folder), str(self.size), str(max_nbytes)], transport)
        deadline = time.monotonic() + START_S
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self._folder / "driver"))
            listener.listen(self.size)
            listener.settimeout(LOOK_S)
            self._launcher = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the driver, which ends its groups
                preexec_fn=_die_with_driver,
            )
            while len(self._connections) < self.size:
                with suppress(TimeoutError):
                    self._connections.append(listener.accept()[0])
                if self._launcher.poll() is not None:
                    raise self._failure(f"the launcher ended with exit code {self._launcher.returncode} before all ranks had come")
                if time.monotonic() > deadline:
                    raise self._failure(f"{len(self._connections)} of {self.size} ranks came within {START_S:.0f} s")
        hellos = self._read_all(deadline, "joining")
        order = sorted(range(self.size), key=lambda i: int(hellos[i]["rank"]))
        self._connections = [self._connections[i] for i in order]
        self.pids = [int(hellos[i]["pid"]) for i in order]
        self.version: str = hellos[0]["version"]
        self.threads: int = hellos[0]["threads"]
        self._signal(signal.SIGSTOP)

    def ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Send a request to all ranks and return their replies in the order of ranks."""
        self._signal(signal.SIGCONT)
        line = json.dumps(request).encode() + b"\n"
        what = f"{request['do']} {request.get('case', '')}".rstrip()
        try:
            for connection in self._connections:
                connection.sendall(line)
        except OSError as error:
            raise self._failure(f"{what}: {error}") from None
        replies = self._read_all(time.monotonic() + self.timeout_s, what)
        self._signal(signal.SIGSTOP)
        for rank, reply in enumerate(replies):
            if "failed" in reply:
                raise self._failure(f"{what}: rank {rank} failed\n{reply['failed']}")
        return replies

    def close(self) -> None:
        """End all ranks and their launcher; may be called again."""
        self._signal(signal.SIGCONT)
        for connection in self._connections:
            connection.close()
        self._connections = []
        if self._launcher is not None:
            try:
                self._launcher.wait(LEAVE_S + 1)
            except subprocess.TimeoutExpired:
                for pid in self.pids:  # mpirun gives each rank a process group of its own
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                os.killpg(self._launcher.pid, signal.SIGKILL)
                self._launcher.wait()
        self._output.close()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _read_all(self, deadline: float, what: str) -> list[dict[str, Any]]:
        """Return one line of each connection."""
        replies: dict[int, dict[str, Any]] = {}
        received = [bytearray() for _ in self._connections]
        with selectors.DefaultSelector() as selector:
            for number, connection in enumerate(self._connections):
                selector.register(connection, selectors.EVENT_READ, number)
            while len(replies) < self.size:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise self._failure(f"{what}: {len(replies)} of {self.size} ranks answered in time")
                for key, _ in ready:
                    number = key.data
                    try:
                        data = self._connections[number].recv(1 << 16)
                    except ConnectionResetError:  # it ended with a request unread
                        data = b""
                    if not data:
                        raise self._failure(f"{what}: a rank ended")
                    received[number] += data
                    if received[number].endswith(b"\n"):
                        replies[number] = json.loads(received[number])
                        selector.unregister(key.fileobj)
        return [replies[number] for number in range(self.size)]

    def _signal(self, number: signal.Signals) -> None:
        if self._stops:
            for pid in self.pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _failure(self, what: str) -> GroupFailed:
        end = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, end - TAIL_NBYTES))
        printed = self._output.read().decode(errors="replace").strip()
        return GroupFailed(f"{self.name}: {what}" + (f"\nIts last output:\n{printed}" if printed else ""))


def _sweep(root: Path) -> None:
    """Remove the folders of drivers that were killed before their ranks had met, which takes at most START_S."""
    for folder in root.glob(f"{FOLDER}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > 2 * START_S:
                shutil.rmtree(folder, ignore_errors=True)
