"""StepBeside: a BucketwiseStep beside backward, in a thread of its own, under stage 3.

    backward   | block 3 | block 2 | block 1 | block 0 |
    sums                 | 3       | 2       | 1       | 0
    step                 | 3             | 2            | 1             | 0        on the disk and the host, which backward needs little

A block is stepped on once the gradients of all its parameters are summed, so what uses them for a gradient is over. Under stage 3 any other
use passes through a gather: one that begins only then could see new values, and is refused (`Unit.is_late`).

A gate for each bucket is a Future: set when its block may be stepped on, or cancelled, which ends the thread at its next gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from ringfold.parallel.bucket import Bucket
from ringfold.parallel.zero.bucketwise import BucketwiseStep
from ringfold.parallel.zero.units import Unit
from torch import nn

__all__ = ["StepBeside"]


class StepBeside:
    """Steps of `step` on the parameters of `units`, one after `begin`, which ends with `finish` or `abandon`."""

    def __init__(self, step: BucketwiseStep, units: Sequence[Unit], gradient_of: Callable[[nn.Parameter], torch.Tensor | None]) -> None:
        self._step = step
        self._gradient_of = gradient_of
        self._unit_of = {bucket: unit for unit in units for bucket in unit.trained}
        device = next((bucket.device for bucket in self._unit_of), torch.device("cpu"))
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # gradients leave the device beside backward, too
        self._summed: set[Bucket] = set()
        self._gates: dict[Bucket, Future[torch.cuda.Event | None]] = {}
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="ringfold-step")
        self._running: Future[None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether a step has begun and was neither finished nor abandoned."""
        return self._running is not None

    def begin(self) -> None:
        """Begin to read what is stepped on first."""
        self._gates = {bucket: Future() for bucket in self._unit_of}
        self._running = self._executor.submit(self._run, self._gates)

    def take(self, bucket: Bucket) -> None:
        """Take note that the gradients of a bucket are summed, and given."""
        if not self.is_running:
            return
        self._summed.add(bucket)
        unit = self._unit_of[bucket]
        if self._summed.issuperset(unit.trained):
            unit.may_change = True
            self._open(unit.trained)

    def finish(self) -> None:
        """Step on what is left, whose gradients are given now, and wait; what the step raises is raised here."""
        self._open([bucket for bucket, gate in self._gates.items() if not gate.done()])
        assert self._running is not None  # narrows the type
        self._running.result()  # ends: all gates are open, and transfers have a deadline
        self._end()

    def abandon(self) -> bool:
        """End a step of which backward failed, if one runs; return whether one did."""
        for gate in self._gates.values():
            gate.cancel()
        was_running = self._running is not None
        if self._running is not None:
            wait([self._running])
        self._end()
        return was_running

    def close(self) -> None:
        """End the thread."""
        self.abandon()
        self._executor.shutdown()

    def _open(self, buckets: Sequence[Bucket]) -> None:
        event = None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()
        for bucket in buckets:
            self._gates[bucket].set_result(event)

    def _end(self) -> None:
        self._gates, self._running = {}, None
        self._summed.clear()
        for unit in self._unit_of.values():
            unit.may_change = unit.is_late = False

    def _run(self, gates: dict[Bucket, Future[torch.cuda.Event | None]]) -> None:
        def pass_gate(bucket: Bucket) -> None:
            event = gates[bucket].result()
            if event is not None and self._stream is not None:
                self._stream.wait_event(event)

        with torch.no_grad(), torch.cuda.stream(self._stream):  # both are a thread's own
            self._step.step(self._gradient_of, pass_gate)
