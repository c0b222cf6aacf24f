"""Metrics: what a training run says while it runs, on rank 0.

    on a terminal      one live line: step, loss, tokens/s, step time, share spent in communication, time left
    elsewhere          12:04:31 dp0 | step 120  loss 2.315  41 ms (comm 18%)  98.1k tokens/s  1:05 left
    with a log_dir     log_dir/metrics.jsonl, one JSON object a train step or report, appended to

A step costs an append to a list; what is shown and written happens a few times a second for all steps since then (a loss that is a
tensor is read only then), so a killed process loses at most that much of its log. It computes no metric: engine.evaluate does.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from ringfold.collectives import environment
from ringfold.collectives.errors import ConfigError

_FLUSH_EVERY_S = 0.25
_LINE_EVERY_S = 2.0


class Mesh(Protocol):
    """What metrics need of a DeviceMesh."""

    @property
    def rank(self) -> int: ...
    @property
    def layout(self) -> Any: ...
    @property
    def coordinate(self) -> Mapping[str, int]: ...
    @property
    def seconds_waited(self) -> float: ...


class _Step(NamedTuple):
    step: int
    loss: float | torch.Tensor
    tokens: float
    seconds: float
    waited_s: float
    ended: float
    values: dict[str, float]


class Metrics:
    """Show and log the train steps of one run; a context manager, and silent on every rank but 0.

    The time that this process is blocked in collectives, of whatever communicator, is shown as communication.
    `total_steps` gives the time left, `log_dir` (default: RINGFOLD_LOG_DIR, which --log-dir sets) the folder of metrics.jsonl, whose
    path is `path`. RINGFOLD_QUIET leaves only the file. Nothing here is collective.

    Raises:
        ConfigError: the log file cannot be opened.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        total_steps: int | None = None,
        log_dir: str | PathLike[str] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._mesh = mesh
        self._is_active = mesh.rank == 0
        log_dir = log_dir or os.environ.get(environment.LOG_DIR)
        self.path = Path(log_dir).absolute() / "metrics.jsonl" if log_dir else None
        self._file = _opened(self.path) if self.path and self._is_active else None
        is_shown = self._is_active and not os.environ.get(environment.QUIET)
        self._display = _Display(_label(mesh), total_steps, stream) if is_shown else None
        self._pending: list[_Step] = []
        self._flushed = -math.inf
        self._mark()

    def step(self, step: int, loss: float | torch.Tensor, *, tokens: float = 0, **values: float) -> None:
        """Note that train step number `step` has just ended; `tokens` are those of the global batch, `values` go to the log only."""
        if not self._is_active:
            return
        began, waited = self._time, self._waited
        self._mark()
        kept = loss.detach() if isinstance(loss, torch.Tensor) else loss
        self._pending.append(_Step(step, kept, tokens, self._time - began, self._waited - waited, time.time(), values))
        if self._time - self._flushed >= _FLUSH_EVERY_S:
            self._flush()

    def report(self, step: int, **values: float) -> None:
        """Show and log values that belong to no train step, such as a validation loss; the time they took counts for none."""
        if not self._is_active:
            return
        self._flush(is_shown_now=True)
        self._write([{"time": time.time(), "step": step, **values}])
        if self._display is not None:
            named = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
            self._display.say(self._display.headed(f"step {step}  {named}"))
        self._mark()

    def print(self, text: str) -> None:
        """Print text once for all ranks, above the live line."""
        if self._display is not None:
            self._flush(is_shown_now=True)
            self._display.say(text)

    def close(self) -> None:
        """Show and write what is still pending; closing twice is allowed."""
        self._flush(is_shown_now=True)
        if self._display is not None:
            self._display.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _mark(self) -> None:
        self._time = time.perf_counter()
        self._waited = self._mesh.seconds_waited

    def _flush(self, is_shown_now: bool = False) -> None:
        steps, self._pending = self._pending, []
        self._flushed = time.perf_counter()
        if steps:
            self._write([_record(step) for step in steps])
        if self._display is not None:
            self._display.show(steps, is_shown_now)

    def _write(self, records: list[dict[str, Any]]) -> None:
        if self._file is not None:
            self._file.writelines(json.dumps({name: _plain(value) for name, value in record.items()}) + "\n" for record in records)
            self._file.flush()


