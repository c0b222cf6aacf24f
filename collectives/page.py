"""The shared page: what a rank says about itself in memory that outlives it.

One memfd a rank, made by the launcher (which inherits it to the worker) or, without one, by the rank. The native core writes the
heartbeat, the progress and a ring of the last 1,024 operations; Python writes the state and the failure; anybody who holds the
descriptor reads, also after `kill -9` of the rank. Little endian; the offsets are those of csrc:

    0     magic u64, version u32, rank i32, pid i32, state u32, heartbeat_ns u64, started_ns u64, progress_step u64, progress_ns u64,
          next_op u64, sleeping u32 (of the core alone)
    256   failure_ns u64, nbytes u32, is_consequence u32, UTF-8 JSON {"type", "message", "traceback"}
    32768 1,024 operation records of 64 bytes; number `index` is at 32768 + (index % 1024) * 64
    98304 16 counters of 64 bytes, by operation code: calls u64, nbytes u64, elapsed_ns u64, waited_ns u64
    99328 504 call sites of 128 bytes, UTF-8, zero-terminated; row 0 stands for an unknown one

It is not a log and not a lock: a reader may see a record that is being written. Times are those of CLOCK_MONOTONIC, so they mean
something on the same boot of the same host only.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import time
import traceback
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from ringfold.collectives.codes import OPERATIONS
from ringfold.collectives.errors import CollectiveTimeout, ConfigError, PeerLost

__all__ = ["NBYTES", "RECORDS_AT", "SITE_COUNT", "Failure", "OperationCounter", "OperationRecord", "OperationState", "Page", "PageState", "State"]

MAGIC = int.from_bytes(b"RFPAGE01", "little")
VERSION = 2
RECORD_COUNT = 1024
RECORD_NBYTES = 64
RECORDS_AT = 32768
COUNTERS_AT = RECORDS_AT + RECORD_COUNT * RECORD_NBYTES
COUNTER_NBYTES = 64
SITES_AT = COUNTERS_AT + 16 * COUNTER_NBYTES
SITE_COUNT = 504
SITE_NBYTES = 128
NBYTES = SITES_AT + SITE_COUNT * SITE_NBYTES

_HEADER = struct.Struct("<QIiiIQQQQQ")  # up to and with next_op
_STATE_AT, _PID_AT, _STARTED_AT, _STEP_AT, _STEP_TIME_AT = 20, 16, 32, 40, 48
_FAILURE = struct.Struct("<QII")
_FAILURE_AT = 256
_FAILURE_TEXT_AT = _FAILURE_AT + _FAILURE.size
_FAILURE_TEXT_NBYTES = RECORDS_AT - _FAILURE_TEXT_AT
_RECORD = struct.Struct("<QIBBBBQQQiHHQBxHI")
_COUNTER = struct.Struct("<4Q")


class State(IntEnum):
    """How far a rank has come."""

    STARTING = 0
    RUNNING = 1
    FINISHED = 2
    FAILED = 3


class OperationState(IntEnum):
    """How far an operation has come."""

    ISSUED = 1
    STARTED = 2
    DONE = 3
    FAILED = 4


@dataclass(frozen=True, slots=True)
class Failure:
    """The exception that ended a rank; `is_consequence` if another rank's end probably caused it."""

    type: str
    message: str
    traceback: str
    failure_ns: int
    is_consequence: bool


@dataclass(frozen=True, slots=True)
class PageState:
    """One rank at one moment; `next_op` is the number of operations issued so far."""

    rank: int
    pid: int
    state: State
    heartbeat_ns: int
    started_ns: int
    progress_step: int
    progress_ns: int
    next_op: int
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class OperationRecord:
    """One operation; op, dtype, reduction and algorithm are those of codes.py, `waiting_for` is a world rank or -1."""

    index: int  # how many operations the rank had issued before
    comm: int
    op: int
    dtype: int
    reduction: int
    state: OperationState
    count: int
    start_ns: int
    end_ns: int
    waiting_for: int
    step: int
    steps: int
    nbytes: int
    algorithm: int
    seq: int  # of the operation in its communicator: the same on every rank
    site: str = ""  # where in the user's program it was issued: "train.py:41 in step"


