"""What memory the blocks of all ranks of one operation name: which chunks a rank has, which blocks are the same memory, how long each is.

simulator.py runs schedules on it. `in_place`: the own chunk of reduce_scatter, all_gather, gather and scatter is the same memory in INPUT
and OUTPUT, which the user may want or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ringfold.collectives.schedule import FULL_BUFFERS, ONE_VECTOR, ROOT_ONLY, Block, Buffer, Schedule, block_lengths

__all__ = ["Cell", "Vectors"]

Cell = tuple[int, Buffer, int, int]  # rank, buffer, chunk (slot), segment


@dataclass(frozen=True, slots=True)
class Vectors:
    """INPUT and OUTPUT of all ranks of an operation whose schedules look like `schedule` (any rank's)."""

    schedule: Schedule
    in_place: bool

    def has(self, rank: int, buffer: Buffer, chunk: int) -> bool:
        """Tell whether a rank has that chunk of INPUT or OUTPUT."""
        schedule = self.schedule
        is_full = FULL_BUFFERS[schedule.op][0 if buffer is Buffer.INPUT else 1]
        return (is_full or chunk == rank) and (rank == schedule.root or ROOT_ONLY.get(schedule.op) is not buffer)

    def why_absent(self, rank: int, block: Block, slots: int) -> str | None:
        """Say why a rank has no such block, None if it has one."""
        schedule, buffer = self.schedule, block.buffer
        chunks = slots if buffer is Buffer.SCRATCH else schedule.chunks
        if not (0 <= block.chunk < chunks and 0 <= block.segment < schedule.segments):
            return f"there are {chunks} chunks of {schedule.segments} segments"
        if buffer is Buffer.SCRATCH:
            return "the chunks of an all_to_all have no common lengths to cut SCRATCH by" if schedule.op == "all_to_all" else None
        if self.has(rank, buffer, block.chunk):
            return None
        return f"{buffer.name} holds chunk {rank} only" if self.has(rank, buffer, rank) else f"only rank {schedule.root}, the root, has {buffer.name}"

    def cell(self, rank: int, block: Block) -> Cell:
        """Return the memory a block of a rank names, the same for two blocks that are the same memory."""
        is_output = block.buffer is Buffer.INPUT and self._is_shared(rank, block.chunk)
        return (rank, Buffer.OUTPUT if is_output else block.buffer, block.chunk, block.segment)

    def _is_shared(self, rank: int, chunk: int) -> bool:
        """Tell whether a chunk is the same memory in INPUT and OUTPUT."""
        op = self.schedule.op
        if op in ONE_VECTOR or op == "reduce":
            return op != "reduce" or rank == self.schedule.root
        return self.in_place and chunk == rank and self.has(rank, Buffer.INPUT, chunk) and self.has(rank, Buffer.OUTPUT, chunk)

    def shape(self, rank: int, block: Block) -> tuple[int, int]:
        """Return what decides a block's length: the chunk (of an all_to_all: of which rank for which) and the segment."""
        schedule, chunk = self.schedule, block.chunk
        if schedule.op == "all_to_all":
            return (rank * schedule.size + chunk if block.buffer is Buffer.INPUT else chunk * schedule.size + rank, block.segment)
        return (chunk % schedule.chunks if block.buffer is Buffer.SCRATCH else chunk, block.segment)

    def lengths(self, count: int | Sequence[int], align: int) -> list[list[int]]:
        """Return the elements of every shape, [chunk][segment], of a vector of `count` elements or of chunks of the given lengths.

        Those of an all_to_all are all ranks' INPUT chunks, one rank after the other.
        """
        schedule = self.schedule
        if schedule.op != "all_to_all":
            return block_lengths(count, schedule.chunks, schedule.segments, align)
        if isinstance(count, int):
            return block_lengths(count, schedule.chunks, schedule.segments, align) * schedule.size
        return block_lengths(count, schedule.chunks * schedule.size, schedule.segments, align)

    def inputs(self) -> list[tuple[int, Cell]]:
        """Return every block in which an operation finds what a rank contributes: the rank and the memory."""
        schedule = self.schedule
        ranks = [schedule.root] if schedule.op == "broadcast" else range(schedule.size)
        return [
            (rank, self.cell(rank, Block(Buffer.INPUT, chunk, segment)))
            for rank in ranks
            for chunk in range(schedule.chunks)
            if self.has(rank, Buffer.INPUT, chunk)
            for segment in range(schedule.segments)
        ]

    def outputs(self, rank: int) -> dict[tuple[int, int], Cell]:
        """Return the memory of every (chunk, segment) of OUTPUT that a rank has."""
        schedule = self.schedule
        chunks = [chunk for chunk in range(schedule.chunks) if self.has(rank, Buffer.OUTPUT, chunk)]
        return {(c, s): self.cell(rank, Block(Buffer.OUTPUT, c, s)) for c in chunks for s in range(schedule.segments)}

    def exposed(self, rank: int, peer: int, block: Block) -> Cell | None:
        """Return the memory in which `peer` exposes, to `rank`, what its `block` is for; None where it does not."""
        schedule = self.schedule
        chunk = block.chunk % schedule.chunks
        if schedule.op == "all_to_all":
            if chunk != peer or block.buffer is not Buffer.OUTPUT:
                return None
            chunk = rank
        return self.cell(peer, Block(schedule.exposed, chunk, block.segment)) if self.has(peer, schedule.exposed, chunk) else None
