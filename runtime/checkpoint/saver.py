"""Saver: saves one checkpoint after another, and lets training go on while one is written.

    saver = Saver(world)
    saver.save("run/step-300", step=300, model_state=..., asynchronous=True)      returns when this rank's share is copied
    ...                                                                           a thread hashes, writes and commits it
    saver.save("run/step-400", ...)                                               waits for the one before; raises what became of it
    saver.close()

The thread agrees with the other ranks over a communicator of its own, so it never gets between the operations of training. A process that
ends waits for it; an error that nobody has waited for is reported then.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from ringfold.collectives.errors import CheckpointError
from ringfold.runtime.checkpoint.agreement import Ranks
from ringfold.runtime.checkpoint.host_copy import HostCopy
from ringfold.runtime.checkpoint.writer import Job, prepare

_savers: weakref.WeakSet[Saver] = weakref.WeakSet()


class Saver:
    """Save checkpoints of all ranks of `comm`; all its methods are collective."""

    def __init__(self, comm: Ranks | None = None) -> None:
        self.comm = comm
        self._apart: Ranks | None = None  # the thread's communicator
        self._memory = HostCopy()
        self._behind = _Behind()
        weakref.finalize(self, self._behind.wait)
        _savers.add(self)

    def save(
        self,
        directory: str | PathLike[str],
        *,
        step: int,
        model_state: Mapping[str, Any],
        optimizer_state: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        keep: int = 3,
        asynchronous: bool = False,
    ) -> Path:
        """Save as `checkpoint.save` does; if asynchronous, return as soon as the state may change again, and write behind.

        That takes host memory for one copy of what this rank writes, which stays for the next save until `close`.

        Raises:
            CheckpointError: on every rank; this save, or the last asynchronous one, which then is as if it had not been.
        """
        self.wait()
        trees = {"model": model_state, "optimizer": optimizer_state, "extra": extra}
        job = prepare(directory, step, trees, self.comm, keep)
        if not asynchronous:
            return job.write(self.comm)
        if self._apart is None and self.comm is not None and self.comm.size > 1:
            self._apart = self.comm.subgroup(range(self.comm.size), "checkpoint")
        apart = self._apart
        copied = self._copied(job)
        self._behind.start(lambda: copied().write(apart))
        return job.target

    def wait(self) -> None:
        """Wait until the last asynchronous save is on disk. Raises what it failed with, once."""
        self._behind.wait()

    def close(self) -> None:
        """Wait as `wait` does, and give back memory and communicator; may be called again."""
        try:
            self.wait()
        finally:
            self._memory = HostCopy()
            if self._apart is not None:
                self._apart.close()
                self._apart = None

    def _copied(self, job: Job) -> Callable[[], Job]:
        """Copy the job's tensors. A failure belongs into the thread: the other ranks' threads wait for this one's word."""
        try:
            copied = job.copied(self._memory)
        except (RuntimeError, MemoryError) as error:
            failure = CheckpointError(f"saving step {job.step} to {job.target} failed: its state cannot be copied to host memory: {error}")
            return lambda: replace(job, failure=failure)
        return lambda: copied


def close_savers(comm: Ranks) -> None:
    """Close every Saver of `comm`, which is about to close itself. Raises the first error, after the last is closed."""
    with contextlib.ExitStack() as stack:
        for saver in [one for one in _savers if one.comm is comm]:
            stack.callback(saver.close)


class _Behind:
    """One operation at a time in a thread, whose error waits for whoever asks. It knows no Saver, so that a forgotten one can go."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, operation: Callable[[], object]) -> None:
        # Not a daemon: the interpreter waits for it, and only then leaves the job.
        self._thread = threading.Thread(target=self._run, args=(operation,), name="checkpoint")
        self._thread.start()

    def _run(self, operation: Callable[[], object]) -> None:
        try:
            operation()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
