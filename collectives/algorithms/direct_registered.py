"""Direct, registered: on one host each rank exposes its vector and works where the vectors of the others lie.

all_reduce: each rank folds its own chunk straight out of all the vectors and writes the result into all of them; reduce: into the root's.
The other operations only read. With n ranks and a vector of S bytes: two steps of empty frames, no byte on a wire and no staging copy.

Where a vector turns out not to be in registered memory, every rank goes on with the fallback, after the prelude (EXPOSE, ATTACH, FENCE):

`exchange`: direct.py's, through the transport.
`remote`: the same work, for vectors of peers that can be read where they lie (process_vm_readv), but not written. Operations that only read are the
    same. all_reduce: each rank folds its own chunk at home, and when all have, pulls the others' chunks. reduce: each rank folds its own chunk in
    SCRATCH and sends it to the root. Some vectors may be registered and others not.

All fold in rank order, as the exchange does.
"""

from __future__ import annotations

from ringfold.collectives.algorithms import direct, ring
from ringfold.collectives.algorithms.direct import own_chunk, peers_of
from ringfold.collectives.cost import Cost, Link
from ringfold.collectives.schedule import Block, Buffer, Kind, Schedule, Step

__all__ = ["all_gather", "all_reduce", "all_to_all", "broadcast", "cost", "gather", "reduce", "reduce_scatter", "scatter"]

FENCE = Step(Kind.FENCE)


def all_reduce(rank: int, size: int, segments: int) -> Schedule:
    """Return the registered all_reduce, in place in OUTPUT."""
    folds = [Step(Kind.FOLD, dst=Block(Buffer.OUTPUT, rank, s), final=True, spread=True) for s in range(segments)]
    return _among_all("all_reduce", rank, size, segments, folds, direct.all_reduce(rank, size, segments))


def reduce_scatter(rank: int, size: int, segments: int) -> Schedule:
    """Return the registered reduce_scatter: chunk `rank` of every exposed INPUT is folded into OUTPUT."""
    folds = [Step(Kind.FOLD, dst=Block(Buffer.OUTPUT, rank, s), final=True) for s in range(segments)]
    return _among_all("reduce_scatter", rank, size, segments, folds, direct.reduce_scatter(rank, size, segments))


def reduce(rank: int, size: int, root: int, segments: int) -> Schedule:
    """Return the registered reduce: each rank folds its chunk of every exposed INPUT into the root's, which is the root's OUTPUT."""
    if rank == root:
        folds = [Step(Kind.FOLD, dst=Block(Buffer.OUTPUT, rank, s), final=True) for s in range(segments)]
    else:
        folds = [Step(Kind.FOLD, root, dst=Block(Buffer.INPUT, rank, s), final=True) for s in range(segments)]
    return _among_all("reduce", rank, size, segments, folds, direct.reduce(rank, size, root, segments))


def all_gather(rank: int, size: int, segments: int) -> Schedule:
    """Return the registered all_gather: each rank pulls the exposed INPUT chunk of every other."""
    pulls = _pull_chunks(rank, size, segments)
    return _among_all("all_gather", rank, size, segments, pulls + own_chunk(rank, segments), direct.all_gather(rank, size, segments))


def all_to_all(rank: int, size: int) -> Schedule:
    """Return the registered all_to_all: each rank pulls from every other the INPUT chunk that is exposed to it."""
    return _among_all("all_to_all", rank, size, 1, _pull_chunks(rank, size, 1) + own_chunk(rank, 1), direct.all_to_all(rank, size))


def broadcast(rank: int, size: int, root: int, segments: int) -> Schedule:
    """Return the registered broadcast: all pull the root's exposed vector (one chunk, in OUTPUT)."""
    pulls = [] if rank == root else [Step(Kind.PULL, root, dst=Block(Buffer.OUTPUT, 0, s)) for s in range(segments)]
    return _from_root("broadcast", rank, size, root, segments, 1, pulls, ring.broadcast(rank, size, root, segments))


