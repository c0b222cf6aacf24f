"""Halving and doubling: what a rank has folded, or gathered, doubles with every step, so that ceil(log2 n) steps reach all n ranks.

Two variants, with a vector of S bytes:

`chunks`. One chunk a rank. all_gather: in step k, with d = 2^k, rank r holds the chunks r ... r + d - 1, sends the first min(d, n - d) of them to
    rank r - d and receives as many from rank r + d. reduce_scatter is the same backwards in time and with every arrow turned: what was copied is
    folded. Each takes ceil(log2 n) steps and S(n - 1)/n bytes a rank, whatever n is; all_reduce is one after the other, twice that. Where n
    is a power of two these are the steps and bytes of recursive halving and doubling; no rank is left over where it is not.
`whole`, for small all_reduces. Ranks v and v xor 2^k exchange and fold whole vectors in step k: log2 n steps, S log2 n bytes. With n no power of
    two, p = 2^floor(log2 n), the first n - p ranks of odd number fold into their left neighbours first and get the result last: 2 steps more.
    Both ranks of a pair put the lower one's operand left, so all hold the same bits.

Rabenseifner, "Optimization of collective reduction operations", ICCS 2004. Bruck, Ho, Kipnis, Upfal and Weathersby, "Efficient algorithms for
all-to-all communications in multiport message-passing systems", IEEE TPDS 8(11), 1997. Träff, "Optimal, non-pipelined reduce-scatter and
allreduce algorithms", arXiv:2410.14234, 2024.
"""

from __future__ import annotations

from collections.abc import Iterator

from ringfold.collectives.algorithms.direct import own_chunk
from ringfold.collectives.algorithms.ring import segment_groups
from ringfold.collectives.cost import Cost, Topology
from ringfold.collectives.schedule import Block, Buffer, Kind, Schedule, Step

__all__ = ["all_gather", "all_reduce", "all_reduce_whole", "cost", "reduce_scatter"]


def all_reduce(rank: int, size: int, segments: int) -> Schedule:
    """Return the reduce-scatter followed by the all-gather, in place in OUTPUT."""
    steps: list[Step] = []
    for group in segment_groups(segments):
        for distance, count in reversed(_doublings(size)):
            for offset in range(count):
                sent, folded = (rank + distance + offset) % size, (rank + offset) % size
                for s in group:
                    own = Block(Buffer.OUTPUT, folded, s)
                    steps.append(Step(Kind.SEND, (rank + distance) % size, src=Block(Buffer.OUTPUT, sent, s)))
                    steps.append(Step(Kind.RECV_REDUCE, (rank - distance) % size, src=own, dst=own, final=distance == 1))
        steps.extend(_gather(rank, size, group, Buffer.OUTPUT))
    return Schedule("all_reduce", "halving_doubling", rank, size, size, segments, tuple(steps))


def reduce_scatter(rank: int, size: int, segments: int) -> Schedule:
    """Return the schedule that folds chunk `rank` of every INPUT into OUTPUT; partial folds lie in SCRATCH, INPUT stays as it is."""
    steps: list[Step] = []
    partial: set[int] = set()  # the chunks that have been folded into
    for group in segment_groups(segments):
        partial.clear()
        for distance, count in reversed(_doublings(size)):
            last = distance == 1
            for offset in range(count):
                sent, folded = (rank + distance + offset) % size, (rank + offset) % size
                for s in group:
                    outgoing = Block(Buffer.SCRATCH if sent in partial else Buffer.INPUT, sent, s)
                    own = Block(Buffer.SCRATCH if folded in partial else Buffer.INPUT, folded, s)
                    steps.append(Step(Kind.SEND, (rank + distance) % size, src=outgoing))
                    target = Block(Buffer.OUTPUT if last else Buffer.SCRATCH, folded, s)
                    steps.append(Step(Kind.RECV_REDUCE, (rank - distance) % size, src=own, dst=target, final=last))
            partial.update((rank + offset) % size for offset in range(count))
    if size == 1:
        steps.extend(own_chunk(rank, segments))
    slots = 1 + max((step.dst.chunk for step in steps if step.dst is not None and step.dst.buffer is Buffer.SCRATCH), default=-1)
    return Schedule("reduce_scatter", "halving_doubling", rank, size, size, segments, tuple(steps), scratch_chunks=slots)


def all_gather(rank: int, size: int, segments: int) -> Schedule:
    """Return the schedule that gathers the INPUT chunks of twice as many ranks in each step."""
    steps = [step for group in segment_groups(segments) for step in _gather(rank, size, group, Buffer.INPUT)]
    return Schedule("all_gather", "halving_doubling", rank, size, size, segments, tuple(steps + own_chunk(rank, segments)))


