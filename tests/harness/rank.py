"""What a forked rank does: take its descriptors and environment, join the world, call the test's function, report.

A rank leads a session of its own, so everything it starts can be found and killed. It writes records (see `ranks.Outcome`) into a memory
file: one when the function ends, one when the world is closed; a rank killed in between leaves what it had written.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import io
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from contextlib import ExitStack
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1
STACKS_SIGNAL = signal.SIGUSR1
LOCALS_LIMIT = 160


def main(rank: int, payload_fd: int, record_fd: int, stdout_fd: int, stderr_fd: int, stacks_fd: int) -> NoReturn:
    """Run rank `rank` of the payload and leave the process; never returns into the fork server's code."""
    status = 70
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        stdin_fd = os.open(os.devnull, os.O_RDONLY)
        for fd, target in ((stdin_fd, 0), (stdout_fd, 1), (stderr_fd, 2)):
            os.dup2(fd, target)
            os.close(fd)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a killed rank keeps its lines
        faulthandler.enable()
        faulthandler.register(STACKS_SIGNAL, file=stacks_fd, all_threads=True)
        with os.fdopen(payload_fd, "rb") as file:
            file.seek(0)  # descriptors of all ranks share one offset, so read by position
            payload = pickle.loads(os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0))
        os.environ.update(payload["environ"][rank])
        status = 0 if run(payload, record_fd) else 1
        threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter does at its end
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(payload: dict[str, Any], record_fd: int) -> bool:
    """Call the function in its world; write the records; return whether both function and close succeeded."""
    with ExitStack() as stack:
        try:
            function, args = pickle.loads(payload["call"])
            if payload["joined"]:
                from ringfold.collectives.communicator import world as join_world
                from ringfold.collectives.environment import Job

                world = join_world(Job.from_environment())
                stack.callback(world.close)
                args = (world, *args)
            write_record(record_fd, value=function(*args))
        except BaseException as error:
            write_record(record_fd, error=error)
            try:
                stack.close()
            except Exception:
                traceback.print_exc()
            return False
        try:
            stack.close()
        except BaseException as error:
            write_record(record_fd, error=error)
            return False
    write_record(record_fd, closed=True)
    return True


def write_record(fd: int, *, value: Any = None, error: BaseException | None = None, closed: bool = False) -> None:
    """Append one pickled record to the memory file."""
    record: dict[str, Any] = {"ended_ns": time.monotonic_ns(), "closed": closed}
    if error is not None:
        record |= {"kind": type(error).__name__, "message": str(error), "traceback": describe(error), "exception": portable(error)}
    elif not closed:
        try:
            record["value"] = pickle.dumps(value)
        except Exception as unpicklable:
            record |= {"kind": "TypeError", "message": f"the result cannot be pickled: {unpicklable}", "traceback": "", "exception": None}
    data = pickle.dumps(record)
    with io.FileIO(fd, "wb", closefd=False) as file:
        file.write(len(data).to_bytes(8, "little") + data)


def portable(error: BaseException) -> bytes | None:
    """Return the exception as a pickle that is known to load, or None."""
    try:
        data = pickle.dumps(error)
        return data if str(pickle.loads(data)) == str(error) else None
    except Exception:
        return None


def describe(error: BaseException) -> str:
    """Return the traceback, with the last frame's locals when a bare `assert` failed (pytest rewrites none here)."""
    text = "".join(traceback.format_exception(error))
    if isinstance(error, AssertionError) and not error.args and error.__traceback__ is not None:
        frame = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
        for name, value in frame.f_locals.items():
            shown = repr(value)
            text += f"      {name} = {shown if len(shown) <= LOCALS_LIMIT else shown[:LOCALS_LIMIT] + ' ...'}\n"
    return text
