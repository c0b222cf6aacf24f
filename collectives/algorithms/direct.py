"""Direct: every rank talks to every other one, so an operation takes one or two communication steps whatever the number of ranks.

Three variants, with n ranks and a vector of S bytes:

`registered`, on one host. Each rank exposes its vector, folds its own chunk straight out of all the vectors and writes the result into
    all of them (all_reduce), or only reads (the other operations). Two steps of empty frames, no byte on a wire, no staging copy.
    Where a vector turns out not to be in registered memory, every rank goes on with the fallback.
`exchange`. Each rank sends chunk p to rank p, folds what arrives for its own chunk, and (all_reduce) sends the result to everyone:
    2 steps and 2S(n - 1)/n bytes a rank for all_reduce, half of each for reduce_scatter and all_gather. Broadcast: the root sends to each.
`one_shot`, for small all_reduces. Each rank sends its whole vector to each other and folds all of them itself: 1 step, S(n - 1) bytes.

All three fold in rank order, ((0 + 1) + 2) + ..., so an all_reduce gives the same bits whichever of them runs it. Sends go to rank + 1
first, then rank + 2, ..., so that the ranks do not all talk to the same one.

Barrier is dissemination: Hensgen, Finkel and Manber, "Two algorithms for barrier synchronization", IJPP 17(1), 1988.
"""

from __future__ import annotations

from collections.abc import Iterator

from ringfold.collectives.algorithms import ring
from ringfold.collectives.cost import Cost, Link
from ringfold.collectives.schedule import Block, Buffer, Kind, Schedule, Step

__all__ = [
    "all_gather",
    "all_gather_exchange",
    "all_reduce",
    "all_reduce_exchange",
    "all_reduce_one_shot",
    "barrier",
    "broadcast",
    "broadcast_exchange",
    "cost",
    "reduce_scatter",
    "reduce_scatter_exchange",
]

# A folded segment goes out to everyone this many segments after its fold: late enough that no rank waits for the slowest at every
# segment, early enough that it is still in the cache of the core that folded it (1, 2, 4, 8: 12.3, 12.6, 15.9, 15.6 ms for 64 MiB).
SEGMENTS_BEHIND = 1


def all_reduce(rank: int, size: int, segments: int) -> Schedule:
    """Return the registered all_reduce, in place in OUTPUT; the exchange is its fallback."""
    folds = [Step(Kind.FOLD, dst=Block(Buffer.OUTPUT, rank, s), final=True, spread=True) for s in range(segments)]
    return _registered("all_reduce", rank, size, segments, folds, all_reduce_exchange(rank, size, segments))


def reduce_scatter(rank: int, size: int, segments: int) -> Schedule:
    """Return the registered reduce_scatter: chunk `rank` of every exposed INPUT is folded into OUTPUT; the exchange is its fallback."""
    folds = [Step(Kind.FOLD, dst=Block(Buffer.OUTPUT, rank, s), final=True) for s in range(segments)]
    return _registered("reduce_scatter", rank, size, segments, folds, reduce_scatter_exchange(rank, size, segments))


def all_gather(rank: int, size: int, segments: int) -> Schedule:
    """Return the registered all_gather: each rank pulls the exposed INPUT chunk of every other; the exchange is its fallback."""
    pulls = [Step(Kind.PULL, peer, dst=Block(Buffer.OUTPUT, peer, s)) for peer in _peers(rank, size) for s in range(segments)]
    return _registered("all_gather", rank, size, segments, pulls + _own_chunk(rank, segments), all_gather_exchange(rank, size, segments))


def broadcast(rank: int, size: int, root: int, segments: int) -> Schedule:
    """Return the registered broadcast: all pull the root's exposed vector (one chunk, in OUTPUT); the ring's chain is its fallback."""
    fallback = ring.broadcast(rank, size, root, segments)
    if size == 1:
        return Schedule("broadcast", "direct", rank, size, 1, segments, (), root=root)
    if rank == root:
        steps = [Step(Kind.EXPOSE, peer) for peer in _peers(rank, size)]
        steps.append(Step(Kind.FENCE))
        steps.extend(Step(Kind.RECV, peer) for peer in _peers(rank, size))
    else:
        steps = [Step(Kind.ATTACH, root), Step(Kind.FENCE)]
        steps.extend(Step(Kind.PULL, root, dst=Block(Buffer.OUTPUT, 0, s)) for s in range(segments))
        steps.extend([Step(Kind.FENCE), Step(Kind.SEND, root)])
    return Schedule("broadcast", "direct", rank, size, 1, segments, tuple(steps), root=root, fallback=fallback)