def all_reduce_whole(rank: int, size: int, segments: int) -> Schedule:
    """Return the all_reduce in which pairs of ranks exchange whole vectors (one chunk, in OUTPUT)."""
    steps: list[Step] = []
    power = 1 << (size.bit_length() - 1)
    paired = 2 * (size - power)  # the ranks below this come in pairs, of which the even one acts for both
    place = rank // 2 if rank < paired else rank - paired // 2  # among those that act
    used_slot = False
    for segment in range(segments):
        own, slot = Block(Buffer.OUTPUT, 0, segment), Block(Buffer.SCRATCH, 0, segment)
        if rank < paired and rank % 2:
            steps += [Step(Kind.SEND, rank - 1, src=own), Step(Kind.RECV, rank - 1, dst=own)]
            continue
        if rank < paired:
            steps.append(Step(Kind.RECV_REDUCE, rank + 1, src=own, dst=own))
        held, free = own, slot
        distance = 1
        while distance < power:
            partner = place ^ distance
            peer = 2 * partner if partner < paired // 2 else partner + paired // 2
            last = 2 * distance == power
            steps.append(Step(Kind.SEND, peer, src=held))
            # Not into what is being sent: a rank whose fold waits for its own send would wait for a peer that does the same.
            if place < partner:
                steps.append(Step(Kind.RECV_REDUCE, peer, src=held, dst=free, final=last))
            else:
                steps += [Step(Kind.RECV, peer, dst=free), Step(Kind.REDUCE, src=held, dst=free, final=last)]
            held, free, used_slot = free, held, True
            distance *= 2
        if held != own:
            steps.append(Step(Kind.COPY, src=held, dst=own))
        if rank < paired:
            steps.append(Step(Kind.SEND, rank + 1, src=own))
    return Schedule("all_reduce", "halving_doubling", rank, size, 1, segments, tuple(steps), scratch_chunks=int(used_slot))


def cost(op: str, variant: str, topology: Topology, nbytes: int, segments: int) -> Cost:
    """Return what an operation on a vector of `nbytes` (all chunks together) costs the busiest rank."""
    size = topology.size
    if size == 1:
        return Cost(0, 0, 0.0)
    seconds = 0.0
    if variant == "whole":
        power = 1 << (size.bit_length() - 1)
        acting = [2 * v if v < size - power else v + size - power for v in range(power)]
        doublings = power.bit_length() - 1
        for k in range(doublings):
            pairs = [(acting[v], acting[v ^ 1 << k]) for v in range(power)]
            seconds += topology.seconds(pairs, nbytes, rounds=1, messages=segments, folded_nbytes=nbytes)
        if power < size:
            pairs = [(rank, rank + 1) for rank in range(0, 2 * (size - power), 2)]
            seconds += topology.seconds(pairs, 2 * nbytes, rounds=2, messages=2 * segments, folded_nbytes=nbytes)
        # Of the ranks that act for a pair, each sends once more; where there are none, each once a doubling.
        steps = doublings + 2 * (power < size)
        return Cost(steps, nbytes * (doublings + (power < size)), seconds)
    phases = 2 if op == "all_reduce" else 1
    for distance, count in _doublings(size):
        pairs = [(rank, (rank + distance) % size) for rank in range(size)]
        moved = count * nbytes / size
        # A ring passes on what it has just received; here that has left the cache before it is needed again, and is read once more.
        folded = {"all_reduce": 3, "reduce_scatter": 2, "all_gather": 1}[op] * moved
        seconds += topology.seconds(pairs, phases * moved, rounds=phases, messages=phases * count * segments, folded_nbytes=folded)
    return Cost(phases * len(_doublings(size)), round(phases * nbytes * (size - 1) / size), seconds)


def _doublings(size: int) -> list[tuple[int, int]]:
    """Return the distance and the number of chunks of each step of an all_gather."""
    return [(1 << k, min(1 << k, size - (1 << k))) for k in range((size - 1).bit_length())]


def _gather(rank: int, size: int, group: range, own: Buffer) -> Iterator[Step]:
    """Gather all chunks in OUTPUT; the own one lies in the buffer `own`."""
    for distance, count in _doublings(size):
        for offset in range(count):
            sent, received = (rank + offset) % size, (rank + distance + offset) % size
            for s in group:
                yield Step(Kind.SEND, (rank - distance) % size, src=Block(own if offset == 0 else Buffer.OUTPUT, sent, s))
                yield Step(Kind.RECV, (rank + distance) % size, dst=Block(Buffer.OUTPUT, received, s))
