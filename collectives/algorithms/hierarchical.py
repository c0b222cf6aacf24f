"""Hierarchical: fold on the host, a ring between the hosts, spread on the host. Only one copy of a byte crosses the network.

Words: h hosts, in any grouping of the n ranks. The smallest host has m ranks, and the first m ranks of every host are its carriers: carrier j
talks to the carriers j of the next and the previous host only, and carries a slice of the vector, so that m ranks drive a host's network at once.
Where all hosts have equally many ranks, all are carriers.

With a vector of S bytes: all_reduce takes 2(h - 1) steps between hosts and 2 on them, and 2S(h - 1)/h bytes leave each host;
reduce_scatter and all_gather take half of each, with one step more on the host for those that are not carriers; broadcast and reduce are chains of
h - 1 steps and S bytes between the hosts. The flat ring's steps between neighbours would all be as slow as the network: 2(n - 1) of them.

Every chunk is folded along one tree (on a host: the carrier's own, then the others in order; then from host to host), so all ranks hold the
same bits.

Thakur, Rabenseifner and Gropp, IJHPCA 19(1), 2005, for the parts; Jia et al., "Highly scalable deep learning training system with
mixed-precision", arXiv:1807.11205, 2018, for their composition.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ringfold.collectives.algorithms.direct import own_chunk
from ringfold.collectives.algorithms.ring import segment_groups
from ringfold.collectives.cost import Cost, Pair, Topology
from ringfold.collectives.schedule import ROOTED, Block, Buffer, Kind, Schedule, Step

__all__ = ["all_gather", "all_reduce", "broadcast", "cost", "reduce", "reduce_scatter"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is among the hosts: the ranks of each host, this rank's host and its place on it."""

    groups: tuple[tuple[int, ...], ...]
    rank: int
    host: int
    local: int

    @classmethod
    def of(cls, rank: int, hosts: Sequence[int]) -> Place:
        groups = groups_of(hosts)
        host = next(index for index, group in enumerate(groups) if rank in group)
        return cls(groups, rank, host, groups[host].index(rank))

    @property
    def n_hosts(self) -> int:
        return len(self.groups)

    @property
    def n_carriers(self) -> int:
        return min(map(len, self.groups))

    @property
    def is_carrier(self) -> bool:
        return self.local < self.n_carriers

    @property
    def neighbours(self) -> list[int]:
        """The other ranks of this host, beginning behind this one."""
        group = self.groups[self.host]
        return [group[(self.local + distance) % len(group)] for distance in range(1, len(group))]

    @property
    def before(self) -> int:
        """The carrier of the same slice on the host before."""
        return self.groups[(self.host - 1) % self.n_hosts][self.local]

    @property
    def behind(self) -> int:
        """The carrier of the same slice on the next host."""
        return self.groups[(self.host + 1) % self.n_hosts][self.local]

    def carrier(self, slice_: int) -> int:
        """Return who carries a slice on this host."""
        return self.groups[self.host][slice_]

    def chunks_of(self, host: int, slice_: int) -> list[int]:
        """Return the ranks of a host whose own chunk goes in a slice."""
        return list(self.groups[host % self.n_hosts][slice_ :: self.n_carriers])


