"""The warden: a tiny process that outlives the launcher just long enough to leave nothing alive.

It is started before any rank, runs this file with the standard library only, and reads a pipe whose other end only the launcher holds.
`+ 4121` adds a process group, `- 4121` takes one away whose leader is about to be reaped. When the pipe ends, whether the launcher closed
it or was killed with -9, the warden sends SIGKILL to every group it still knows, then to every process that carries the job's mark in its
environment: grandchildren that made a session of their own are found that way.

It does not know ranks, reap them, or judge why they ended. Ranks also carry PR_SET_PDEATHSIG (workers.py), should the warden be killed too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

_SWEEP_S = 5.0  # a process that forks faster than this can be swept for so long is a fork bomb, and not ours to win against


class Warden:
    """The launcher's end of the pipe."""

    def __init__(self, mark: str) -> None:
        """Start the warden; `mark` is the `NAME=value` that only this job's processes have in their environment."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RINGFOLD_")}
        reader, self._writer = os.pipe()
        # In a session of its own: a signal to the launcher's group must not reach it.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__)],
            stdin=reader,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=environment,
            start_new_session=True,
        )
        os.close(reader)
        self._tell(mark)

    @property
    def pid(self) -> int:
        """The warden's process."""
        return self._process.pid

    def add(self, group: int) -> None:
        """Kill this process group when the launcher ends."""
        self._tell(f"+ {group}")

    def remove(self, group: int) -> None:
        """Forget a group that is dead; call it before the leader is reaped, while no one else can get its number."""
        self._tell(f"- {group}")

    def close(self) -> None:
        """Let the warden sweep, and wait until it has ended."""
        os.close(self._writer)
        try:
            self._process.wait(_SWEEP_S + 1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _tell(self, line: str) -> None:
        try:
            os.write(self._writer, line.encode() + b"\n")
        except BrokenPipeError:
            pass  # someone killed the warden: the ranks still have PR_SET_PDEATHSIG


def marked(mark: bytes) -> list[int]:
    """Return the processes, other than this one, that have `mark` in their environment."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as environment:
                if mark in environment.read().split(b"\0"):
                    found.append(int(entry))
        except OSError:
            continue  # ended meanwhile, or another user's
    return found


def sweep(groups: set[int], mark: bytes) -> None:
    """Send SIGKILL to the groups, and to marked processes until none is left."""
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    deadline = time.monotonic() + _SWEEP_S
    while (pids := marked(mark)) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        time.sleep(0.002)


def watch(pipe: int) -> None:
    """Follow the launcher's words until the pipe ends, then sweep."""
    groups: set[int] = set()
    mark = b""
    unfinished = b""
    while data := os.read(pipe, 65536):
        *lines, unfinished = (unfinished + data).split(b"\n")
        for line in lines:
            word, _, rest = line.partition(b" ")
            if word == b"+":
                groups.add(int(rest))
            elif word == b"-":
                groups.discard(int(rest))
            else:
                mark = line
    if mark:
        sweep(groups, mark)


if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(_number, signal.SIG_IGN)
    watch(0)
