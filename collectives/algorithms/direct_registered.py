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

from collections.abc import Sequence
from dataclasses import replace

from ringfold.collectives.algorithms import direct, ring
from ringfold.collectives.algorithms.direct import own_chunk, peers_of
from ringfold.collectives.cost import Cost, Topology
from ringfold.collectives.schedule import ROOTED, Block, Buffer, Kind, Schedule, Step

__all__ = ["all_gather", "all_reduce", "all_to_all", "broadcast", "cost", "gather", "reduce", "reduce_scatter", "remote_seconds", "scatter"]

FENCE = Step(Kind.FENCE)


def all_reduce(rank: int, size: int, segments: int, fallback: str) -> Schedule:
    """Return the registered all_reduce, in place in OUTPUT."""
    peers = peers_of(rank, size)
    folds = _folds(Block(Buffer.OUTPUT, rank, 0), segments)
    spread = [replace(fold, spread=True) for fold in folds]
    # A peer may still be folding from the chunk that is pulled into: first they meet.
    remote = [*folds, *_meet(peers), FENCE, *_pull_chunks(rank, size, segments), *_meet(peers)]
    return _registered(direct.all_reduce(rank, size, segments), fallback, [*_introduce(peers), *spread, *_meet(peers)], remote)


def reduce_scatter(rank: int, size: int, segments: int, fallback: str) -> Schedule:
    """Return the registered reduce_scatter: chunk `rank` of every exposed INPUT is folded into OUTPUT."""
    peers = peers_of(rank, size)
    steps = [*_introduce(peers), *_folds(Block(Buffer.OUTPUT, rank, 0), segments), *_meet(peers)]
    return _registered(direct.reduce_scatter(rank, size, segments), fallback, steps)


def reduce(rank: int, size: int, root: int, segments: int, fallback: str) -> Schedule:
    """Return the registered reduce: each rank folds its chunk of every exposed INPUT into the root's, which is the root's OUTPUT."""
    peers, is_root = peers_of(rank, size), rank == root
    exchange = direct.reduce(rank, size, root, segments)
    if is_root:
        folds = _folds(Block(Buffer.OUTPUT, rank, 0), segments)
        arriving = [Step(Kind.RECV, peer, dst=Block(Buffer.OUTPUT, peer, s)) for s in range(segments) for peer in peers]
        remote = [*folds, *arriving, *_dismiss(peers)]
    else:
        folds = [replace(fold, peer=root) for fold in _folds(Block(Buffer.INPUT, rank, 0), segments)]
        slot = Block(Buffer.SCRATCH, rank, 0)
        leaving = [Step(Kind.SEND, root, src=replace(slot, segment=s)) for s in range(segments)]
        remote = [*_folds(slot, segments), *leaving, Step(Kind.RECV, root)]
    return _registered(exchange, fallback, [*_introduce(peers), *folds, *_meet(peers)], remote, slots=0 if is_root else rank + 1)


def all_gather(rank: int, size: int, segments: int, fallback: str) -> Schedule:
    """Return the registered all_gather: each rank pulls the exposed INPUT chunk of every other."""
    peers = peers_of(rank, size)
    steps = [*_introduce(peers), *_pull_chunks(rank, size, segments), *own_chunk(rank, segments), *_meet(peers)]
    return _registered(direct.all_gather(rank, size, segments), fallback, steps)


def all_to_all(rank: int, size: int, fallback: str) -> Schedule:
    """Return the registered all_to_all: each rank pulls from every other the INPUT chunk that is exposed to it."""
    peers = peers_of(rank, size)
    steps = [*_introduce(peers), *_pull_chunks(rank, size, 1), *own_chunk(rank, 1), *_meet(peers)]
    return _registered(direct.all_to_all(rank, size), fallback, steps)


def broadcast(rank: int, size: int, root: int, segments: int, fallback: str) -> Schedule:
    """Return the registered broadcast: all pull the root's exposed vector (one chunk, in OUTPUT)."""
    pulls = [] if rank == root else [Step(Kind.PULL, root, dst=Block(Buffer.OUTPUT, 0, s)) for s in range(segments)]
    return _registered(ring.broadcast(rank, size, root, segments), fallback, _around_root(rank, size, root, pulls))


def scatter(rank: int, size: int, root: int, segments: int, fallback: str) -> Schedule:
    """Return the registered scatter: each rank pulls its chunk of the root's exposed INPUT."""
    pulls = [Step(Kind.PULL, root, dst=Block(Buffer.OUTPUT, rank, s)) for s in range(segments)]
    body = own_chunk(rank, segments) if rank == root else pulls
    return _registered(direct.scatter(rank, size, root, segments), fallback, _around_root(rank, size, root, body))


def gather(rank: int, size: int, root: int, segments: int, fallback: str) -> Schedule:
    """Return the registered gather: the root pulls the exposed INPUT chunk of every other rank; all hear of all, to decide alike."""
    peers = peers_of(rank, size)
    steps = _introduce(peers)
    if rank == root:
        steps += [*_pull_chunks(rank, size, segments), *own_chunk(rank, segments), *_dismiss(peers)]
    else:
        steps.append(Step(Kind.RECV, root))
    return _registered(direct.gather(rank, size, root, segments), fallback, steps)


