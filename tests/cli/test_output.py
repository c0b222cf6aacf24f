"""Lines, prefixes and progress: never torn, never lost, never in the way of one another."""

from __future__ import annotations

import contextlib
import os
import pty
import random
import select
import termios
import threading
import time
from pathlib import Path

import pytest
from ringfold.launch import output as module
from ringfold.launch.output import LINE_NBYTES, TAIL_LINES, Lines, Output


class Reader:
    """Reads everything that is written to `fd`, in a thread of its own."""

    def __init__(self, terminal: bool = False) -> None:
        if terminal:
            self._reader, self.fd = pty.openpty()
            attributes = termios.tcgetattr(self.fd)
            attributes[1] &= ~termios.OPOST
            termios.tcsetattr(self.fd, termios.TCSANOW, attributes)
        else:
            self._reader, self.fd = os.pipe()
        self._parts: list[bytes] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: how a terminal says that its other side is closed
            while part := os.read(self._reader, 65536):
                self._parts.append(part)

    def text(self) -> bytes:
        os.close(self.fd)
        self._thread.join(10)
        assert not self._thread.is_alive()
        os.close(self._reader)
        return b"".join(self._parts)


def collect(*parts: bytes) -> list[bytes]:
    seen: list[bytes] = []
    lines = Lines(seen.append)
    for part in parts:
        lines.feed(part)
    lines.finish()
    return seen


def test_lines_are_the_same_however_the_bytes_are_cut() -> None:
    text = b"one\ntwo\r\n\n 10%\r 20%\r 30%\nthree \xc3\xa9\r\r\nlast without an end"
    expected = [b"one", b"two", b"", b" 30%", "three é".encode(), b"last without an end"]
    random.seed(5)
    for _ in range(200):
        cuts = sorted(random.sample(range(len(text)), 7))
        assert collect(*(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))) == expected


def test_a_line_without_end_is_printed_in_pieces_and_loses_nothing() -> None:
    text = bytes(random.Random(1).choices(b"abc", k=3 * LINE_NBYTES + 5))
    assert b"".join(collect(*(text[at : at + 7001] for at in range(0, len(text), 7001)))) == text


def test_a_line_that_is_rewritten_for_long_is_printed_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROGRESS_S", 0.0)
    seen: list[bytes] = []
    lines = Lines(lambda line: seen.append(b"line " + line), lambda line: seen.append(b"state " + line))
    lines.feed(b"\r 1%")
    lines.feed(b"\r 2%\r 3%")
    lines.feed(b"\r100%\n")
    assert seen == [b"state  1%", b"state  3%", b"line 100%"]


def test_prefixes_tell_the_rank_and_streams_stay_apart() -> None:
    out, err = Reader(), Reader()
    output = Output(3, None, out.fd, err.fd)
    output.stream(1, is_stderr=False).feed(b"a\nb\n")
    output.stream(2, is_stderr=True).feed(b"c\n")
    partial = output.stream(0, is_stderr=False)
    partial.feed(b"no end")
    partial.finish()
    output.close()
    assert out.text() == b"[1] a\n[1] b\n[0] no end\n"
    assert err.text() == b"[2] c\n"


def test_one_rank_alone_passes_byte_for_byte() -> None:
    out, err = Reader(), Reader()
    output = Output(1, None, out.fd, err.fd)
    text = b"\x00\xff 10%\r 20%\r\n\x1b[31mred\x1b[0m no end"
    stream = output.stream(0, is_stderr=False)
    stream.feed(text)
    stream.finish()
    output.close()
    assert out.text() == text
    assert err.text() == b""


def test_logs_hold_both_streams_without_prefix_and_are_continued_by_the_next_job(tmp_path: Path) -> None:
    for word in (b"first", b"second"):
        out = Reader()
        output = Output(2, tmp_path, out.fd, out.fd)
        output.stream(1, is_stderr=False).feed(word + b" out\n")
        output.stream(1, is_stderr=True).feed(word + b" err\n")
        output.close()
        out.text()
    assert (tmp_path / "rank-1.log").read_bytes() == b"first out\nfirst err\nsecond out\nsecond err\n"
    assert (tmp_path / "rank-0.log").read_bytes() == b""


def test_a_full_log_disk_is_said_once_and_stops_nothing() -> None:
    out, err = Reader(), Reader()
    output = Output(2, None, out.fd, err.fd)
    output.log_paths[1] = Path("/dev/full")
    output._logs[1] = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    output.stream(1, is_stderr=False).feed(b"a\nb\n")
    output.close()
    assert out.text() == b"[1] a\n[1] b\n"
    assert err.text() == b"ringfold: /dev/full is no longer written: No space left on device\n"


