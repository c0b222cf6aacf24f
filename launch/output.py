"""What the ranks print, on its way to the terminal, the logs and the verdict.

    [0] step 100  loss 2.31        a prefix a rank, coloured on a terminal; standard output and standard error stay apart
    [1] loading shard 3            lines are never torn, and a last line without an end is still printed

One rank alone gets no prefix and its bytes pass as they are. On a terminal rank 0's bytes also pass as they come, so that its progress
bar is alive: its unfinished line is taken away before another rank's line is printed, and put back below. Elsewhere a line that is
rewritten with a carriage return is printed in its last state, and once in ten seconds while it changes.

Nothing here blocks: `Sink` is a queue that the launcher's loop empties when the descriptors take more, and while it is full the loop stops
reading the ranks. Pseudo-terminals and pipes are made in workers.py.
"""

from __future__ import annotations

import collections
import errno
import os
import re
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

TAIL_LINES = 20  # of a rank's standard error, kept for the verdict
LINE_NBYTES = 65536  # a longer line is printed in pieces
FULL_NBYTES = 1 << 20  # what may wait in the queue before the ranks are no longer read
PROGRESS_S = 10.0

_COLOURS = (36, 33, 35, 32, 34, 31)
_ENDS = re.compile(rb"(\r*\n|\r)")
_ESCAPES = re.compile(rb"(?:\x1b\[[0-9;?]*[A-Za-z])*")
_CUT_ESCAPE = re.compile(rb"\x1b(?:\[[0-9;?]*)?\Z")
_CLEAR = b"\r\x1b[K"


class Sink:
    """The launcher's own standard output and error: one queue for both, so that they keep their order on one terminal."""

    def __init__(self) -> None:
        self._queue: collections.deque[tuple[int, bytes]] = collections.deque()
        self.nbytes = 0
        self.broken: set[int] = set()  # descriptors that nobody reads any more

    def put(self, fd: int, data: bytes) -> None:
        """Queue bytes for a descriptor."""
        if data and fd not in self.broken:
            self._queue.append((fd, data))
            self.nbytes += len(data)

    @property
    def waiting_for(self) -> int | None:
        """The descriptor that has to take bytes next, or None when the queue is empty."""
        return self._queue[0][0] if self._queue else None

    def flush(self) -> None:
        """Write whatever the descriptors take without blocking."""
        while self._queue:
            fd, data = self._queue[0]
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            if not poller.poll(0):
                return
            try:
                # A writable pipe takes PIPE_BUF (4096) bytes without blocking, and at once; no more is promised.
                written = os.write(fd, data[:4096])
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.EIO):
                    raise
                self.broken.add(fd)
                self._queue = collections.deque(entry for entry in self._queue if entry[0] != fd)
                self.nbytes = sum(len(entry[1]) for entry in self._queue)
                continue
            self.nbytes -= written
            if written == len(data):
                self._queue.popleft()
            else:
                self._queue[0] = (fd, data[written:])

    def drain(self, timeout_s: float) -> None:
        """Write everything, or give up after `timeout_s`: the last words of a job must not keep it alive."""
        deadline = time.monotonic() + timeout_s
        self.flush()
        while (fd := self.waiting_for) is not None and (left := deadline - time.monotonic()) > 0:
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            poller.poll(left * 1000)
            self.flush()


class LiveLine:
    """Rank 0's side of a terminal: its bytes pass as they come, and the unfinished last line is remembered."""

    def __init__(self, sink: Sink, prefix: bytes) -> None:
        self._sink = sink
        self._prefix = prefix
        self._at_start = True
        self._shown = b""
        self._cut = b""
        self._fd = -1

    def feed(self, fd: int, data: bytes) -> None:
        """Pass bytes on, with the prefix at the start of every line, behind escapes that would erase it."""
        data = self._cut + data
        self._cut = b""
        if cut := _CUT_ESCAPE.search(data):
            data, self._cut = data[: cut.start()], data[cut.start() :]
        out = []
        for piece in _ENDS.split(data):
            if not piece:
                continue
            if piece[-1:] in b"\r\n":
                self._at_start = True
                self._shown = b"" if piece.endswith(b"\n") else b"\r"
            else:
                escapes = _ESCAPES.match(piece)
                text = piece[escapes.end() :] if escapes else piece
                if self._at_start and text:
                    piece = piece[: len(piece) - len(text)] + self._prefix + text
                    self._at_start = False
                self._shown += piece
            out.append(piece)
        self._fd = fd
        self._sink.put(fd, b"".join(out))

    def print_above(self, fd: int, line: bytes) -> None:
        """Print a whole line of another rank, then the unfinished line again."""
        if self._shown:
            self._sink.put(self._fd, _CLEAR)
        self._sink.put(fd, line)
        if self._shown:
            self._sink.put(self._fd, self._shown)

    def finish(self) -> None:
        """End an unfinished line, and show the cursor again should a progress bar have died hiding it."""
        if self._fd >= 0:
            self._sink.put(self._fd, (b"\n" if not self._at_start else b"") + b"\x1b[?25h")
            self._shown = b""
            self._at_start = True


