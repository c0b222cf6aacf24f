"""Runs a Schedule over point-to-point calls of a Python library (MPI, NCCL): what csrc/executor/operation.cpp does over our own channels.

    plan = Plan(schedule)                                     # once
    run = Execution(plan, request, point_to_point, tag)       # for each operation
    while not run.finished:
        run.advance()                                         # never blocks: many runs take turns

Who works in rounds instead (rounds.py) takes the steps itself: `post` and `complete` for a message, `run_local` for the others.

The queues and the dependencies are those of schedule.py. What differs from the core: a send or receive is begun, and later found complete, so that
a few of each queue are under way at a time; they are taken to be complete in their order, as dependencies() assumes. What is to be folded
arrives beside its destination. Schedules that work in registered memory are refused: there is none here.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from ringfold.collectives.fold import divide, fold
from ringfold.collectives.schedule import FULL_BUFFERS, LOCAL_QUEUE, RECEIVING, Block, Buffer, Cell, Kind, Queue, Schedule, ScheduleError, partition
from ringfold.collectives.transport import Request
from torch import Tensor

__all__ = ["Execution", "Handle", "Plan", "PointToPoint", "Posted"]

# Of one queue: enough that the next message is under way while the last is folded, and little memory for what has not been folded.
IN_FLIGHT = 4
# As in the core, chunks and segments begin at multiples of a cache line: both must cut a vector alike.
ALIGN_NBYTES = 64
REGISTERED = frozenset({Kind.EXPOSE, Kind.ATTACH, Kind.FOLD, Kind.PULL})
# Operations whose vector consists of one piece for each rank, equal unless the request counts them.
IN_PIECES = frozenset({"reduce_scatter", "all_gather", "gather", "scatter", "all_to_all"})


class Handle(Protocol):
    """A send or receive under way."""

    def test(self) -> bool:
        """Tell whether it is complete, without waiting; not called again once it is."""


class PointToPoint(Protocol):
    """Messages between the ranks of one communicator; those with one tag from one rank to another arrive in order."""

    def isend(self, tensor: Tensor, peer: int, tag: int) -> Handle:
        """Begin to send a contiguous tensor, which may be empty; it is neither changed nor freed before the send is complete."""

    def irecv(self, tensor: Tensor, peer: int, tag: int) -> Handle:
        """Begin to receive exactly this tensor."""


class Plan:
    """A schedule with its dependencies and queues worked out, for any number of executions."""

    def __init__(self, schedule: Schedule) -> None:
        """Prepare a schedule.

        Raises: ScheduleError, if it wants registered memory.
        """
        wanting = [index for index, step in enumerate(schedule.steps) if step.kind in REGISTERED]
        if wanting:
            raise ScheduleError(
                f"{schedule.op} ({schedule.algorithm}) of {schedule.size} ranks cannot run here: step {wanting[0]} "
                f"({schedule.steps[wanting[0]]}) works in registered memory, which only the C++ core has"
            )
        self.schedule = schedule
        self.dependencies = schedule.dependencies()
        self.queues: dict[Queue, list[int]] = {}
        for index, step in enumerate(schedule.steps):
            self.queues.setdefault(step.queue, []).append(index)


@dataclass(slots=True)
class Posted:
    """A message under way; `arriving` is where an operand lands that is to be folded."""

    index: int
    handle: Handle
    arriving: Tensor | None


class _QueueState:
    __slots__ = ("indices", "next", "posted", "queue")

    def __init__(self, queue: Queue, indices: list[int]) -> None:
        self.queue = queue
        self.indices = indices
        self.next = 0
        self.posted: deque[Posted] = deque()


class Execution:
    """One operation under way: a plan, how far its queues are, and the tensors it works on."""

    def __init__(self, plan: Plan, request: Request, point_to_point: PointToPoint, tag: int) -> None:
        self._plan = plan
        self._schedule = plan.schedule
        self._request = request
        self._wires = point_to_point
        self._tag = tag
        self._done = [False] * len(plan.schedule.steps)
        self._queues = [_QueueState(queue, indices) for queue, indices in plan.queues.items()]
        self._blocks: dict[Block, Tensor] = {}
        self._tensors = {buffer: None if tensor is None else tensor.detach() for buffer, tensor in self._vectors().items()}
        self._device = next((tensor.device for tensor in self._tensors.values() if tensor is not None), None)
        self.steps = len(plan.schedule.steps)
        self.steps_done = 0

    @property
    def finished(self) -> bool:
        return self.steps_done == self.steps

    def advance(self) -> bool:
        """Take every step that can be taken now; return whether anything moved."""
        moved = False
        while sum(self._turn(state) for state in self._queues) > 0:
            moved = True
        return moved

    @property
    def waiting_for(self) -> int:
        """The peer whose message the first receive, else send, under way needs, or -1."""
        under_way = [state.queue for state in self._queues if state.posted]
        return next((peer for side in ("receive", "send") for kind, peer in under_way if kind == side), -1)

    # -- steps ------------------------------------------------------------------------------------------------------------------------

    def _turn(self, state: _QueueState) -> bool:
        moved = False
        while state.posted and state.posted[0].handle.test():
            self.complete(state.posted.popleft())
            moved = True
        while state.next < len(state.indices) and len(state.posted) < IN_FLIGHT:
            index = state.indices[state.next]
            if not self._is_ready(index, state):
                break
            state.next += 1
            moved = True
            if state.queue == LOCAL_QUEUE:
                self.run_local(index)
            else:
                state.posted.append(self.post(index))
        return moved

    def _is_ready(self, index: int, state: _QueueState) -> bool:
        if not all(self._done[earlier] for earlier in self._plan.dependencies[index]):
            return False
        step = self._schedule.steps[index]
        if step.kind is not Kind.RECV or step.dst is None:
            return True
        # Messages of one queue land in any order. What is folded, is so in the queue's order; what lands in its place must wait for that.
        cell = self._schedule.cell(step.dst)
        return not any(cell in self._cells(posted.index) for posted in state.posted)

    def _cells(self, index: int) -> list[Cell]:
        step = self._schedule.steps[index]
        return [self._schedule.cell(block) for block in (step.src, step.dst) if block is not None]

    def post(self, index: int) -> Posted:
        """Begin the message of a step."""
        step = self._schedule.steps[index]
        if step.kind not in RECEIVING:
            return Posted(index, self._wires.isend(self._block(step.src), step.peer, self._tag), None)
        place = self._block(step.dst)
        arriving = torch.empty_like(place) if step.kind is Kind.RECV_REDUCE else None
        return Posted(index, self._wires.irecv(place if arriving is None else arriving, step.peer, self._tag), arriving)

    def complete(self, posted: Posted) -> None:
        """Do what a message that has passed is followed by."""
        step = self._schedule.steps[posted.index]
        if posted.arriving is not None:
            fold(self._block(step.dst), self._block(step.src), posted.arriving, self._request.reduction, self._divisor(step.final))
        self._mark(posted.index)

    def run_local(self, index: int) -> None:
        """Take a step that is no message."""
        step = self._schedule.steps[index]
        self._mark(index)
        if step.kind is Kind.FENCE:
            return
        target, source = self._block(step.dst), self._block(step.src)
        divisor = self._divisor(step.final)
        if step.kind is Kind.REDUCE:
            fold(target, target, source, self._request.reduction, divisor)
            return
        if target.data_ptr() != source.data_ptr():
            target.copy_(source)
        if divisor > 1:
            divide(target, divisor)

    def _mark(self, index: int) -> None:
        self._done[index] = True
        self.steps_done += 1

    def _divisor(self, final: bool) -> int:
        return self._schedule.size if final and self._request.reduction == "avg" else 1

    # -- memory -----------------------------------------------------------------------------------------------------------------------

    def _vectors(self) -> dict[Buffer, Tensor | None]:
        return {Buffer.INPUT: self._request.input, Buffer.OUTPUT: self._request.output}

    @cached_property
    def _offsets(self) -> dict[Buffer, list[int]]:
        """Where the chunks of each buffer begin, in elements; those of SCRATCH are as long as INPUT's."""
        request, chunks = self._request, self._schedule.chunks
        if self._schedule.op in IN_PIECES:
            equal = (request.count // chunks,) * chunks
            sent = _edges(request.input_counts or request.output_counts or equal)
            return {Buffer.INPUT: sent, Buffer.OUTPUT: _edges(request.output_counts) if request.output_counts else sent, Buffer.SCRATCH: sent}
        return dict.fromkeys(Buffer, partition(request.count, chunks, self._align))

    @property
    def _align(self) -> int:
        return max(1, ALIGN_NBYTES // self._request.dtype.itemsize)

    @cached_property
    def _scratch(self) -> Tensor:
        """Slots as long as the longest chunk, one behind the other."""
        longest = max(end - begin for begin, end in itertools.pairwise(self._offsets[Buffer.SCRATCH]))
        return torch.empty(self._schedule.scratch_chunks, longest, dtype=self._request.dtype, device=self._device)

    def _block(self, block: Block | None) -> Tensor:
        """Return the memory of a block, of this rank; a message without one is empty."""
        if block is None:
            return torch.empty(0, dtype=self._request.dtype, device=self._device)
        known = self._blocks.get(block)
        if known is None:
            known = self._blocks[block] = self._cut(block)
        return known

    def _cut(self, block: Block) -> Tensor:
        offsets = self._offsets[block.buffer]
        chunk = block.chunk % self._schedule.chunks
        length = offsets[chunk + 1] - offsets[chunk]
        begin, end = partition(length, self._schedule.segments, self._align)[block.segment : block.segment + 2]
        if block.buffer is Buffer.SCRATCH:
            return self._scratch[block.chunk][begin:end]
        vector = self._tensors[block.buffer]
        if vector is None:
            raise ScheduleError(
                f"{self._schedule.op} ({self._schedule.algorithm}): rank {self._schedule.rank} has no {block.buffer.name}, but uses {block}"
            )
        is_whole = FULL_BUFFERS[self._schedule.op][block.buffer]
        base = offsets[chunk] if is_whole else 0
        return vector[base + begin : base + end]


def _edges(counts: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(counts)]