class _Display:
    """The live line, or the plain lines."""

    def __init__(self, label: str, total_steps: int | None, stream: TextIO | None) -> None:
        self._label = label
        self._total = total_steps
        self._console = Console(file=stream or sys.stdout, soft_wrap=True, highlight=False, markup=False, emoji=False)
        self._progress: Progress | None = None
        if self._console.is_terminal:
            columns = TextColumn("{task.description}", markup=False), BarColumn(24)
            self._progress = Progress(*columns, console=self._console, auto_refresh=False)
            self._task = self._progress.add_task("starting", total=total_steps)
            self._progress.start()
        self._unshown: list[_Step] = []
        self._shown = -math.inf
        self._done, self._seconds = 0, 0.0

    def show(self, steps: list[_Step], is_shown_now: bool) -> None:
        """Take in what has happened, and say it if it is time."""
        self._unshown += steps
        # The first step of a run allocates and warms up; it would spoil the estimate of the time left.
        counted = steps if self._done else steps[1:]
        self._done += len(steps)
        self._seconds += sum(step.seconds for step in counted)
        now = time.perf_counter()
        if not self._unshown or not (is_shown_now or self._progress or now - self._shown >= _LINE_EVERY_S):
            return
        text = self._text()
        if self._progress is not None:
            self._progress.update(self._task, description=text, completed=self._unshown[-1].step, refresh=True)
        else:
            self.say(self.headed(text))
        self._unshown, self._shown = [], now

    def headed(self, text: str) -> str:
        """Return a log line: the time, the place of this rank, the text."""
        return f"{time.strftime('%H:%M:%S')} {self._label} | {text}"

    def say(self, text: str) -> None:
        """Print a line, above the live one."""
        self._console.print(text)
        if self._progress is None:
            self._console.file.flush()

    def close(self) -> None:
        """Leave the terminal as it was, the last state of the line on it."""
        if self._progress is not None:
            self._progress.stop()

    def _text(self) -> str:
        last = self._unshown[-1]
        seconds = sum(step.seconds for step in self._unshown)
        share = sum(step.waited_s for step in self._unshown) / seconds if seconds else 0.0
        text = f"step {last.step}  loss {float(last.loss):.3f}  {1000 * seconds / len(self._unshown):.0f} ms (comm {share:.0%})"
        tokens = sum(step.tokens for step in self._unshown)
        if tokens and seconds:
            text += f"  {_short(tokens / seconds)} tokens/s"
        if self._total and self._done > 1:
            left = round((self._total - last.step) * self._seconds / (self._done - 1))
            text += f"  {left // 60}:{left % 60:02d} left" if left < 3600 else f"  {left // 3600}:{left // 60 % 60:02d} h left"
        return text


def _label(mesh: Mesh) -> str:
    """Return this rank's place on the axes that have more than one, and on dp: "dp0.tp1"."""
    return ".".join(f"{axis}{place}" for axis, place in mesh.coordinate.items() if axis == "dp" or mesh.layout.sizes[axis] > 1)


def _opened(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a", encoding="utf-8")  # kept open; close() closes it
    except OSError as error:
        raise ConfigError(f"the log file {path} cannot be written: {error.strerror}. Give another --log-dir.") from error


def _record(step: _Step) -> dict[str, Any]:
    record = {"time": step.ended, "step": step.step, "loss": float(step.loss), "seconds": step.seconds, "waited_s": step.waited_s}
    return {**record, **({"tokens": step.tokens} if step.tokens else {}), **step.values}


def _plain(value: Any) -> Any:
    """Return a JSON value; infinities, for which JSON has no number, as text."""
    if isinstance(value, bool | int | str):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _short(number: float) -> str:
    return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1e3:.1f}k" if number >= 1e3 else f"{number:.0f}"
