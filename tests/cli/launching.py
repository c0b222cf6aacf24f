"""Start `ringfold run` as a user does, and look at what is alive: for tests of the launcher only."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

DEADLINE_S = 20.0


def command(*arguments: str) -> list[str]:
    """Return the words that start the command under test."""
    return [sys.executable, "-m", "ringfold", *arguments]


def start(*arguments: str, **options: object) -> subprocess.Popen[str]:
    """Start `ringfold ARGUMENTS` with its output in pipes."""
    settings: dict[str, object] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(*arguments), **(settings | options))  # type: ignore[call-overload,no-any-return]


def finish(process: subprocess.Popen[str], timeout_s: float = DEADLINE_S) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error; end the process should it take too long."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return process.returncode, out, err


def run(*arguments: str, **options: object) -> tuple[int, str, str]:
    """Run `ringfold ARGUMENTS` to its end."""
    return finish(start(*arguments, **options))


def script(folder: Path, text: str, name: str = "job.py") -> str:
    """Write a script for the ranks; `pids` in it is a folder where they say who they are."""
    path = folder / name
    path.write_text(f"import os, sys, time, signal\nRANK = int(os.environ['RANK'])\n{textwrap.dedent(text)}")
    return str(path)


def wait_until(true: Callable[[], bool], what: str, timeout_s: float = DEADLINE_S) -> None:
    """Return as soon as `true()` is."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Say whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """Return the direct children of a process."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (thread / "children").read_text().split())
    return found


class Pids:
    """A folder in which the processes of a job leave their numbers, by name."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder

    def wait(self, *names: str) -> dict[str, int]:
        """Return the numbers of these processes once all of them have said it."""
        wait_until(lambda: all((self.folder / name).exists() for name in names), f"{names} in {sorted(os.listdir(self.folder))}")
        return {name: int((self.folder / name).read_text()) for name in names}


# For the scripts: say(name) after which the test may rely on this process being there.
SAY = """
def say(folder, name, pid=None):
    path = os.path.join(folder, name)
    with open(path + '.part', 'w') as file:
        file.write(str(pid or os.getpid()))
    os.rename(path + '.part', path)
"""