@dataclass(frozen=True, slots=True)
class OperationCounter:
    """One kind of operation since the rank joined: how many have ended, their bytes, their time and how much of it somebody was blocked."""

    calls: int
    nbytes: int
    seconds: float
    seconds_waited: float


class Page:
    """One rank's page, mapped; `fd` is its memfd, which this object owns."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, NBYTES)
        # Stores through these are one machine word, as a reader in another process expects; struct would write byte by byte.
        self._u32 = memoryview(self._memory).cast("I")
        self._u64 = memoryview(self._memory).cast("Q")

    @classmethod
    def create(cls, rank: int) -> Page:
        """Make the page of a rank that is yet to start; its size is sealed, so no holder can make a reader fault."""
        fd = os.memfd_create(f"ringfold-page-{rank}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, NBYTES)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        page = cls(fd)
        _HEADER.pack_into(page._memory, 0, MAGIC, VERSION, rank, 0, State.STARTING, 0, 0, 0, 0, 0)
        return page

    @classmethod
    def attach(cls, fd: int) -> Page:
        """Map the page behind an inherited descriptor, which is this object's from now on and is not inherited further.

        Raises: ConfigError, if the descriptor is not a page.
        """
        try:
            nbytes = os.fstat(fd).st_size
            magic, version = struct.unpack("<QI", os.pread(fd, 12, 0)) if nbytes == NBYTES else (0, 0)
        except OSError as error:
            raise ConfigError(f"descriptor {fd} is not a shared page ({error.strerror}): was it closed between the launcher and here?") from None
        if magic != MAGIC or version != VERSION:
            seen = f"{nbytes} bytes" if nbytes != NBYTES else f"magic {magic:#x}, version {version}"
            raise ConfigError(f"descriptor {fd} has {seen}, expected a shared page of version {VERSION} ({NBYTES} bytes, magic {MAGIC:#x})")
        os.set_inheritable(fd, False)
        return cls(fd)

    def read(self) -> PageState:
        """Return what the rank says about itself now."""
        _, _, rank, pid, state, heartbeat_ns, started_ns, progress_step, progress_ns, next_op = _HEADER.unpack_from(self._memory, 0)
        return PageState(rank, pid, State(state), heartbeat_ns, started_ns, progress_step, progress_ns, next_op, self._read_failure())

    def operations(self) -> list[OperationRecord]:
        """Return the last operations, oldest first; one that is overwritten during the call is left out."""
        raw = self._memory[RECORDS_AT:COUNTERS_AT]
        next_op = self._u64[56 // 8]
        first = max(0, next_op - RECORD_COUNT)
        records = []
        for index in range(first, next_op):
            fields: tuple[Any, ...] = _RECORD.unpack_from(raw, index % RECORD_COUNT * RECORD_NBYTES)
            *before, row, seq = fields
            record = OperationRecord(*(*before, seq))
            if record.index == index and OperationState.ISSUED <= record.state <= OperationState.FAILED:
                records.append(replace(record, state=OperationState(record.state), site=self.site(row)))
        return records

    def counters(self) -> dict[str, OperationCounter]:
        """Return what each kind of operation has come to so far, by its name; those that never ended are left out."""
        found = {}
        for name, code in OPERATIONS.items():
            calls, nbytes, elapsed_ns, waited_ns = _COUNTER.unpack_from(self._memory, COUNTERS_AT + code * COUNTER_NBYTES)
            if calls:
                found[name] = OperationCounter(calls, nbytes, elapsed_ns / 1e9, waited_ns / 1e9)
        return found

    def site(self, row: int) -> str:
        """Return where in the user's program an operation was issued: "train.py:41 in step", or nothing where that is unknown."""
        if not 0 < row < SITE_COUNT:
            return ""
        at = SITES_AT + row * SITE_NBYTES
        return self._memory[at : at + SITE_NBYTES].split(b"\0")[0].decode(errors="replace")

    def write_site(self, row: int, text: str) -> None:
        """Fill a row of the table of call sites; a long text keeps its end."""
        at = SITES_AT + row * SITE_NBYTES
        self._memory[at : at + SITE_NBYTES] = text.encode("utf-8", "replace")[1 - SITE_NBYTES :].ljust(SITE_NBYTES, b"\0")

    def set_state(self, state: State) -> None:
        """Say how far this rank has come; the first time it is RUNNING also says which process it is and when it began."""
        if state == State.RUNNING and self._u64[_STARTED_AT // 8] == 0:
            self._u32[_PID_AT // 4] = os.getpid()
            self._u64[_STARTED_AT // 8] = time.monotonic_ns()
        self._u32[_STATE_AT // 4] = state

    def set_progress(self, step: int) -> None:
        """Say that a train step is done, and that it was just now."""
        self._u64[_STEP_AT // 8] = step
        self._u64[_STEP_TIME_AT // 8] = time.monotonic_ns()

    def write_failure(self, exception: BaseException) -> None:
        """Record what ended this rank, and that it failed; a failure that is already there stays, since it came first."""
        if self._u64[_FAILURE_AT // 8] == 0:
            text = _failure_text(exception)
            self._memory[_FAILURE_TEXT_AT : _FAILURE_TEXT_AT + len(text)] = text
            self._u32[(_FAILURE_AT + 8) // 4] = len(text)
            self._u32[(_FAILURE_AT + 12) // 4] = _is_consequence(exception)
            self._u64[_FAILURE_AT // 8] = time.monotonic_ns()  # last: what makes the rest valid
        self.set_state(State.FAILED)

    def close(self) -> None:
        """Unmap the page and close its descriptor; the memory lives on with whoever else holds it."""
        if self.fd < 0:
            return
        self._u32.release()
        self._u64.release()
        self._memory.close()
        os.close(self.fd)
        self.fd = -1

    def _read_failure(self) -> Failure | None:
        failure_ns, nbytes, is_consequence = _FAILURE.unpack_from(self._memory, _FAILURE_AT)
        if failure_ns == 0:
            return None
        text = self._memory[_FAILURE_TEXT_AT : _FAILURE_TEXT_AT + min(nbytes, _FAILURE_TEXT_NBYTES)].decode(errors="replace")
        try:
            record = json.loads(text)
            return Failure(record["type"], record["message"], record["traceback"], failure_ns, bool(is_consequence))
        except (ValueError, LookupError, TypeError):
            return Failure("unknown", text, "", failure_ns, bool(is_consequence))


def _failure_text(exception: BaseException) -> bytes:
    """Return the record as JSON that fits; the traceback loses its front, the message at most its end."""
    kind = type(exception)
    name = kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    message = str(exception)
    trace = "".join(traceback.format_exception(exception))

    def encode(message_end: int, trace_start: int) -> bytes:
        record = {"type": name[:256], "message": message[:message_end], "traceback": trace[trace_start:]}
        # Lone surrogates (undecodable file names) have no UTF-8.
        return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")

    # A message may take half of the room, in characters that may need several bytes each: halve it until it does.
    message_end = len(message)
    while len(encode(message_end, len(trace))) > _FAILURE_TEXT_NBYTES // 2 and message_end > 0:
        message_end //= 2
    low, high = 0, len(trace)  # high fits; find the earliest start that does
    while low < high:
        middle = (low + high) // 2
        if len(encode(message_end, middle)) <= _FAILURE_TEXT_NBYTES:
            high = middle
        else:
            low = middle + 1
    return encode(message_end, high)


def _is_consequence(exception: BaseException) -> bool:
    """Tell whether this exception, or one that led to it, says that another rank ended or hung."""
    seen: set[int] = set()
    link: BaseException | None = exception
    while link is not None and id(link) not in seen:
        if isinstance(link, PeerLost | CollectiveTimeout):
            return True
        seen.add(id(link))
        link = link.__cause__ or link.__context__
    return False