def test_the_tail_keeps_the_last_lines_of_standard_error() -> None:
    out = Reader()
    output = Output(2, None, out.fd, out.fd)
    output.stream(0, is_stderr=True).feed(b"".join(b"%d\n" % number for number in range(TAIL_LINES + 7)))
    output.close()
    out.text()
    assert list(output.tails[0]) == [b"%d" % number for number in range(7, TAIL_LINES + 7)]
    assert not output.tails[1]


def test_a_reader_that_takes_nothing_never_blocks_the_loop_and_gets_everything_later() -> None:
    reader, writer = os.pipe()
    output = Output(2, None, writer, writer)
    stream = output.stream(1, is_stderr=False)
    line = b"x" * 999 + b"\n"
    started = time.monotonic()
    for _ in range(500):
        stream.feed(line)
        output.sink.flush()
    assert time.monotonic() - started < 5
    assert output.sink.nbytes > 300_000
    got = b""
    while output.sink.waiting_for is not None or select.select([reader], [], [], 0)[0]:
        got += os.read(reader, 65536)
        output.sink.flush()
    assert got == (b"[1] " + line) * 500
    os.close(reader)
    os.close(writer)


def test_a_closed_reader_loses_its_own_lines_only() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    err = Reader()
    output = Output(2, None, writer, err.fd)
    output.stream(0, is_stderr=False).feed(b"nobody\n")
    output.stream(0, is_stderr=True).feed(b"somebody\n")
    output.close()
    assert output.sink.broken == {writer}
    assert err.text() == b"[0] somebody\n"
    os.close(writer)


class TestOnATerminal:
    @pytest.fixture(autouse=True)
    def _colourful(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm")

    def test_each_rank_has_its_colour_and_a_line_cannot_leave_its_own_behind(self) -> None:
        out = Reader(terminal=True)
        output = Output(3, None, out.fd, out.fd)
        output.stream(1, is_stderr=False).feed(b"plain\n")
        output.stream(2, is_stderr=False).feed(b"\x1b[31mred\n")
        output.close()
        assert out.text() == b"\x1b[33m[1]\x1b[0m plain\n\x1b[35m[2]\x1b[0m \x1b[31mred\x1b[0m\n"

    def test_no_color_is_honoured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NO_COLOR", "1")
        out = Reader(terminal=True)
        output = Output(2, None, out.fd, out.fd)
        output.stream(1, is_stderr=False).feed(b"plain\n")
        output.close()
        assert out.text() == b"[1] plain\n"

    def test_rank_0s_progress_is_alive_and_other_ranks_lines_appear_above_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NO_COLOR", "1")
        out = Reader(terminal=True)
        output = Output(2, None, out.fd, out.fd)
        progress = output.stream(0, is_stderr=True)
        progress.feed(b"\r 10%")
        output.stream(1, is_stderr=False).feed(b"hello\n")
        progress.feed(b"\r\x1b[2K 20%\n")
        output.close()
        assert out.text() == (b"\r[0]  10%" + b"\r\x1b[K" + b"[1] hello\n" + b"\r[0]  10%" + b"\r\x1b[2K[0]  20%\n")

    def test_rank_0s_bytes_are_the_same_however_they_are_cut(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NO_COLOR", "1")
        text = b"\x1b[?25l\x1b[1m 10%\x1b[0m\r\x1b[2K 20%\nnext\n"
        expected = b"\x1b[?25l\x1b[1m[0]  10%\x1b[0m\r\x1b[2K[0]  20%\n[0] next\n\x1b[?25h"
        for step in (1, 2, 3, 5, len(text)):
            out = Reader(terminal=True)
            output = Output(2, None, out.fd, out.fd)
            stream = output.stream(0, is_stderr=False)
            for at in range(0, len(text), step):
                stream.feed(text[at : at + step])
            output.settle()
            output.close()
            assert out.text() == expected

    def test_what_the_launcher_says_comes_after_an_unfinished_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NO_COLOR", "1")
        out = Reader(terminal=True)
        output = Output(2, None, out.fd, out.fd)
        output.stream(0, is_stderr=False).feed(b" 50%")
        output.settle()
        output.say("ringfold: ended")
        output.close()
        assert out.text() == b"[0]  50%\n\x1b[?25hringfold: ended\n"