def all_reduce_exchange(rank: int, size: int, segments: int) -> Schedule:
    """Return the all_reduce that sends each chunk to its owner and the owner's fold to everyone, in place in OUTPUT."""
    steps: list[Step] = []
    peers = _peers(rank, size)
    for turn in range(segments + SEGMENTS_BEHIND if size > 1 else 0):
        if turn < segments:
            own = Block(Buffer.OUTPUT, rank, turn)
            steps.extend(Step(Kind.SEND, peer, src=Block(Buffer.OUTPUT, peer, turn)) for peer in peers)
            steps.extend(_fold_in_rank_order(rank, size, own, own))
        folded = turn - SEGMENTS_BEHIND
        if folded >= 0:
            steps.extend(Step(Kind.SEND, peer, src=Block(Buffer.OUTPUT, rank, folded)) for peer in peers)
            steps.extend(Step(Kind.RECV, peer, dst=Block(Buffer.OUTPUT, peer, folded)) for peer in peers)
    return Schedule("all_reduce", "direct", rank, size, size, segments, tuple(steps), scratch_chunks=_scratch_chunks(rank))


def reduce_scatter_exchange(rank: int, size: int, segments: int) -> Schedule:
    """Return the reduce_scatter that sends each chunk of INPUT to its owner, who folds it into OUTPUT."""
    steps: list[Step] = []
    for segment in range(segments if size > 1 else 0):
        steps.extend(Step(Kind.SEND, peer, src=Block(Buffer.INPUT, peer, segment)) for peer in _peers(rank, size))
        own, folded = Block(Buffer.INPUT, rank, segment), Block(Buffer.OUTPUT, rank, segment)
        steps.extend(_fold_in_rank_order(rank, size, own, folded))
    if size == 1:
        steps.extend(_own_chunk(rank, segments))
    return Schedule("reduce_scatter", "direct", rank, size, size, segments, tuple(steps), scratch_chunks=_scratch_chunks(rank))


def all_gather_exchange(rank: int, size: int, segments: int) -> Schedule:
    """Return the all_gather that sends the own INPUT chunk to everyone."""
    steps: list[Step] = []
    peers = _peers(rank, size)
    for segment in range(segments):
        steps.extend(Step(Kind.SEND, peer, src=Block(Buffer.INPUT, rank, segment)) for peer in peers)
        steps.extend(Step(Kind.RECV, peer, dst=Block(Buffer.OUTPUT, peer, segment)) for peer in peers)
    return Schedule("all_gather", "direct", rank, size, size, segments, tuple(steps + _own_chunk(rank, segments)))


def broadcast_exchange(rank: int, size: int, root: int, segments: int) -> Schedule:
    """Return the broadcast in which the root sends its vector (one chunk, in OUTPUT) to each other rank itself."""
    steps: list[Step] = []
    for segment in range(segments if size > 1 else 0):
        block = Block(Buffer.OUTPUT, 0, segment)
        if rank == root:
            steps.extend(Step(Kind.SEND, peer, src=block) for peer in _peers(rank, size))
        else:
            steps.append(Step(Kind.RECV, root, dst=block))
    return Schedule("broadcast", "direct", rank, size, 1, segments, tuple(steps), root=root)


def all_reduce_one_shot(rank: int, size: int, segments: int) -> Schedule:
    """Return the all_reduce in which every rank folds all whole vectors (one chunk, in OUTPUT) itself, in exactly the same order."""
    steps: list[Step] = []
    for segment in range(segments if size > 1 else 0):
        own = Block(Buffer.OUTPUT, 0, segment)
        # The vector of rank p waits in slot p, or p - 1 beyond the own one, which has no slot.
        operands = [Block(Buffer.SCRATCH, p - (p > rank), segment) if p != rank else own for p in range(size)]
        for peer in _peers(rank, size):
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


