"""A collective algorithm for one rank, as data: a list of steps over blocks of a vector.

A vector is cut into `chunks` chunks and each chunk into `segments` segments (`partition`); a `Block` names one segment of one chunk of
one buffer. Steps never name an element count, so one Schedule serves every count of its size class, and a block may be short or
empty: it is sent all the same, as an empty frame.

The list has program-order semantics and is executed out of order. Every rank has, for each peer, a send queue (SEND, EXPOSE) and a
receive queue (RECV, RECV_REDUCE, ATTACH), and one local queue (all other kinds). The head of a queue runs when the steps in its
`dependencies()` are complete; the queues' own order is implied and never listed. The C++ executor and the simulator use the same answer, so
what simulator.py proves is what runs.

Chunk c of a vector is rank c's: what it owns, contributes or gets. Of an all_to_all, chunk c of INPUT goes to rank c and chunk c of OUTPUT comes
from it; these have lengths of their own.

Scratch: slot k is a piece of memory as long as the longest chunk, and a block in it is cut exactly as the same segment of chunk
`k % chunks`.

This module neither chooses algorithms (select.py), nor contains any (algorithms/), nor runs one (csrc/executor).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from ringfold.collectives.codes import ALGORITHMS
from ringfold.collectives.errors import RingfoldError

__all__ = ["Block", "Buffer", "Kind", "Schedule", "ScheduleError", "Step", "block_lengths", "partition"]

MAGIC = 0x52465343
HEADER = struct.Struct("<9I")  # magic, chunks, segments, scratch_chunks, steps, algorithm, in_full, out_full, has_fallback
STEP = struct.Struct("<BBBBiBBHHBBHHH")  # kind, final, spread, 0, peer, src (buffer, 0, chunk, segment), dst (the same), dependencies
NO_BUFFER = 255


class ScheduleError(RingfoldError):
    """A schedule that cannot be run, or that does not do what its operation promises."""


class Buffer(IntEnum):
    """The memory that a block lies in; INPUT and OUTPUT may be the same memory, except in an all_to_all."""

    INPUT = 0
    OUTPUT = 1
    SCRATCH = 2


class Kind(IntEnum):
    """What a step does."""

    SEND = 1  # src goes to the peer; without src, an empty frame
    RECV = 2  # dst = incoming; without dst, an empty frame
    RECV_REDUCE = 3  # dst = src op incoming
    COPY = 4  # dst = src
    EXPOSE = 5  # tells the peer where this rank's vector lies in registered memory, or that it does not
    ATTACH = 6  # waits for the peer's EXPOSE
    FOLD = 7  # dst = fold over all ranks, in rank order, of their exposed vectors at dst; with a peer, into the peer's exposed
    #           vector instead; with spread, into every exposed vector
    PULL = 8  # dst = the peer's exposed vector at dst
    FENCE = 9  # every earlier step is complete before any later one begins
    REDUCE = 10  # dst = dst op src


SENDING = frozenset({Kind.SEND, Kind.EXPOSE})
RECEIVING = frozenset({Kind.RECV, Kind.RECV_REDUCE, Kind.ATTACH})
REDUCING = frozenset({Kind.RECV_REDUCE, Kind.FOLD, Kind.REDUCE})

# Which ranks' chunks INPUT and OUTPUT hold: all of them, or this rank's only.
FULL_BUFFERS = {
    "all_reduce": (True, True),
    "reduce_scatter": (True, False),
    "all_gather": (False, True),
    "broadcast": (True, True),
    "barrier": (True, True),
    "reduce": (True, True),
    "gather": (False, True),
    "scatter": (True, False),
    "all_to_all": (True, True),
}

ROOTED = frozenset({"broadcast", "reduce", "gather", "scatter"})
# The buffer that only the root has.
ROOT_ONLY = {"reduce": Buffer.OUTPUT, "gather": Buffer.OUTPUT, "scatter": Buffer.INPUT}
# INPUT and OUTPUT are one vector, on every rank (of a reduce: at the root).
ONE_VECTOR = frozenset({"all_reduce", "broadcast", "barrier"})

Queue = tuple[str, int]
LOCAL_QUEUE: Queue = ("local", -1)
Cell = tuple[Buffer, int, int]  # what two blocks must share to be the same memory


@dataclass(frozen=True, slots=True)
class Block:
    """One segment of one chunk (in SCRATCH: of one slot) of a buffer."""

    buffer: Buffer
    chunk: int
    segment: int

    def __str__(self) -> str:
        place = "slot" if self.buffer is Buffer.SCRATCH else "chunk"
        return f"{self.buffer.name} {place} {self.chunk} segment {self.segment}"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do; `final` marks the last fold of a block (an average is divided there), `spread` a FOLD into every vector."""

    kind: Kind
    peer: int = -1
    src: Block | None = None
    dst: Block | None = None
    final: bool = False
    spread: bool = False

    @property
    def queue(self) -> Queue:
        """The queue whose order this step keeps."""
        if self.kind in SENDING:
            return ("send", self.peer)
        if self.kind in RECEIVING:
            return ("receive", self.peer)
        return LOCAL_QUEUE

    @property
    def reads(self) -> tuple[Block, ...]:
        """The blocks of this rank that the step reads."""
        blocks = [] if self.src is None else [self.src]
        if self.dst is not None and self.kind in (Kind.REDUCE, Kind.FOLD):
            blocks.append(self.dst)
        return tuple(blocks)

    def __str__(self) -> str:
        words = [self.kind.name]
        if self.peer >= 0:
            words.append(f"{'from' if self.kind in RECEIVING | {Kind.PULL} else 'to'} {self.peer}")
        if self.src is not None:
            words.append(f"of {self.src}")
        if self.dst is not None:
            words.append(f"into {self.dst}")
        return " ".join(words + ["final"] * self.final + ["spread"] * self.spread)


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps of one rank in one collective operation, and the schedule to continue with when a vector is not in registered memory.

    The fallback begins after the first FENCE and may use, but only read, what was attached before it: the core copies from a peer's memory that is
    not registered by other means. Where it cannot, the fallback must not touch peers' vectors.
    """

    op: str
    algorithm: str
    rank: int
    size: int
    chunks: int
    segments: int
    steps: tuple[Step, ...]
    scratch_chunks: int = 0
    root: int = -1
    fallback: Schedule | None = None

    @property
    def exposed(self) -> Buffer:
        """The buffer that EXPOSE tells of; in an all_to_all, of its chunk for that peer."""
        return Buffer.OUTPUT if self.op in ONE_VECTOR else Buffer.INPUT

    @property
    def prelude(self) -> tuple[Step, ...]:
        """The steps up to the first FENCE, which the fallback does not repeat; all of them if there is no FENCE."""
        end = next((index for index, step in enumerate(self.steps, 1) if step.kind is Kind.FENCE), len(self.steps))
        return self.steps[:end]

    @property
    def continued(self) -> Schedule:
        """What a rank runs that learns, up to the first FENCE, that some vector is not in registered memory."""
        return self if self.fallback is None else replace(self.fallback, steps=self.prelude + self.fallback.steps)

    def cell(self, block: Block) -> Cell:
        """Return what identifies the memory to other blocks of this rank: INPUT and OUTPUT count as one wherever they may be."""
        apart = block.buffer is Buffer.SCRATCH or self.op == "all_to_all"
        return (block.buffer if apart else Buffer.OUTPUT, block.chunk, block.segment)

    def dependencies(self) -> tuple[tuple[int, ...], ...]:
        """For each step, the earlier steps that must be complete before it begins, beyond those that its queue's order implies.

        Two steps conflict when they touch the same memory and one of them writes, or when a FENCE stands between them. Of all the
        conflicting steps only those are listed that no other listed step already waits for: of one queue the last, of one block the
        last writer or its readers since, and nothing from before a fence.
        """
        writer: dict[Cell, int] = {}
        readers: dict[Cell, list[int]] = {}
        last: dict[Queue, int] = {}  # since the last fence
        fence = -1
        queues = [step.queue for step in self.steps]
        result: list[tuple[int, ...]] = []
        for index, step in enumerate(self.steps):
            queue = queues[index]
            if step.kind is Kind.FENCE:
                result.append(tuple(sorted(i for q, i in last.items() if q != LOCAL_QUEUE)))
                writer, readers, last, fence = {}, {}, {}, index
                continue
            needed: set[int] = set()
            reads = [self.cell(block) for block in step.reads]
            needed.update(writer[cell] for cell in reads if cell in writer)
            written = None if step.dst is None else self.cell(step.dst)
            if written is not None:
                since = readers.get(written)
                if since:
                    needed.update(since)
                elif written in writer:
                    needed.add(writer[written])
            latest: dict[Queue, int] = {}
            for earlier in needed:
                q = queues[earlier]
                latest[q] = max(earlier, latest.get(q, -1))
            latest.pop(queue, None)
            if not latest and fence >= 0 and queue not in last and queue != LOCAL_QUEUE:
                latest[LOCAL_QUEUE] = fence
            result.append(tuple(sorted(latest.values())))
            for cell in reads:
                readers.setdefault(cell, []).append(index)
            if written is not None:
                writer[written] = index
                readers[written] = []
            last[queue] = index
        return tuple(result)

    def compile(self) -> bytes:
        """Return the little-endian form that the C++ executor loads; the fallback's follows its own.

        Raises:
            ScheduleError: a number does not fit its field.
        """
        in_full, out_full = FULL_BUFFERS[self.op]
        try:
            parts = [
                HEADER.pack(
                    MAGIC,
                    self.chunks,
                    self.segments,
                    self.scratch_chunks,
                    len(self.steps),
                    ALGORITHMS[self.algorithm],
                    in_full,
                    out_full,
                    self.fallback is not None,
                )
            ]
            for step, needed in zip(self.steps, self.dependencies(), strict=True):
                src, dst = _packed(step.src), _packed(step.dst)
                parts.append(STEP.pack(step.kind, step.final, step.spread, 0, step.peer, *src, *dst, len(needed)))
                parts.append(struct.pack(f"<{len(needed)}I", *needed))
        except struct.error as error:
            raise ScheduleError(
                f"{self.op} ({self.algorithm}) for {self.size} ranks in {self.chunks} chunks of {self.segments} segments is too large to"
                f" compile on rank {self.rank}: chunks, segments and a step's dependencies must stay below 65,536 ({error})."
                " Use fewer segments."
            ) from error
        if self.fallback is not None:
            parts.append(self.fallback.compile())
        return b"".join(parts)


def _packed(block: Block | None) -> tuple[int, int, int, int]:
    return (NO_BUFFER, 0, 0, 0) if block is None else (block.buffer, 0, block.chunk, block.segment)


def partition(count: int, parts: int, align: int) -> list[int]:
    """Return the parts + 1 offsets that cut `count` elements into `parts` equal parts rounded up to `align` elements.

    The last parts may be short or empty. With align = 64 bytes' worth of elements no two parts share a cache line of an aligned vector.

    Raises:
        ValueError: parts or align is below 1, or count is negative.
    """
    if parts < 1 or align < 1 or count < 0:
        raise ValueError(f"partition(count={count}, parts={parts}, align={align}): parts and align must be at least 1, count at least 0")
    block = -(-count // parts)
    block = -(-block // align) * align
    return [min(count, part * block) for part in range(parts + 1)]


def block_lengths(count: int | Sequence[int], chunks: int, segments: int, align: int) -> list[list[int]]:
    """Return the number of elements of every [chunk][segment] of a vector of `count` elements, or of chunks of the given lengths.

    Raises:
        ValueError: the explicit lengths are not one for each chunk, or are negative.
    """
    if isinstance(count, int):
        offsets = partition(count, chunks, align)
        lengths = [end - start for start, end in itertools.pairwise(offsets)]
    else:
        lengths = list(count)
        if len(lengths) != chunks:
            raise ValueError(f"{len(lengths)} chunk lengths for {chunks} chunks: {lengths}")
    blocks = []
    for length in lengths:
        offsets = partition(length, segments, align)
        blocks.append([end - start for start, end in itertools.pairwise(offsets)])
    return blocks