class Lines:
    """Cut a stream into lines: `emit(line)` gets each without its end; `progress(line)` the state of one that is being rewritten."""

    def __init__(self, emit: Callable[[bytes], None], progress: Callable[[bytes], None] | None = None) -> None:
        self._emit = emit
        self._progress = progress
        self._text = b""
        self._progress_at = time.monotonic()

    def feed(self, data: bytes) -> None:
        """Take bytes as they were read."""
        *lines, self._text = (self._text + data).split(b"\n")
        for line in lines:
            self._emit(_last_state(line))
        if b"\r" in self._text:
            # A carriage return at the very end may be half of a \r\n, so the state before it is kept.
            last, before = _last_state(self._text), self._text.endswith(b"\r")
            self._text = last + b"\r" if before else last
            if self._progress and time.monotonic() - self._progress_at >= PROGRESS_S:
                self._progress(last)
                self._progress_at = time.monotonic()
        while len(self._text) > LINE_NBYTES:
            self._emit(self._text[:LINE_NBYTES])
            self._text = self._text[LINE_NBYTES:]

    def finish(self) -> None:
        """Emit the last line if it has no end."""
        if last := _last_state(self._text):
            self._emit(last)
        self._text = b""


def _last_state(line: bytes) -> bytes:
    """Return what a terminal would show of a line that was rewritten with carriage returns."""
    return line.rstrip(b"\r").rpartition(b"\r")[2]


class Output:
    """Everything that the ranks of one job print."""

    def __init__(self, world_size: int, log_dir: Path | None, stdout: int = 1, stderr: int = 2) -> None:
        self.sink = Sink()
        self.stdout, self.stderr = stdout, stderr
        self.tails: list[collections.deque[bytes]] = [collections.deque(maxlen=TAIL_LINES) for _ in range(world_size)]
        self.log_paths: list[Path | None] = [log_dir / f"rank-{rank}.log" if log_dir else None for rank in range(world_size)]
        self._logs: list[BinaryIO | None] = [path.open("ab", buffering=0) if path else None for path in self.log_paths]
        self._coloured = {fd: is_coloured(fd) for fd in (stdout, stderr)}
        self._prefixed = world_size > 1
        self._live = LiveLine(self.sink, self._prefix(0, stdout)) if self._prefixed and os.isatty(stdout) else None

    @property
    def on_terminal(self) -> bool:
        """Whether rank 0 should be given a pseudo-terminal."""
        return os.isatty(self.stdout)

    @property
    def prefix_columns(self) -> int:
        """How much narrower than the real one rank 0's terminal is."""
        return len("[0] ") if self._prefixed else 0

    def stream(self, rank: int, is_stderr: bool) -> Stream:
        """Return the taker of one rank's standard output or error."""
        return Stream(self, rank, is_stderr)

    def say(self, line: str) -> None:
        """Print a line of the launcher's own on standard error."""
        self._print(self.stderr, line.encode(errors="replace") + b"\n")

    def settle(self) -> None:
        """End rank 0's unfinished line: only the launcher prints from now on."""
        if self._live:
            self._live.finish()

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what is left and close the logs."""
        self.sink.drain(timeout_s)
        for log in self._logs:
            if log:
                log.close()
        self._logs = [None] * len(self._logs)

    def _prefix(self, rank: int, fd: int) -> bytes:
        if not self._prefixed:
            return b""
        text = f"[{rank}]"
        return f"\x1b[{_COLOURS[rank % len(_COLOURS)]}m{text}\x1b[0m ".encode() if self._coloured[fd] else f"{text} ".encode()

    def _print(self, fd: int, line: bytes) -> None:
        if self._live:
            self._live.print_above(fd, line)
        else:
            self.sink.put(fd, line)

    def _log(self, rank: int, line: bytes) -> None:
        log = self._logs[rank]
        if not log:
            return
        try:
            log.write(line + b"\n")
        except OSError as error:
            self._logs[rank] = None
            log.close()
            self.say(f"ringfold: {self.log_paths[rank]} is no longer written: {error.strerror}")


class Stream:
    """One rank's standard output or standard error."""

    def __init__(self, output: Output, rank: int, is_stderr: bool) -> None:
        self._output = output
        self._rank = rank
        self._is_stderr = is_stderr
        self._fd = output.stderr if is_stderr else output.stdout
        self._raw = not output._prefixed
        self._live = output._live if rank == 0 and os.isatty(self._fd) else None
        self._lines = Lines(self._line, None if self._raw or self._live else self._show)

    def feed(self, data: bytes) -> None:
        """Take bytes as they were read from the rank."""
        if self._raw:
            self._output.sink.put(self._fd, data)
        elif self._live:
            self._live.feed(self._fd, data)
        self._lines.feed(data)

    def finish(self) -> None:
        """Print what has no end: the rank has closed the stream, or is dead."""
        self._lines.finish()

    def _line(self, line: bytes) -> None:
        if self._is_stderr:
            self._output.tails[self._rank].append(line)
        self._output._log(self._rank, line)
        if not self._raw and not self._live:
            self._show(line)

    def _show(self, line: bytes) -> None:
        reset = b"\x1b[0m" if b"\x1b[" in line and self._output._coloured[self._fd] else b""
        self._output._print(self._fd, self._output._prefix(self._rank, self._fd) + line + reset + b"\n")


def is_coloured(fd: int) -> bool:
    """Say whether a descriptor is a terminal whose user has not asked for plain text (https://no-color.org)."""
    return os.isatty(fd) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