def cost(op: str, variant: str, size: int, nbytes: int, segments: int, link: Link) -> Cost:
    """Return what an operation on a vector of `nbytes` (all chunks together) costs the busiest rank."""
    others = size - 1
    share = others * nbytes / size
    folded = share if op in ("all_reduce", "reduce_scatter") else 0.0
    if op == "barrier":
        rounds = others.bit_length()
        return Cost(rounds, 0, link.seconds(rounds=rounds, messages=rounds, wire_nbytes=0))
    if others == 0:
        return Cost(0, 0, 0.0)
    if variant == "registered":
        # Operands are read by the fold itself; what else is read or written in a peer's memory: results, chunks, the root's vector.
        accessed = {"all_reduce": share, "reduce_scatter": 0.0, "all_gather": share, "broadcast": float(nbytes)}[op]
        seconds = link.seconds(rounds=2, messages=2 * others, wire_nbytes=0, folded_nbytes=folded)
        return Cost(2, 0, seconds + accessed * link.access_s_per_byte)
    if variant == "one_shot":
        wire, rounds, messages, folded = float(others * nbytes), 1, others * segments, float(others * nbytes)
    elif op == "broadcast":
        wire, rounds, messages = float(others * nbytes), 1, others * segments
    else:
        rounds = 2 if op == "all_reduce" else 1
        wire, messages = rounds * share, rounds * others * segments
    senders = 1 if op == "broadcast" else others
    seconds = link.seconds(rounds=rounds, messages=messages, wire_nbytes=wire, folded_nbytes=folded, senders=senders)
    return Cost(rounds, round(wire), seconds)


def _registered(op: str, rank: int, size: int, segments: int, body: list[Step], fallback: Schedule) -> Schedule:
    """Surround `body` with what makes it safe: nobody touches a vector before its rank has come, or leaves while others use its own."""
    if size == 1:
        return fallback
    peers = _peers(rank, size)
    steps = [Step(Kind.EXPOSE, peer) for peer in peers] + [Step(Kind.ATTACH, peer) for peer in peers] + [Step(Kind.FENCE)]
    steps += [*body, Step(Kind.FENCE)]
    steps += [Step(Kind.SEND, peer) for peer in peers] + [Step(Kind.RECV, peer) for peer in peers]
    return Schedule(op, "direct", rank, size, size, segments, tuple(steps), fallback=fallback)


def _fold_in_rank_order(rank: int, size: int, own: Block, folded: Block) -> Iterator[Step]:
    """Fold the block `own` of all ranks into `folded`: the ranks below this one, in the slot cut like this chunk; this one; the rest.

    The two operands of a fold may change places without changing a bit, so ranks 0 and 1 need no slot. `own` and `folded` may be the
    same memory.
    """
    slot = Block(Buffer.SCRATCH, rank, own.segment)
    if rank >= 2:
        yield Step(Kind.RECV, 0, dst=slot)
        for peer in range(1, rank):
            yield Step(Kind.RECV_REDUCE, peer, src=slot, dst=slot)
        if own != folded:
            yield Step(Kind.COPY, src=own, dst=folded)
        yield Step(Kind.REDUCE, src=slot, dst=folded, final=rank == size - 1)
    elif rank == 1:
        yield Step(Kind.RECV_REDUCE, 0, src=own, dst=folded, final=size == 2)
    for peer in range(rank + 1, size):
        yield Step(Kind.RECV_REDUCE, peer, src=own if peer == 1 else folded, dst=folded, final=peer == size - 1)


def _scratch_chunks(rank: int) -> int:
    """Return how many slots _fold_in_rank_order needs: slot `rank` is the one cut like chunk `rank`."""
    return rank + 1 if rank >= 2 else 0


def _peers(rank: int, size: int) -> list[int]:
    return [(rank + distance) % size for distance in range(1, size)]


def _own_chunk(rank: int, segments: int) -> list[Step]:
    return [Step(Kind.COPY, src=Block(Buffer.INPUT, rank, s), dst=Block(Buffer.OUTPUT, rank, s)) for s in range(segments)]