def groups_of(hosts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the ranks of each host, hosts in the order in which they first appear."""
    return tuple(tuple(rank for rank, of in enumerate(hosts) if of == host) for host in dict.fromkeys(hosts))


def all_reduce(rank: int, size: int, segments: int, hosts: Sequence[int]) -> Schedule:
    """Return the all_reduce in place in OUTPUT: m slices of h chunks each."""
    place = Place.of(rank, hosts)
    n_hosts, slices = place.n_hosts, place.n_carriers
    mine = range(place.local * n_hosts, (place.local + 1) * n_hosts) if place.is_carrier else range(0)
    folded: list[list[Step]] = []
    spread: list[list[Step]] = []
    for group in segment_groups(segments):
        steps: list[Step] = []
        for peer in place.neighbours:
            for s in group:
                if peer in place.groups[place.host][:slices]:
                    theirs = place.groups[place.host].index(peer) * n_hosts
                    steps.extend(Step(Kind.SEND, peer, src=Block(Buffer.OUTPUT, chunk, s)) for chunk in range(theirs, theirs + n_hosts))
                for chunk in mine:
                    own = Block(Buffer.OUTPUT, chunk, s)
                    steps.append(Step(Kind.RECV_REDUCE, peer, src=own, dst=own, final=n_hosts == 1 and peer == place.neighbours[-1]))
        for hop in range(n_hosts - 1 if place.is_carrier else 0):
            sent, received = mine[(place.host - 1 - hop) % n_hosts], mine[(place.host - 2 - hop) % n_hosts]
            for s in group:
                own = Block(Buffer.OUTPUT, received, s)
                steps.append(Step(Kind.SEND, place.behind, src=Block(Buffer.OUTPUT, sent, s)))
                steps.append(Step(Kind.RECV_REDUCE, place.before, src=own, dst=own, final=hop == n_hosts - 2))
        for hop in range(n_hosts - 1 if place.is_carrier else 0):
            sent, received = mine[(place.host - hop) % n_hosts], mine[(place.host - 1 - hop) % n_hosts]
            for s in group:
                steps.append(Step(Kind.SEND, place.behind, src=Block(Buffer.OUTPUT, sent, s)))
                steps.append(Step(Kind.RECV, place.before, dst=Block(Buffer.OUTPUT, received, s)))
        folded.append(steps)
        spread.append([step for s in group for step in _spread(place, range(slices * n_hosts), n_hosts, s)])
    return Schedule("all_reduce", "hierarchical", rank, size, slices * n_hosts, segments, _one_behind(folded, spread))


def reduce_scatter(rank: int, size: int, segments: int, hosts: Sequence[int]) -> Schedule:
    """Return the schedule that folds chunk `rank` of every INPUT into OUTPUT; carriers hold partial folds in SCRATCH."""
    place = Place.of(rank, hosts)
    n_hosts, slices = place.n_hosts, place.n_carriers
    steps: list[Step] = []
    for group in segment_groups(segments):
        for hop in range(1, n_hosts + 1):  # the host before this one first: its chunks have the longest way to go
            for slice_ in range(slices):
                for chunk in place.chunks_of(place.host - hop, slice_):
                    is_last = n_hosts == 1
                    for s in group:
                        own = Block(Buffer.INPUT, chunk, s)
                        if place.carrier(slice_) != rank:
                            steps.append(Step(Kind.SEND, place.carrier(slice_), src=own))
                            continue
                        target = Block(Buffer.OUTPUT if is_last and chunk == rank else Buffer.SCRATCH, chunk, s)
                        for peer in place.neighbours:
                            held = own if peer == place.neighbours[0] else target
                            final = is_last and peer == place.neighbours[-1]
                            steps.append(Step(Kind.RECV_REDUCE, peer, src=held, dst=target, final=final))
        held_in = Buffer.SCRATCH if place.neighbours else Buffer.INPUT
        for hop in range(n_hosts - 1 if place.is_carrier else 0):
            is_last = hop == n_hosts - 2
            for chunk in place.chunks_of(place.host - 1 - hop, place.local):
                source = held_in if hop == 0 else Buffer.SCRATCH
                steps.extend(Step(Kind.SEND, place.behind, src=Block(source, chunk, s)) for s in group)
            for chunk in place.chunks_of(place.host - 2 - hop, place.local):
                target_in = Buffer.OUTPUT if is_last and chunk == rank else Buffer.SCRATCH
                for s in group:
                    own, target = Block(held_in, chunk, s), Block(target_in, chunk, s)
                    steps.append(Step(Kind.RECV_REDUCE, place.before, src=own, dst=target, final=is_last))
        for slice_ in range(slices):
            for chunk in place.chunks_of(place.host, slice_):
                carrier = place.carrier(slice_)
                if carrier == rank != chunk:
                    steps.extend(Step(Kind.SEND, chunk, src=Block(Buffer.SCRATCH, chunk, s)) for s in group)
                elif carrier != rank == chunk:
                    steps.extend(Step(Kind.RECV, carrier, dst=Block(Buffer.OUTPUT, chunk, s)) for s in group)
    if size == 1:
        steps.extend(own_chunk(rank, segments))
    slots = 1 + max((step.dst.chunk for step in steps if step.dst is not None and step.dst.buffer is Buffer.SCRATCH), default=-1)
    return Schedule("reduce_scatter", "hierarchical", rank, size, size, segments, tuple(steps), scratch_chunks=slots)


def all_gather(rank: int, size: int, segments: int, hosts: Sequence[int]) -> Schedule:
    """Return the all_gather: own chunks to everyone on the host, then each host's chunks around the ring, spread where they arrive."""
    place = Place.of(rank, hosts)
    steps: list[Step] = []
    for group in segment_groups(segments):
        for peer in place.neighbours:
            steps.extend(Step(Kind.SEND, peer, src=Block(Buffer.INPUT, rank, s)) for s in group)
            steps.extend(Step(Kind.RECV, peer, dst=Block(Buffer.OUTPUT, peer, s)) for s in group)
        for hop in range(place.n_hosts - 1):
            sent, received = place.host - hop, place.host - 1 - hop
            if place.is_carrier:
                for chunk in place.chunks_of(sent, place.local):
                    source = Buffer.INPUT if chunk == rank else Buffer.OUTPUT
                    steps.extend(Step(Kind.SEND, place.behind, src=Block(source, chunk, s)) for s in group)
                for chunk in place.chunks_of(received, place.local):
                    steps.extend(Step(Kind.RECV, place.before, dst=Block(Buffer.OUTPUT, chunk, s)) for s in group)
            for slice_ in range(place.n_carriers):
                for chunk in place.chunks_of(received, slice_):
                    for s in group:
                        steps.extend(_from_carrier(place, place.carrier(slice_), Block(Buffer.OUTPUT, chunk, s)))
    return Schedule("all_gather", "hierarchical", rank, size, size, segments, tuple(steps + own_chunk(rank, segments)))


def broadcast(rank: int, size: int, root: int, segments: int, hosts: Sequence[int]) -> Schedule:
    """Return the broadcast in OUTPUT of m slices (chunks): the root's to the carriers of its host, from host to host, spread on each."""
    place, at_root = Place.of(rank, hosts), Place.of(root, hosts)
    slices, first = place.n_carriers, at_root.host
    steps: list[Step] = []
    for s in range(segments):
        for slice_ in range(slices):
            block, carrier = Block(Buffer.OUTPUT, slice_, s), place.carrier(slice_)
            if rank == carrier:
                if rank != root:
                    steps.append(Step(Kind.RECV, root if place.host == first else place.before, dst=block))
                if (place.host + 1) % place.n_hosts != first:
                    steps.append(Step(Kind.SEND, place.behind, src=block))
                steps.extend(Step(Kind.SEND, peer, src=block) for peer in place.neighbours if peer != root)
            elif rank == root:
                steps.append(Step(Kind.SEND, carrier, src=block))
            else:
                steps.append(Step(Kind.RECV, carrier, dst=block))
    return Schedule("broadcast", "hierarchical", rank, size, slices, segments, tuple(steps), root=root)


def reduce(rank: int, size: int, root: int, segments: int, hosts: Sequence[int]) -> Schedule:
    """Return the reduce of m slices (chunks): each host's carriers fold it, from host to host, and those of the root's host send it there."""
    place, at_root = Place.of(rank, hosts), Place.of(root, hosts)
    last = at_root.host
    steps: list[Step] = []
    for s in range(segments):
        for slice_ in range(place.n_carriers):
            own, carrier = Block(Buffer.INPUT, slice_, s), place.carrier(slice_)
            if rank != carrier:
                steps.append(Step(Kind.SEND, carrier, src=own))
                if rank == root:
                    steps.append(Step(Kind.RECV, carrier, dst=Block(Buffer.OUTPUT, slice_, s)))
                continue
            target = Block(Buffer.OUTPUT if rank == root else Buffer.SCRATCH, slice_, s)
            sources = list(place.neighbours)
            if place.n_hosts > 1 and (place.host - 1) % place.n_hosts != last:
                sources.append(place.before)  # of the chain that begins behind the root's host
            for peer in sources:
                held = own if peer == sources[0] else target
                steps.append(Step(Kind.RECV_REDUCE, peer, src=held, dst=target, final=place.host == last and peer == sources[-1]))
            if place.host != last:
                steps.append(Step(Kind.SEND, place.behind, src=target if sources else own))
            elif rank != root:
                steps.append(Step(Kind.SEND, root, src=target))
    slots = 1 + max((step.dst.chunk for step in steps if step.dst is not None and step.dst.buffer is Buffer.SCRATCH), default=-1)
    return Schedule("reduce", "hierarchical", rank, size, place.n_carriers, segments, tuple(steps), scratch_chunks=slots, root=root)


def cost(op: str, topology: Topology, nbytes: int, segments: int) -> Cost:
    """Return what an operation on a vector of `nbytes` costs the busiest rank, with root 0; hosts and network are busy at the same time."""
    if topology.size == 1:
        return Cost(0, 0, 0.0)
    groups = groups_of(topology.hosts)
    hops, slices, largest = len(groups) - 1, min(map(len, groups)), max(map(len, groups))
    chunks, traffic = _traffic(op, topology.hosts)
    # On the largest host: to the carriers, and from them to all, or to those that are not carriers.
    outer = {"all_reduce": True, "broadcast": slices > 1, "reduce": slices > 1}.get(op, slices < largest)
    on_host = (1 + outer) * (largest > 1)
    between = 2 * hops if op == "all_reduce" else hops
    # A ring has all segments of some chunk under way at any time; a chain fills first.
    fill = (between + segments - 1) / segments if op in ("broadcast", "reduce") and hops else 1.0
    part = nbytes / slices
    ring_folds = hops / (hops + 1) if op != "reduce" else min(1, hops)
    folded = (largest - 1 + ring_folds) * part if op in ("all_reduce", "reduce_scatter", "reduce") else 0.0
    seconds = topology.seconds(traffic, fill * nbytes / chunks, rounds=between, messages=between * segments, folded_nbytes=folded)
    seconds += topology.near.latency_s(on_host, on_host * (largest - 1) * segments)
    sent: Counter[int] = Counter()
    for (sender, _), times in traffic.items():
        sent[sender] += times
    return Cost(on_host + between, round(max(sent.values()) * nbytes / chunks), seconds)


@lru_cache(maxsize=64)
def _traffic(op: str, hosts: tuple[int, ...]) -> tuple[int, Counter[Pair]]:
    """Return the number of chunks of an operation, and how many of them each rank sends to each other one: read off the schedules."""
    builders: dict[str, Callable[..., Schedule]] = {
        "all_reduce": all_reduce,
        "reduce_scatter": reduce_scatter,
        "all_gather": all_gather,
        "broadcast": broadcast,
        "reduce": reduce,
    }
    size, traffic, chunks = len(hosts), Counter[Pair](), 1
    for rank in range(size):
        schedule = builders[op](rank, size, *([0] if op in ROOTED else []), 1, hosts)
        chunks = schedule.chunks
        traffic.update((rank, step.peer) for step in schedule.steps if step.kind is Kind.SEND)
    return chunks, traffic


def _from_carrier(place: Place, carrier: int, block: Block) -> list[Step]:
    """Pass a block from the carrier that has it to every other rank of the host."""
    if place.rank == carrier:
        return [Step(Kind.SEND, peer, src=block) for peer in place.neighbours]
    return [Step(Kind.RECV, carrier, dst=block)]


def _spread(place: Place, chunks: range, per_slice: int, segment: int) -> list[Step]:
    return [step for chunk in chunks for step in _from_carrier(place, place.carrier(chunk // per_slice), Block(Buffer.OUTPUT, chunk, segment))]


def _one_behind(first: list[list[Step]], then: list[list[Step]]) -> tuple[Step, ...]:
    """Put each group's second part behind the next group's first, so that the host works while the network does."""
    steps: list[Step] = []
    for turn in range(len(first) + 1):
        steps += first[turn] if turn < len(first) else []
        steps += then[turn - 1] if turn > 0 else []
    return tuple(steps)
