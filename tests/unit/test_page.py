"""The shared page: fixed offsets, survival of its rank, and failure records that fit."""

import fcntl
import os
import signal
import struct
import subprocess
import sys
import time

import pytest
from ringfold.collectives.errors import CollectiveTimeout, ConfigError, PeerLost
from ringfold.collectives.page import NBYTES, RECORDS_AT, OperationState, Page, State


@pytest.fixture
def page():
    page = Page.create(3)
    yield page
    page.close()


def write_operation(page: Page, index: int, state: int = 3) -> None:
    """Write as the native core does: a record at its place, then the number of records."""
    record = struct.pack("<QIBBBBQQQiHHQBxHI", index, 7, 0, 3, 1, state, 1000 + index, 5, 6, -1, 2, 4, 4000, 1, 0, 9)
    os.pwrite(page.fd, record, RECORDS_AT + index % 1024 * 64)
    os.pwrite(page.fd, struct.pack("<Q", index + 1), 56)


def fail(page: Page, exception: BaseException) -> None:
    try:
        raise exception
    except BaseException as error:
        page.write_failure(error)


def test_header_lies_at_the_agreed_offsets(page):
    assert os.fstat(page.fd).st_size == NBYTES == 32768 + 1024 * 64 + 16 * 64 + 504 * 128
    assert os.pread(page.fd, 8, 0) == b"RFPAGE01"
    os.pwrite(page.fd, struct.pack("<IiiIQQQQQ", 1, 11, 4121, 1, 22, 33, 44, 55, 0), 8)
    state = page.read()
    assert (state.rank, state.pid, state.state) == (11, 4121, State.RUNNING)
    assert (state.heartbeat_ns, state.started_ns, state.progress_step, state.progress_ns) == (22, 33, 44, 55)
    assert (state.next_op, state.failure) == (0, None)


def test_new_page_says_starting_and_nothing_else(page):
    state = page.read()
    assert (state.rank, state.pid, state.state, state.heartbeat_ns, state.next_op, state.failure) == (3, 0, State.STARTING, 0, 0, None)
    assert page.operations() == []


def test_state_and_progress_are_written_where_the_core_reads_them(page):
    before = time.monotonic_ns()
    page.set_state(State.RUNNING)
    page.set_progress(17)
    rank, pid, state, heartbeat_ns, started_ns, step, progress_ns = struct.unpack("<iiIQQQQ", os.pread(page.fd, 44, 12))
    assert (rank, pid, state, heartbeat_ns, step) == (3, os.getpid(), State.RUNNING, 0, 17)
    assert before <= started_ns <= progress_ns <= time.monotonic_ns()
    page.set_state(State.FINISHED)
    assert page.read().started_ns == started_ns


@pytest.mark.parametrize("count", [0, 1, 3, 1023, 1024, 1025, 3001])
def test_operations_are_the_last_1024_oldest_first(page, count):
    for seq in range(count):
        write_operation(page, seq)
    records = page.operations()
    assert [record.index for record in records] == list(range(max(0, count - 1024), count))
    if records:
        last = records[-1]
        assert (last.comm, last.op, last.dtype, last.reduction, last.state) == (7, 0, 3, 1, OperationState.DONE)
        assert (last.count, last.start_ns, last.end_ns, last.waiting_for) == (1000 + count - 1, 5, 6, -1)
        assert (last.step, last.steps, last.nbytes, last.algorithm, last.seq) == (2, 4, 4000, 1, 9)


def test_record_that_is_being_overwritten_is_left_out(page):
    for seq in range(1030):
        write_operation(page, seq)
    os.pwrite(page.fd, struct.pack("<Q", 1030), RECORDS_AT + 6 * 64)  # number 1030 begins where 6 was; the count still says 1030
    assert [record.index for record in page.operations()] == [seq for seq in range(6, 1030) if seq != 6]


def test_failure_is_recorded_whole_when_it_fits(page):
    fail(page, ValueError("zwölf Ränge"))
    state = page.read()
    assert state.state == State.FAILED
    assert (state.failure.type, state.failure.message, state.failure.is_consequence) == ("ValueError", "zwölf Ränge", False)
    assert state.failure.traceback.startswith("Traceback")
    assert state.failure.traceback.endswith("ValueError: zwölf Ränge\n")
    assert 0 < state.failure.failure_ns <= time.monotonic_ns()