def cost(op: str, topology: Topology, nbytes: int) -> Cost:
    """Return what an operation on a vector of `nbytes` (all chunks together), all in registered memory, costs the busiest rank."""
    size, link = topology.size, topology.near
    others = size - 1
    if others == 0:
        return Cost(0, 0, 0.0)
    # Operands are read by the fold itself; what else is read or written in a peer's memory: results, chunks, the root's vector.
    accessed = {"reduce_scatter": 0.0, "reduce": nbytes / size}.get(op, _read(op, size, nbytes))
    seconds = link.latency_s(2, 2 * others) + _folded(op, size, nbytes) * link.gamma_s_per_byte
    if op in ROOTED:  # the others need not wait for all: who is done with its part goes on
        seconds += link.meeting_s
    return Cost(2, 0, seconds + accessed * link.access_s_per_byte)


def remote_seconds(op: str, topology: Topology, nbytes: int, segments: int) -> float:
    """Return how long the remote fallback takes after the prelude: every read is a call of the kernel."""
    size, link = topology.size, topology.near
    others = size - 1
    chunk = nbytes / size
    # An all_reduce reads to fold, meets, and reads the others' results; a reduce sends its folds to the root.
    rounds, reads, messages = {
        "all_reduce": (2, 2 * others, 2 * others),
        "reduce": (2, others, others * segments),
        "broadcast": (1, 1, others),
        "scatter": (1, 1, others),
    }.get(op, (1, others, others))
    # Measured, 64 MiB on two cores: an all_reduce reads results that others are just writing (20 ms; the exchange 18), and where a single rank reads
    # the other core is idle (broadcast to one: 18 ms, the exchange 9.6).
    passes = {"all_reduce": 2.4, "broadcast": 2.0 if size == 2 else 1.0, "gather": 2.0}.get(op, 1.0)
    read = others * chunk if op == "reduce" else _read(op, size, nbytes) * passes
    sent = others * chunk if op == "reduce" else 0.0
    return (
        link.latency_s(rounds, messages)
        + reads * segments * link.alpha_s
        + read * link.read_s_per_byte
        + sent * link.beta_s_per_byte
        + _folded(op, size, nbytes) * link.gamma_s_per_byte
    )


def _folded(op: str, size: int, nbytes: int) -> float:
    return (size - 1) * nbytes / size if op in ("all_reduce", "reduce_scatter", "reduce") else 0.0


def _read(op: str, size: int, nbytes: int) -> float:
    """Return the bytes that the busiest rank reads, once, in its peers' vectors."""
    return {"broadcast": float(nbytes), "scatter": nbytes / size}.get(op, (size - 1) * nbytes / size)


def _introduce(peers: list[int]) -> list[Step]:
    return [Step(Kind.EXPOSE, peer) for peer in peers] + [Step(Kind.ATTACH, peer) for peer in peers] + [FENCE]


def _pull_chunks(rank: int, size: int, segments: int) -> list[Step]:
    return [Step(Kind.PULL, peer, dst=Block(Buffer.OUTPUT, peer, s)) for peer in peers_of(rank, size) for s in range(segments)]


def _meet(peers: list[int]) -> list[Step]:
    """Wait, with what came before complete, until the same can be said of all peers."""
    return [FENCE] + [Step(Kind.SEND, peer) for peer in peers] + [Step(Kind.RECV, peer) for peer in peers]


def _dismiss(peers: list[int]) -> list[Step]:
    """Tell the peers, who wait for this rank only, that what came before is complete."""
    return [FENCE] + [Step(Kind.SEND, peer) for peer in peers]


def _folds(first: Block, segments: int) -> list[Step]:
    """Fold every segment of the chunk of which `first` is the first."""
    return [Step(Kind.FOLD, dst=replace(first, segment=s), final=True) for s in range(segments)]


def _around_root(rank: int, size: int, root: int, body: list[Step]) -> list[Step]:
    """Surround `body`, in which only the root's vector is read by others, with what makes that safe."""
    peers = peers_of(rank, size)
    if rank == root:
        return [*(Step(Kind.EXPOSE, peer) for peer in peers), FENCE, *body, *(Step(Kind.RECV, peer) for peer in peers)]
    return [Step(Kind.ATTACH, root), FENCE, *body, FENCE, Step(Kind.SEND, root)]


def _registered(exchange: Schedule, fallback: str, steps: Sequence[Step], remote: Sequence[Step] | None = None, slots: int = 0) -> Schedule:
    """Return the schedule of `steps`, with the exchange or `remote` (by default the same steps) to go on with after the prelude."""
    if exchange.size == 1:
        return exchange
    registered = replace(exchange, algorithm="direct", steps=tuple(steps), scratch_chunks=0)
    if fallback == "exchange":
        return replace(registered, fallback=exchange)
    after = registered.steps[len(registered.prelude) :] if remote is None else tuple(remote)
    return replace(registered, fallback=replace(registered, steps=after, scratch_chunks=slots))
