"""`ringfold run`: start a job's ranks, stand by until all have ended, and say how it went.

One loop on the main thread, which never blocks: it reads the ranks' output, takes signals, sees who has ended, and does what is due.

    a rank fails             the others get 1 s to notice and say so themselves, then SIGTERM, then SIGKILL 2 s later
    SIGINT, SIGTERM, SIGHUP  passed on to the ranks; SIGKILL after 5 s, or at once when the user asks again
    the reader goes away     as SIGTERM
    kill -9 of this process  the warden and PR_SET_PDEATHSIG end everything

Exit code: 0, the culprit's own, or 128 + the signal that ended the job. The words for a failure are in report.py, processes in workers.py.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

from ringfold.collectives.errors import ConfigError
from ringfold.collectives.store import StoreServer
from ringfold.launch import machine, report
from ringfold.launch.options import RunOptions
from ringfold.launch.output import FULL_NBYTES, Output, Stream, is_coloured
from ringfold.launch.warden import Warden
from ringfold.launch.workers import Credentials, TerminalSize, Worker, read_available, read_rest

NOTICE_S = 1.0  # for the others to notice a failure and print it
TERMINATE_S = 2.0  # between SIGTERM and SIGKILL after a failure
INTERRUPT_S = 5.0  # between the user's signal and SIGKILL: a checkpoint may be written
AGAIN_S = 0.3  # make, uv and shells pass on a Ctrl-C that the terminal has already sent: that is not asking again
LINGER_S = 5.0  # for a rank that has recorded its failure to end by itself
UNKILLABLE_S = 10.0
_LOOK_S = 0.5

_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_job(options: RunOptions) -> int:
    """Run the job to its end and return its exit code; nothing of it is alive afterwards.

    Raises: LaunchError, if a rank cannot be started; ConfigError, if the logs cannot be.
    """
    with _wakeups() as wakeup, ExitStack() as closing:
        try:
            if options.log_dir:
                options.log_dir.mkdir(parents=True, exist_ok=True)
            output = Output(options.world_size, options.log_dir)
        except OSError as error:
            raise ConfigError(f"--log-dir {options.log_dir}: {error.filename} cannot be written: {error.strerror}") from None
        closing.callback(output.close)
        job = _Job(options, output, wakeup, closing)
        job.start()
        job.stand_by()
        return job.conclude()


class _Job:
    """A running job: its workers, what is due when, and why it is ending."""

    def __init__(self, options: RunOptions, output: Output, wakeup: int, closing: ExitStack) -> None:
        self._options = options
        self._output = output
        self._wakeup = wakeup
        self._credentials = Credentials.new()
        self._warden = Warden(self._credentials.mark)
        closing.callback(self._warden.close)
        if options.world_size > 1:
            server = StoreServer(self._credentials.secret.encode())
            closing.callback(server.close)
            self._credentials = Credentials(self._credentials.job_id, self._credentials.secret, server.address)
        self._workers: list[Worker] = []
        closing.callback(self._end_workers)
        self._streams: dict[int, tuple[Worker, Stream]] = {}
        self._started_ns = time.monotonic_ns()
        self._ending: Literal["failed", "interrupted"] | None = None
        self._signal = 0
        self._signal_at = 0.0
        self._due: list[tuple[float, Callable[[], None]]] = []
        self._given_up = False
        self._sights: list[report.Sight] = []
        self._next_look = 0.0

    def start(self) -> None:
        """Start every rank."""
        terminal = _terminal_size(self._output) if self._output.on_terminal else None
        cores = machine.cores()
        for rank in range(self._options.world_size):
            worker = Worker(self._options, rank, self._credentials, cores, self._warden, terminal if rank == 0 else None)
            self._workers.append(worker)
            self._streams[worker.stdout] = worker, self._output.stream(rank, is_stderr=False)
            self._streams[worker.stderr] = worker, self._output.stream(rank, is_stderr=True)

    def stand_by(self) -> None:
        """Return when every rank has ended, or proved impossible to end."""
        while not self._given_up and any(worker.returncode is None for worker in self._workers):
            self._wait()
            for worker in self._workers:
                if worker.returncode is None and worker.poll():
                    self._ended(worker)
            if self._output.sink.broken and self._ending is None:
                self._interrupt(signal.SIGPIPE)
            self._look()
            now = time.monotonic()
            due, self._due = [act for at, act in self._due if at <= now], [(at, act) for at, act in self._due if at > now]
            for act in due:
                act()

    def conclude(self) -> int:
        """Print the verdict, write the report and return the exit code."""
        duration_s = (time.monotonic_ns() - self._started_ns) / 1e9
        self._output.settle()
        outcomes = self._outcomes()
        verdict = report.judge(outcomes) if self._ending != "interrupted" else None
        code = 128 + self._signal if self._ending == "interrupted" else verdict.exit_code if verdict else 0
        if verdict:
            text = report.block(verdict, outcomes, duration_s, _columns(self._output.stderr))
            self._output.say(report.emphasised(text) if is_coloured(self._output.stderr) else text)
        elif self._ending == "interrupted":
            self._output.say(f"ringfold: ended by {report.signal_name(self._signal)} after {duration_s:.1f} s")
        if self._options.report:
            document = report.as_json(
                verdict,
                outcomes,
                ended=self._ending or "finished",
                exit_code=code,
                duration_s=duration_s,
                job_id=self._credentials.job_id,
                command=self._options.target.command(),
            )
            try:
                report.write_json(self._options.report, document)
            except OSError as error:
                self._output.say(f"ringfold: the report could not be written to {self._options.report}: {error.strerror}")
        return code

    def _wait(self) -> None:
        """Wait for output, a signal, room to print, or the next thing that is due; then read and print."""
        poller = select.poll()
        poller.register(self._wakeup, select.POLLIN)
        sink = self._output.sink
        if sink.nbytes < FULL_NBYTES:
            for fd in self._streams:
                poller.register(fd, select.POLLIN)
        if (blocked := sink.waiting_for) is not None:
            poller.register(blocked, select.POLLOUT)
        until = min([at for at, _ in self._due] + [self._next_look])
        for ready, _ in poller.poll(max(0.0, until - time.monotonic()) * 1000):
            if ready == self._wakeup:
                for number in read_available(ready) or b"":
                    self._take_signal(number)
            elif ready in self._streams:
                self._read(ready)
        sink.flush()

    def _read(self, fd: int) -> None:
        stream = self._streams[fd][1]
        data = read_available(fd)
        if data is None:
            self._close_stream(fd)
        elif data:
            stream.feed(data)

    def _close_stream(self, fd: int) -> None:
        worker, stream = self._streams.pop(fd)
        stream.finish()
        worker.close_stream(fd)

    def _ended(self, worker: Worker) -> None:
        """Take what a dead worker left in its pipes, and end the job if it failed."""
        for fd in [fd for fd, (owner, _) in self._streams.items() if owner is worker]:
            self._streams[fd][1].feed(read_rest(fd))
            self._close_stream(fd)
        if worker.returncode and self._ending is None:
            self._fail()

    def _fail(self) -> None:
        self._ending = "failed"
        self._see()
        now = time.monotonic()
        self._due += [(now + NOTICE_S, lambda: self._signal_all(signal.SIGTERM)), (now + NOTICE_S + TERMINATE_S, self._kill)]

    def _take_signal(self, number: int) -> None:
        if number == signal.SIGWINCH and self._output.on_terminal:
            self._workers[0].resize(_terminal_size(self._output))
        elif number in _ENDINGS and self._ending is None:
            self._interrupt(number)
        elif number in _ENDINGS and time.monotonic() - self._signal_at > AGAIN_S:
            self._kill()

    def _interrupt(self, number: int) -> None:
        self._ending = "interrupted"
        self._signal = number
        self._signal_at = time.monotonic()
        self._see()
        self._signal_all(signal.SIGTERM if number == signal.SIGPIPE else number)
        self._due.append((self._signal_at + INTERRUPT_S, self._kill))

    def _signal_all(self, number: int) -> None:
        for worker in self._workers:
            worker.signal(number)

    def _kill(self) -> None:
        self._signal_all(signal.SIGKILL)
        self._due = [(time.monotonic() + UNKILLABLE_S, self._give_up)]

    def _give_up(self) -> None:
        self._given_up = True

    def _look(self) -> None:
        """See whether a rank has recorded a failure but does not end: a thread that is not a daemon holds it, say."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_S
        if self._ending is None:
            for worker in self._workers:
                failure = report.failure_of(worker.page) if worker.returncode is None else None
                if failure and time.monotonic_ns() - failure.failure_ns > LINGER_S * 1e9:
                    self._fail()
                    return

    def _see(self) -> None:
        now_ns = time.monotonic_ns()
        self._sights = [report.see(worker.page, worker.process_state(), now_ns) for worker in self._workers]

    def _outcomes(self) -> list[report.Outcome]:
        if not self._sights:
            self._see()
        return [
            report.Outcome(
                rank=worker.rank,
                pid=worker.pid,
                returncode=worker.returncode,
                ended_ns=worker.ended_ns,
                signalled_ns=worker.signalled_ns,
                failure=report.failure_of(worker.page),
                seen=sight,
                stderr_tail=tuple(line.decode(errors="replace") for line in self._output.tails[worker.rank]),
                log=str(log) if (log := self._output.log_paths[worker.rank]) else None,
            )
            for worker, sight in zip(self._workers, self._sights, strict=True)
        ]

    def _end_workers(self) -> None:
        """Kill what is still alive, on whatever way the job is left."""
        deadline = time.monotonic() + UNKILLABLE_S
        for worker in self._workers:
            worker.signal(signal.SIGKILL)
        for worker in self._workers:
            while not worker.poll() and not self._given_up and time.monotonic() < deadline:
                time.sleep(0.002)
            worker.close()


@contextmanager
def _wakeups() -> Iterator[int]:
    """Yield a descriptor on which the numbers of arriving signals can be read.

    A signal that was ignored when the launcher was started stays ignored: nohup and background jobs of a script ask for that.
    """
    # A launcher started with a standard stream closed must not have a pipe of its own take that number.
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    numbers = [number for number in _ENDINGS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in (*numbers, signal.SIGCHLD, signal.SIGWINCH)}
    before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


def _terminal_size(output: Output) -> TerminalSize:
    size = os.get_terminal_size(output.stdout)
    return TerminalSize(size.lines, max(20, size.columns - output.prefix_columns))


def _columns(fd: int) -> int:
    try:
        return os.get_terminal_size(fd).columns or 100
    except OSError:
        return 100