def deep(depth: int) -> None:
    if depth == 0:
        raise RuntimeError("at the bottom")
    if depth % 2:  # two lines in turn: the interpreter folds repetitions of one
        deep(depth - 1)
    else:
        deep(depth - 1)


def test_long_traceback_loses_its_front(page):
    try:
        deep(800)
    except RuntimeError as error:
        page.write_failure(error)
    failure = page.read().failure
    assert failure.message == "at the bottom"
    assert failure.traceback.endswith("RuntimeError: at the bottom\n")
    assert 30000 < len(failure.traceback.encode()) < RECORDS_AT - 272


@pytest.mark.parametrize("character", ["x", "\n", '"', "ö", "𝄞", "\udc80", "\0"])
@pytest.mark.parametrize("length", [0, 1, 16000, 32496, 100_003])
def test_failure_fits_whatever_its_message(page, character, length):
    marker = os.pread(page.fd, 64, RECORDS_AT)
    fail(page, RuntimeError(character * length))
    failure = page.read().failure
    (nbytes,) = struct.unpack("<I", os.pread(page.fd, 4, 264))
    assert nbytes <= RECORDS_AT - 272
    assert failure.type == "RuntimeError"
    assert failure.message == (character * length)[: len(failure.message)].replace("\udc80", "?")
    assert os.pread(page.fd, 64, RECORDS_AT) == marker


def test_first_failure_stays(page):
    fail(page, ValueError("first"))
    fail(page, ValueError("second"))
    assert page.read().failure.message == "first"


def chained(cause: Exception) -> Exception:
    try:
        try:
            raise cause
        except Exception as error:
            raise RuntimeError("while cleaning up") from error
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("exception", "is_consequence"),
    [
        (PeerLost("rank 1"), True),
        (CollectiveTimeout("all_reduce #4"), True),
        (chained(PeerLost("rank 1")), True),
        (chained(ValueError("own fault")), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_consequence_of_another_ranks_end_is_told_apart(page, exception, is_consequence):
    fail(page, exception)
    assert page.read().failure.is_consequence is is_consequence


def test_half_written_failure_is_not_read(page):
    fail(page, ValueError("x"))
    os.pwrite(page.fd, struct.pack("<Q", 0), 256)
    assert page.read().failure is None


def test_page_survives_kill_9_of_its_rank(page):
    program = (
        "import os, signal, sys\n"
        "from ringfold.collectives.page import Page, State\n"
        "page = Page.attach(int(sys.argv[1]))\n"
        "page.set_state(State.RUNNING); page.set_progress(41)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(page.fd)], pass_fds=[page.fd])
    assert child.wait(60) == -signal.SIGKILL
    state = page.read()
    assert (state.pid, state.state, state.progress_step) == (child.pid, State.RUNNING, 41)


def test_no_holder_can_shrink_it_under_a_reader(page):
    for nbytes in (0, 4096, NBYTES + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(page.fd, nbytes)


def test_descriptor_is_not_inherited_further(page):
    assert fcntl.fcntl(page.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    inherited = os.dup(page.fd)
    os.set_inheritable(inherited, True)
    attached = Page.attach(inherited)
    assert fcntl.fcntl(inherited, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    attached.close()


def test_anything_else_is_refused_with_what_it_is(page):
    with pytest.raises(ConfigError, match="descriptor 987 is not a shared page"):
        Page.attach(987)
    other = os.memfd_create("other")
    with pytest.raises(ConfigError, match="has 0 bytes, expected a shared page of version 2"):
        Page.attach(other)
    os.close(other)
    os.pwrite(page.fd, struct.pack("<I", 3), 8)
    with pytest.raises(ConfigError, match="version 3, expected a shared page of version 2"):
        Page.attach(page.fd)


def test_close_twice_and_nothing_is_left():
    before = set(os.listdir("/proc/self/fd"))
    for rank in range(5):
        page = Page.create(rank)
        page.close()
        page.close()
    assert set(os.listdir("/proc/self/fd")) == before
