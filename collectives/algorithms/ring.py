"""Ring: every rank sends to its right neighbour and receives from its left, so that every link is busy all the time in one direction.

Words: one chunk a rank, many segments a chunk. With n ranks and a vector of S bytes, all_reduce takes 2(n - 1) communication steps
and sends 2S(n - 1)/n bytes a rank, the least possible; reduce_scatter and all_gather half of each; broadcast and reduce are chains of n - 1 steps
and S bytes. Segments are pipelined: one is sent on as soon as it is folded, while the next one still arrives.

In reduce_scatter chunk c starts at rank c + 1 and every rank that it passes folds it into its own, until it ends complete at rank c.
In all_gather it starts at rank c and is passed on unchanged. Only one rank computes each fold, so all ranks hold the same bits.

Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 69(2), 2009.
"""

from __future__ import annotations

from collections.abc import Iterator

from ringfold.collectives.cost import Cost, Topology
from ringfold.collectives.schedule import Block, Buffer, Kind, Schedule, Step

__all__ = ["all_gather", "all_reduce", "broadcast", "cost", "reduce", "reduce_scatter", "segment_groups"]

# The whole ring is run over this many segments of every chunk before the next ones start: what a rank sends on was then received a few
# segments ago and is still in its cache. Two would hide the hand-over of a segment to the next rank; four leave room for a late rank.
SEGMENTS_IN_FLIGHT = 4


def all_reduce(rank: int, size: int, segments: int) -> Schedule:
    """Return the reduce-scatter followed by the all-gather, in place in OUTPUT."""
    steps: list[Step] = []
    left, right = (rank - 1) % size, (rank + 1) % size
    for group in segment_groups(segments):
        for hop in range(size - 1):
            sent, folded = (rank - 1 - hop) % size, (rank - 2 - hop) % size
            for segment in group:
                own = Block(Buffer.OUTPUT, folded, segment)
                steps.append(Step(Kind.SEND, right, src=Block(Buffer.OUTPUT, sent, segment)))
                steps.append(Step(Kind.RECV_REDUCE, left, src=own, dst=own, final=hop == size - 2))
        for hop in range(size - 1):
            sent, received = (rank - hop) % size, (rank - 1 - hop) % size
            for segment in group:
                steps.append(Step(Kind.SEND, right, src=Block(Buffer.OUTPUT, sent, segment)))
                steps.append(Step(Kind.RECV, left, dst=Block(Buffer.OUTPUT, received, segment)))
    return Schedule("all_reduce", "ring", rank, size, size, segments, tuple(steps))


def reduce_scatter(rank: int, size: int, segments: int) -> Schedule:
    """Return the schedule that folds chunk `rank` of every INPUT into OUTPUT; partial folds travel in SCRATCH, INPUT stays as it is."""
    steps: list[Step] = []
    left, right = (rank - 1) % size, (rank + 1) % size
    for group in segment_groups(segments):
        for hop in range(size - 1):
            sent, folded = (rank - 1 - hop) % size, (rank - 2 - hop) % size
            last = hop == size - 2
            for segment in group:
                outgoing = Block(Buffer.INPUT if hop == 0 else Buffer.SCRATCH, sent, segment)
                own, partial = Block(Buffer.INPUT, folded, segment), Block(Buffer.OUTPUT if last else Buffer.SCRATCH, folded, segment)
                steps.append(Step(Kind.SEND, right, src=outgoing))
                steps.append(Step(Kind.RECV_REDUCE, left, src=own, dst=partial, final=last))
    if size == 1:
        steps.extend(_own_chunk(rank, segments))
    return Schedule("reduce_scatter", "ring", rank, size, size, segments, tuple(steps), scratch_chunks=size if size > 2 else 0)


def all_gather(rank: int, size: int, segments: int) -> Schedule:
    """Return the schedule that passes every INPUT chunk around the ring into OUTPUT."""
    steps: list[Step] = []
    left, right = (rank - 1) % size, (rank + 1) % size
    for group in segment_groups(segments):
        for hop in range(size - 1):
            sent, received = (rank - hop) % size, (rank - 1 - hop) % size
            for segment in group:
                steps.append(Step(Kind.SEND, right, src=Block(Buffer.INPUT if hop == 0 else Buffer.OUTPUT, sent, segment)))
                steps.append(Step(Kind.RECV, left, dst=Block(Buffer.OUTPUT, received, segment)))
    steps.extend(_own_chunk(rank, segments))
    return Schedule("all_gather", "ring", rank, size, size, segments, tuple(steps))


def broadcast(rank: int, size: int, root: int, segments: int) -> Schedule:
    """Return the chain root, root + 1, ..., over one chunk of many segments in OUTPUT."""
    steps: list[Step] = []
    left, right = (rank - 1) % size, (rank + 1) % size
    for segment in range(segments):
        block = Block(Buffer.OUTPUT, 0, segment)
        if rank != root:
            steps.append(Step(Kind.RECV, left, dst=block))
        if right != root:
            steps.append(Step(Kind.SEND, right, src=block))
    return Schedule("broadcast", "ring", rank, size, 1, segments, tuple(steps), root=root)


def reduce(rank: int, size: int, root: int, segments: int) -> Schedule:
    """Return the chain root + 1, root + 2, ..., root, over one chunk of many segments; partial folds travel in SCRATCH."""
    steps: list[Step] = []
    left, right = (rank - 1) % size, (rank + 1) % size
    first = (root + 1) % size
    for segment in range(segments if size > 1 else 0):
        own, partial = Block(Buffer.INPUT, 0, segment), Block(Buffer.OUTPUT if rank == root else Buffer.SCRATCH, 0, segment)
        if rank != first:
            steps.append(Step(Kind.RECV_REDUCE, left, src=own, dst=partial, final=rank == root))
        if rank != root:
            steps.append(Step(Kind.SEND, right, src=own if rank == first else partial))
    return Schedule("reduce", "ring", rank, size, 1, segments, tuple(steps), scratch_chunks=int(rank not in (first, root)), root=root)


def cost(op: str, topology: Topology, nbytes: int, segments: int) -> Cost:
    """Return what an operation on a vector of `nbytes` (all chunks together) costs each rank."""
    size = topology.size
    hops = size - 1
    if hops == 0:
        return Cost(0, 0, 0.0)
    around = [(rank, (rank + 1) % size) for rank in range(size)]
    if op in ("broadcast", "reduce"):
        # The last rank has its first segment after n - 1 hops, and one more after each of the others.
        turns = hops + segments - 1
        moved = turns * nbytes / segments
        folded = moved if op == "reduce" else 0.0
        return Cost(hops, nbytes, topology.seconds(around[:-1], moved, rounds=hops, messages=turns, folded_nbytes=folded))
    phases = 2 if op == "all_reduce" else 1
    wire = phases * hops * nbytes / size
    folded = 0.0 if op == "all_gather" else hops * nbytes / size
    seconds = topology.seconds(around, wire, rounds=phases * hops, messages=phases * hops * segments, folded_nbytes=folded)
    return Cost(phases * hops, round(wire), seconds)


def segment_groups(segments: int) -> Iterator[range]:
    """Yield the segments, SEGMENTS_IN_FLIGHT at a time."""
    return (range(start, min(start + SEGMENTS_IN_FLIGHT, segments)) for start in range(0, segments, SEGMENTS_IN_FLIGHT))


def _own_chunk(rank: int, segments: int) -> Iterator[Step]:
    return (Step(Kind.COPY, src=Block(Buffer.INPUT, rank, s), dst=Block(Buffer.OUTPUT, rank, s)) for s in range(segments))