def scatter(rank: int, size: int, root: int, segments: int) -> Schedule:
    """Return the registered scatter: each rank pulls its chunk of the root's exposed INPUT."""
    steps = own_chunk(rank, segments) if rank == root else [Step(Kind.PULL, root, dst=Block(Buffer.OUTPUT, rank, s)) for s in range(segments)]
    return _from_root("scatter", rank, size, root, segments, size, steps, direct.scatter(rank, size, root, segments))


def gather(rank: int, size: int, root: int, segments: int) -> Schedule:
    """Return the registered gather: the root pulls the exposed INPUT chunk of every other rank; all hear of all, to decide alike."""
    fallback = direct.gather(rank, size, root, segments)
    if size == 1:
        return fallback
    peers = peers_of(rank, size)
    steps = _introduce(peers)
    if rank == root:
        steps += [*_pull_chunks(rank, size, segments), *own_chunk(rank, segments), FENCE, *(Step(Kind.SEND, peer) for peer in peers)]
    else:
        steps.append(Step(Kind.RECV, root))
    return Schedule("gather", "direct", rank, size, size, segments, tuple(steps), root=root, fallback=fallback)


def cost(op: str, size: int, nbytes: int, link: Link) -> Cost:
    """Return what an operation on a vector of `nbytes` (all chunks together), all in registered memory, costs the busiest rank."""
    others = size - 1
    if others == 0:
        return Cost(0, 0, 0.0)
    share = others * nbytes / size
    # Operands are read by the fold itself; what else is read or written in a peer's memory: results, chunks, the root's vector.
    folded = share if op in ("all_reduce", "reduce_scatter", "reduce") else 0.0
    accessed = {"reduce_scatter": 0.0, "reduce": nbytes / size, "scatter": nbytes / size, "broadcast": float(nbytes)}.get(op, share)
    seconds = link.seconds(rounds=2, messages=2 * others, wire_nbytes=0, folded_nbytes=folded)
    return Cost(2, 0, seconds + accessed * link.access_s_per_byte)


def _introduce(peers: list[int]) -> list[Step]:
    return [Step(Kind.EXPOSE, peer) for peer in peers] + [Step(Kind.ATTACH, peer) for peer in peers] + [FENCE]


def _pull_chunks(rank: int, size: int, segments: int) -> list[Step]:
    return [Step(Kind.PULL, peer, dst=Block(Buffer.OUTPUT, peer, s)) for peer in peers_of(rank, size) for s in range(segments)]


def _meet(peers: list[int]) -> list[Step]:
    """Wait, with what came before complete, until the same can be said of all peers."""
    return [FENCE] + [Step(Kind.SEND, peer) for peer in peers] + [Step(Kind.RECV, peer) for peer in peers]


def _among_all(op: str, rank: int, size: int, segments: int, body: list[Step], fallback: Schedule) -> Schedule:
    """Surround `body` with what makes it safe: nobody touches a vector before its rank has come, or leaves while others use its own."""
    if size == 1:
        return fallback
    peers = peers_of(rank, size)
    steps = [*_introduce(peers), *body, *_meet(peers)]
    return Schedule(op, "direct", rank, size, size, segments, tuple(steps), root=fallback.root, fallback=fallback)


def _from_root(op: str, rank: int, size: int, root: int, segments: int, chunks: int, body: list[Step], fallback: Schedule) -> Schedule:
    """Surround `body`, in which only the root's vector is read by others, with what makes that safe."""
    if size == 1:
        return fallback
    peers = peers_of(rank, size)
    if rank == root:
        steps = [Step(Kind.EXPOSE, peer) for peer in peers] + [FENCE, *body] + [Step(Kind.RECV, peer) for peer in peers]
    else:
        steps = [Step(Kind.ATTACH, root), FENCE, *body, FENCE, Step(Kind.SEND, root)]
    return Schedule(op, "direct", rank, size, chunks, segments, tuple(steps), root=root, fallback=fallback)
