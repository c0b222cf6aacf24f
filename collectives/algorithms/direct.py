"""Direct: every rank talks to every other one, so an operation takes one or two communication steps whatever the number of ranks.

Three variants, with n ranks and a vector of S bytes (of an all_to_all: S bytes a rank):

`registered`, on one host, where ranks work in each other's memory: direct_registered.py.
`exchange`. Each rank sends chunk p to rank p, folds what arrives for its own chunk, and sends the result to everyone (all_reduce) or to the
    root (reduce): 2 steps, 2S(n - 1)/n bytes a rank for all_reduce, S for reduce, and S(n - 1)/n in one step for reduce_scatter,
    all_gather and all_to_all. Broadcast and scatter: the root sends to each; gather: each sends to the root.
`one_shot`, for small all_reduces. Each rank sends its whole vector to each other and folds all of them itself: 1 step, S(n - 1) bytes.

All fold in rank order, ((0 + 1) + 2) + ..., so an operation gives the same bits whichever of them runs it. Sends go to rank + 1
first, then rank + 2, ..., so that the ranks do not all talk to the same one.

Barrier is dissemination: Hensgen, Finkel and Manber, "Two algorithms for barrier synchronization", IJPP 17(1), 1988.
"""

from __future__ import annotations

from collections.abc import Iterator

from ringfold.collectives.cost import Cost, Topology, everyone
from ringfold.collectives.schedule import Block, Buffer, Kind, Schedule, Step

__all__ = [
    "all_gather",
    "all_reduce",
    "all_reduce_one_shot",
    "all_to_all",
    "barrier",
    "broadcast",
    "cost",
    "gather",
    "own_chunk",
    "peers_of",
    "reduce",
    "reduce_scatter",
    "scatter",
]

# A folded segment goes out to everyone this many segments after its fold: late enough that no rank waits for the slowest at every
# segment, early enough that it is still in the cache of the core that folded it (1, 2, 4, 8: 12.3, 12.6, 15.9, 15.6 ms for 64 MiB).
SEGMENTS_BEHIND = 1


def all_reduce(rank: int, size: int, segments: int) -> Schedule:
    """Return the all_reduce that sends each chunk to its owner and the owner's fold to everyone, in place in OUTPUT."""
    steps: list[Step] = []
    peers = peers_of(rank, size)
    for turn in range(segments + SEGMENTS_BEHIND if size > 1 else 0):
        if turn < segments:
            own = Block(Buffer.OUTPUT, rank, turn)
            steps.extend(Step(Kind.SEND, peer, src=Block(Buffer.OUTPUT, peer, turn)) for peer in peers)
            steps.extend(_fold_in_rank_order(rank, size, own, own))
        folded = turn - SEGMENTS_BEHIND
        if folded >= 0:
            steps.extend(Step(Kind.SEND, peer, src=Block(Buffer.OUTPUT, rank, folded)) for peer in peers)
            steps.extend(Step(Kind.RECV, peer, dst=Block(Buffer.OUTPUT, peer, folded)) for peer in peers)
    return Schedule("all_reduce", "direct", rank, size, size, segments, tuple(steps), scratch_chunks=rank + 1 if rank >= 2 else 0)


def reduce_scatter(rank: int, size: int, segments: int) -> Schedule:
    """Return the reduce_scatter that sends each chunk of INPUT to its owner, who folds it into OUTPUT."""
    steps: list[Step] = []
    for segment in range(segments if size > 1 else 0):
        steps.extend(Step(Kind.SEND, peer, src=Block(Buffer.INPUT, peer, segment)) for peer in peers_of(rank, size))
        own, folded = Block(Buffer.INPUT, rank, segment), Block(Buffer.OUTPUT, rank, segment)
        steps.extend(_fold_in_rank_order(rank, size, own, folded))
    if size == 1:
        steps.extend(own_chunk(rank, segments))
    return Schedule("reduce_scatter", "direct", rank, size, size, segments, tuple(steps), scratch_chunks=rank + 1 if rank >= 2 else 0)


def reduce(rank: int, size: int, root: int, segments: int) -> Schedule:
    """Return the reduce that sends each chunk to its owner, who folds it in SCRATCH (the root: in OUTPUT) and sends it to the root."""
    steps: list[Step] = []
    for turn in range(segments + SEGMENTS_BEHIND if size > 1 else 0):
        if turn < segments:
            steps.extend(Step(Kind.SEND, peer, src=Block(Buffer.INPUT, peer, turn)) for peer in peers_of(rank, size))
            own = Block(Buffer.INPUT, rank, turn)
            steps.extend(_fold_in_rank_order(rank, size, own, Block(Buffer.OUTPUT if rank == root else Buffer.SCRATCH, rank, turn)))
        folded = turn - SEGMENTS_BEHIND
        if folded >= 0 and rank == root:
            steps.extend(Step(Kind.RECV, peer, dst=Block(Buffer.OUTPUT, peer, folded)) for peer in peers_of(rank, size))
        elif folded >= 0:
            steps.append(Step(Kind.SEND, root, src=Block(Buffer.SCRATCH, rank, folded)))
    slots = rank + 1 if size > 1 and (rank >= 2 or rank != root) else 0
    return Schedule("reduce", "direct", rank, size, size, segments, tuple(steps), scratch_chunks=slots, root=root)


def all_gather(rank: int, size: int, segments: int) -> Schedule:
    """Return the all_gather that sends the own INPUT chunk to everyone."""
    steps: list[Step] = []
    peers = peers_of(rank, size)
    for segment in range(segments):
        steps.extend(Step(Kind.SEND, peer, src=Block(Buffer.INPUT, rank, segment)) for peer in peers)
        steps.extend(Step(Kind.RECV, peer, dst=Block(Buffer.OUTPUT, peer, segment)) for peer in peers)
    return Schedule("all_gather", "direct", rank, size, size, segments, tuple(steps + own_chunk(rank, segments)))


def broadcast(rank: int, size: int, root: int, segments: int) -> Schedule:
    """Return the broadcast in which the root sends its vector (one chunk, in OUTPUT) to each other rank itself."""
    steps: list[Step] = []
    for segment in range(segments if size > 1 else 0):
        block = Block(Buffer.OUTPUT, 0, segment)
        if rank == root:
            steps.extend(Step(Kind.SEND, peer, src=block) for peer in peers_of(rank, size))
        else:
            steps.append(Step(Kind.RECV, root, dst=block))
    return Schedule("broadcast", "direct", rank, size, 1, segments, tuple(steps), root=root)


def gather(rank: int, size: int, root: int, segments: int) -> Schedule:
    """Return the gather in which each rank sends its INPUT chunk to the root."""
    if rank != root:
        steps = [Step(Kind.SEND, root, src=Block(Buffer.INPUT, rank, s)) for s in range(segments)]
    else:
        steps = [Step(Kind.RECV, peer, dst=Block(Buffer.OUTPUT, peer, s)) for s in range(segments) for peer in peers_of(rank, size)]
        steps += own_chunk(rank, segments)
    return Schedule("gather", "direct", rank, size, size, segments, tuple(steps), root=root)


def scatter(rank: int, size: int, root: int, segments: int) -> Schedule:
    """Return the scatter in which the root sends each rank its chunk of INPUT."""
    if rank != root:
        steps = [Step(Kind.RECV, root, dst=Block(Buffer.OUTPUT, rank, s)) for s in range(segments)]
    else:
        steps = [Step(Kind.SEND, peer, src=Block(Buffer.INPUT, peer, s)) for s in range(segments) for peer in peers_of(rank, size)]
        steps += own_chunk(rank, segments)
    return Schedule("scatter", "direct", rank, size, size, segments, tuple(steps), root=root)


def all_to_all(rank: int, size: int) -> Schedule:
    """Return the all_to_all in which each rank sends chunk p of INPUT to rank p; chunks of any lengths are one segment each."""
    steps: list[Step] = []
    for peer in peers_of(rank, size):
        steps.append(Step(Kind.SEND, peer, src=Block(Buffer.INPUT, peer, 0)))
        steps.append(Step(Kind.RECV, peer, dst=Block(Buffer.OUTPUT, peer, 0)))
    return Schedule("all_to_all", "direct", rank, size, size, 1, tuple(steps + own_chunk(rank, 1)))


def all_reduce_one_shot(rank: int, size: int, segments: int) -> Schedule:
    """Return the all_reduce in which every rank folds all whole vectors (one chunk, in OUTPUT) itself, in exactly the same order."""
    steps: list[Step] = []
    for segment in range(segments if size > 1 else 0):
        own = Block(Buffer.OUTPUT, 0, segment)
        # The vector of rank p waits in slot p, or p - 1 beyond the own one, which has no slot.
        operands = [Block(Buffer.SCRATCH, p - (p > rank), segment) if p != rank else own for p in range(size)]
        for peer in peers_of(rank, size):
            steps.append(Step(Kind.SEND, peer, src=own))
            steps.append(Step(Kind.RECV, peer, dst=operands[peer]))
        steps.extend(Step(Kind.REDUCE, src=operands[p], dst=operands[0], final=p == size - 1) for p in range(1, size))
        if operands[0] != own:
            steps.append(Step(Kind.COPY, src=operands[0], dst=own))
    return Schedule("all_reduce", "direct", rank, size, 1, segments, tuple(steps), scratch_chunks=size - 1)


def barrier(rank: int, size: int) -> Schedule:
    """Return ceil(log2 size) rounds of empty frames: in round k to rank + 2^k, from rank - 2^k, each after the round before it."""
    steps: list[Step] = []
    distance = 1
    while distance < size:
        if steps:
            steps.append(Step(Kind.FENCE))
        steps.append(Step(Kind.SEND, (rank + distance) % size))
        steps.append(Step(Kind.RECV, (rank - distance) % size))
        distance *= 2
    return Schedule("barrier", "direct", rank, size, 1, 1, tuple(steps))


def cost(op: str, variant: str, topology: Topology, nbytes: int, segments: int) -> Cost:
    """Return what an operation on a vector of `nbytes` (all chunks together) costs the busiest rank."""
    size = topology.size
    others = size - 1
    chunk = nbytes / size
    folded = others * chunk if op in ("all_reduce", "reduce_scatter", "reduce") else 0.0
    if others == 0:
        return Cost(0, 0, 0.0)
    if op == "barrier":
        rounds = others.bit_length()
        return Cost(rounds, 0, topology.seconds(everyone(size), 0, rounds=rounds, messages=rounds))
    if variant == "one_shot":
        folded = float(others * nbytes)
        seconds = topology.seconds(everyone(size), nbytes, rounds=1, messages=others * segments, folded_nbytes=folded, senders=others)
        return Cost(1, others * nbytes, seconds)
    if op in ("broadcast", "scatter"):
        each = nbytes if op == "broadcast" else chunk
        seconds = topology.seconds(((0, peer) for peer in range(1, size)), each, rounds=1, messages=others * segments)
        return Cost(1, round(others * each), seconds)
    to_root = topology.seconds(((peer, 0) for peer in range(1, size)), chunk, rounds=1, messages=others * segments, senders=others)
    if op == "gather":
        return Cost(1, round(chunk), to_root)
    to_all = topology.seconds(everyone(size), chunk, rounds=1, messages=others * segments, folded_nbytes=folded, senders=others)
    if op == "reduce":
        return Cost(2, nbytes, to_all + to_root)
    if op != "all_reduce":
        return Cost(1, round(others * chunk), to_all)
    seconds = topology.seconds(everyone(size), 2 * chunk, rounds=2, messages=2 * others * segments, folded_nbytes=folded, senders=others)
    return Cost(2, round(2 * others * chunk), seconds)


def _fold_in_rank_order(rank: int, size: int, own: Block, folded: Block) -> Iterator[Step]:
    """Fold the block `own` of all ranks into `folded`: the ranks below this one, in the slot cut like this chunk; this one; the rest.

    The two operands of a fold may change places without changing a bit, so ranks 0 and 1 need no slot. `own` and `folded` may be the
    same memory, and so may the slot and `folded`.
    """
    slot = Block(Buffer.SCRATCH, rank, own.segment)
    if rank >= 2:
        yield Step(Kind.RECV, 0, dst=slot)
        for peer in range(1, rank):
            yield Step(Kind.RECV_REDUCE, peer, src=slot, dst=slot)
        if folded == slot:
            yield Step(Kind.REDUCE, src=own, dst=slot, final=rank == size - 1)
        else:
            if own != folded:
                yield Step(Kind.COPY, src=own, dst=folded)
            yield Step(Kind.REDUCE, src=slot, dst=folded, final=rank == size - 1)
    elif rank == 1:
        yield Step(Kind.RECV_REDUCE, 0, src=own, dst=folded, final=size == 2)
    for peer in range(rank + 1, size):
        yield Step(Kind.RECV_REDUCE, peer, src=own if peer == 1 else folded, dst=folded, final=peer == size - 1)


def peers_of(rank: int, size: int) -> list[int]:
    """Return all other ranks, beginning behind this one."""
    return [(rank + distance) % size for distance in range(1, size)]


def own_chunk(rank: int, segments: int) -> list[Step]:
    """Return the copies of what a rank sends to itself."""
    return [Step(Kind.COPY, src=Block(Buffer.INPUT, rank, s), dst=Block(Buffer.OUTPUT, rank, s)) for s in range(segments)]
