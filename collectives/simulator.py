"""Run the schedules of all ranks in one process without a transport, and find what could go wrong.

`simulate` keeps the executor's rules (the same queues, the same `dependencies()`) and is stricter where the executor has slack: a send
completes only together with its receive, so what passes needs no buffering. Memory is symbolic. A cell (one segment of one chunk)
holds which ranks' contributions were folded into it, and in which order; nothing depends on an element count, so one run proves a
schedule for all counts.

Races are found by happens-before: every step knows the set of steps that are certainly complete before it begins (through queues,
dependencies and messages; a receive comes after its send, but not the other way round). Two accesses to a cell, one of them
writing, must be ordered by it, whichever rank they come from. One race-free run therefore stands for all orders of execution.

What an operation promises of the result is promise.py's to check. No byte is moved, and no transport known.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ringfold.collectives.schedule import (
    LOCAL_QUEUE,
    REDUCING,
    Block,
    Buffer,
    Kind,
    Queue,
    Schedule,
    ScheduleError,
    Step,
)
from ringfold.collectives.vectors import Cell, Vectors

__all__ = ["Contents", "Order", "SimulationResult", "ranks_text", "simulate", "title"]

Order = int | tuple["Order", "Order"]  # a rank's own contribution, or the fold of two

# Which operands a kind has: peer, src, dst. SEND and RECV may lack their block: an empty frame; FOLD may lack its peer.
OPERANDS = {
    Kind.SEND: (True, None, False),
    Kind.RECV: (True, False, None),
    Kind.RECV_REDUCE: (True, True, True),
    Kind.COPY: (False, True, True),
    Kind.EXPOSE: (True, False, False),
    Kind.ATTACH: (True, False, False),
    Kind.FOLD: (None, False, True),
    Kind.PULL: (True, False, True),
    Kind.FENCE: (False, False, False),
    Kind.REDUCE: (False, True, True),
}


@dataclass(frozen=True, slots=True)
class Contents:
    """What a cell holds: the ranks folded into it (a bit each), in which order, and whether the fold was marked final."""

    ranks: int
    order: Order
    final: bool = False


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """What a simulated operation did.

    sent: the elements that each rank sent. rounds: the length of the longest chain of messages of which each waits for the one before.
    trace: every (rank, step, sender, sender's step) in the order of execution, sender -1 for a local step. outputs: by rank, what
    OUTPUT holds at (chunk, segment).
    """

    sent: tuple[int, ...]
    rounds: int
    trace: tuple[tuple[int, int, int, int], ...]
    outputs: tuple[dict[tuple[int, int], Contents], ...]


def simulate(
    schedules: Sequence[Schedule], count: int | Sequence[int], align: int = 1, *, in_place: bool = False, read_only: bool = False
) -> SimulationResult:
    """Run one operation on all ranks, on a vector of `count` elements (or chunks of the given lengths; of an all_to_all, of every
    rank's chunks one rank after the other).

    With `in_place`, the own chunk of reduce_scatter, all_gather, gather and scatter is the same memory in INPUT and OUTPUT. With `read_only`,
    a peer's vector is not in registered memory: it can be read, but not written.

    Raises:
        ScheduleError: a malformed step, a deadlock, an unmatched send, a wrong pair of blocks, a contribution folded twice, a read
            of what was never written, a written INPUT, or a race.
    """
    run = _Run(schedules, in_place, read_only)
    run.execute()
    lengths = run.vectors.lengths(count, align)
    sent = [sum(lengths[chunk][segment] for chunk, segment in blocks) for blocks in run.sent]
    return SimulationResult(tuple(sent), max(run.depth, default=0), tuple(run.trace), tuple(run.outputs()))


class _Run:
    """One execution: queues, clocks and memory of all ranks."""

    def __init__(self, schedules: Sequence[Schedule], in_place: bool, read_only: bool) -> None:
        self.schedules, self.size, self.read_only = schedules, len(schedules), read_only
        first = schedules[0]
        self.vectors = Vectors(first, in_place)
        for rank, schedule in enumerate(schedules):
            for name, seen, expected in [
                ("rank", schedule.rank, rank),
                ("size", schedule.size, self.size),
                *((name, getattr(schedule, name), getattr(first, name)) for name in ("op", "algorithm", "chunks", "segments", "root")),
            ]:
                if seen != expected:
                    raise ScheduleError(f"{title(schedules)}: schedule {rank} has {name} {seen}, expected {expected}")
            for index in range(len(schedule.steps)):
                self.check_form(rank, index)
        self.base = [sum(len(s.steps) for s in schedules[:rank]) for rank in range(self.size)]
        total = sum(len(s.steps) for s in schedules)
        self.before = [0] * total  # bit k: step k (of all ranks, counted through) is complete before this one begins
        self.depth = [0] * total
        self.needed = [schedule.dependencies() for schedule in schedules]
        self.missing = [[len(needed) for needed in of_rank] for of_rank in self.needed]
        self.waiting: list[list[list[int]]] = [[[] for _ in schedule.steps] for schedule in schedules]
        self.queues: list[dict[Queue, list[int]]] = [{} for _ in schedules]  # the steps not begun, in reverse
        for rank, schedule in enumerate(schedules):
            for index in reversed(range(len(schedule.steps))):
                self.queues[rank].setdefault(schedule.steps[index].queue, []).append(index)
                for earlier in self.needed[rank][index]:
                    self.waiting[rank][earlier].append(index)
        self.tail: list[dict[Queue, int]] = [{} for _ in schedules]  # the last step of each queue that is complete
        self.memory = {cell: Contents(1 << rank, rank) for rank, cell in self.vectors.inputs()}
        self.writer: dict[Cell, int] = {}
        self.readers: dict[Cell, list[int]] = {}
        self.attached: dict[tuple[int, int], int] = {}
        self.visits: list[tuple[int, int, int]] = []  # rank, step, and the other rank whose memory it touched
        self.sent: list[list[tuple[int, int]]] = [[] for _ in schedules]
        self.trace: list[tuple[int, int, int, int]] = []

    def outputs(self) -> Iterator[dict[tuple[int, int], Contents]]:
        """Yield what OUTPUT of each rank holds, by chunk and segment."""
        for rank in range(self.size):
            yield {place: self.memory[cell] for place, cell in self.vectors.outputs(rank).items() if cell in self.memory}

    def error(self, rank: int, index: int, what: str) -> ScheduleError:
        return ScheduleError(f"{title(self.schedules)}: rank {rank}, step {index} ({self.schedules[rank].steps[index]}): {what}")

    def check_form(self, rank: int, index: int) -> None:
        """Refuse a step whose operands or flags its kind does not have, or whose peer or blocks do not exist."""
        step = self.schedules[rank].steps[index]
        for name, wanted, present in zip(("peer", "src", "dst"), OPERANDS[step.kind], (step.peer != -1, step.src, step.dst), strict=True):
            if wanted is not None and wanted != bool(present):
                raise self.error(rank, index, f"a {step.kind.name} {'needs a' if wanted else 'has no'} {name}")
        if step.peer != -1 and (not 0 <= step.peer < self.size or step.peer == rank):
            raise self.error(rank, index, f"the peer must be another rank below {self.size}")
        if (step.final and step.kind not in REDUCING) or (step.spread and step.kind is not Kind.FOLD):
            raise self.error(rank, index, "only a fold can be final, only a FOLD spread")
        for block in (step.src, step.dst):
            why = None if block is None else self.vectors.why_absent(rank, block, self.schedules[rank].scratch_chunks)
            if why is not None:
                raise self.error(rank, index, f"{block} does not exist: {why}")

    # Execution.

    def execute(self) -> None:
        """Run heads of queues until none is ready, then see that nothing is left and that nobody left too early."""
        ready = [(rank, queue) for rank in range(self.size) for queue in self.queues[rank]]
        while ready:
            rank, queue = ready.pop()
            if not self.is_ready(rank, queue):
                continue
            index = self.queues[rank][queue][-1]
            if queue == LOCAL_QUEUE:
                self.begin(rank, index)
                self.run_local(rank, index)
                self.trace.append((rank, index, -1, -1))
                ready.extend(self.complete(rank, index))
                continue
            peer = queue[1]
            other: Queue = ("receive" if queue[0] == "send" else "send", rank)
            if not self.is_ready(peer, other):
                continue
            partner = self.queues[peer][other][-1]
            (sender, sending), (receiver, receiving) = ((rank, index), (peer, partner))[:: 1 if queue[0] == "send" else -1]
            self.run_message(sender, sending, receiver, receiving)
            self.trace.append((receiver, receiving, sender, sending))
            ready.extend(self.complete(rank, index))
            ready.extend(self.complete(peer, partner))
        self.check_nothing_left()
        self.check_visits()

    def is_ready(self, rank: int, queue: Queue) -> bool:
        steps = self.queues[rank].get(queue)
        return bool(steps) and self.missing[rank][steps[-1]] == 0  # type: ignore[index]

    def begin(self, rank: int, index: int, *after: int) -> int:
        """Note what is certainly complete before this step: its dependencies, the step before it in its queue, and `after`."""
        base = self.base[rank]
        causes = [base + earlier for earlier in self.needed[rank][index]]
        previous = self.tail[rank].get(self.schedules[rank].steps[index].queue)
        if previous is not None:
            causes.append(previous)
        causes.extend(after)
        before, depth = 0, 0
        for cause in causes:
            before |= self.before[cause] | 1 << cause
            depth = max(depth, self.depth[cause])
        step = base + index
        self.before[step], self.depth[step] = before, depth
        return step

    def complete(self, rank: int, index: int) -> Iterable[tuple[int, Queue]]:
        """Take a step off its queue and return the queues whose head may now be ready."""
        queue = self.schedules[rank].steps[index].queue
        self.queues[rank][queue].pop()
        self.tail[rank][queue] = self.base[rank] + index
        yield rank, queue
        for later in self.waiting[rank][index]:
            self.missing[rank][later] -= 1
            yield rank, self.schedules[rank].steps[later].queue

    def run_message(self, sender: int, sending: int, receiver: int, receiving: int) -> None:
        sent, received = self.schedules[sender].steps[sending], self.schedules[receiver].steps[receiving]
        origin = self.begin(sender, sending)
        here = self.begin(receiver, receiving, origin)
        self.depth[here] = max(self.depth[here], self.depth[origin] + 1)
        if (sent.kind is Kind.EXPOSE) != (received.kind is Kind.ATTACH):
            raise self.error(receiver, receiving, f"meets step {sending} of rank {sender} ({sent})")
        if received.kind is Kind.ATTACH:
            self.attached[receiver, sender] = here
            return
        if (sent.src is None) != (received.dst is None):
            raise self.error(receiver, receiving, f"one side has no block: step {sending} of rank {sender} is {sent}")
        if sent.src is None or received.dst is None:
            return
        shape = self.vectors.shape(sender, sent.src)
        if shape != self.vectors.shape(receiver, received.dst):
            raise self.error(receiver, receiving, f"the blocks do not match: step {sending} of rank {sender} is {sent}")
        self.sent[sender].append(shape)
        contents = self.read(sender, sending, self.vectors.cell(sender, sent.src))
        if received.src is not None:
            contents = self.fold(receiver, receiving, self.own(receiver, receiving, received), contents)
        self.write(receiver, receiving, self.vectors.cell(receiver, received.dst), contents)

    def run_local(self, rank: int, index: int) -> None:
        step = self.schedules[rank].steps[index]
        if step.dst is None:
            return
        target = self.vectors.cell(rank, step.dst)
        if step.kind is Kind.COPY:
            if step.src is None or target == self.vectors.cell(rank, step.src):
                return  # onto itself: the executor copies nothing
            contents = self.own(rank, index, step)
        elif step.kind is Kind.REDUCE:
            contents = self.fold(rank, index, self.read(rank, index, target), self.own(rank, index, step))
        elif step.kind is Kind.PULL:
            contents = self.read(rank, index, self.cell_of_peer(rank, index, step.peer, step.dst))
        else:  # a FOLD
            places = [self.cell_of_peer(rank, index, other, step.dst) for other in range(self.size)]
            contents = self.read(rank, index, places[0])
            for place in places[1:]:
                contents = self.fold(rank, index, contents, self.read(rank, index, place))
            if self.read_only and (step.spread or step.peer != -1):
                raise self.error(rank, index, "writes into the vector of a peer, which may lie outside registered memory")
            targets = places if step.spread else [target if step.peer == -1 else places[step.peer]]
            for place in targets:
                self.write(rank, index, place, contents)
            return
        self.write(rank, index, target, contents)

    def own(self, rank: int, index: int, step: Step) -> Contents:
        """Read a step's src, which must have the shape of its dst."""
        if step.src is None or step.dst is None or self.vectors.shape(rank, step.src) != self.vectors.shape(rank, step.dst):
            raise self.error(rank, index, "src and dst are blocks of different shape")
        return self.read(rank, index, self.vectors.cell(rank, step.src))

    def cell_of_peer(self, rank: int, index: int, other: int, block: Block) -> Cell:
        """Return where `other` exposes a block; this rank must have attached to it before."""
        cell = self.vectors.exposed(rank, other, block)
        if cell is None:
            raise self.error(rank, index, f"rank {other} does not expose what belongs there")
        if other != rank:
            attached = self.attached.get((rank, other))
            if attached is None or not self.before[self.base[rank] + index] >> attached & 1:
                raise self.error(rank, index, f"does not wait for the ATTACH to rank {other}")
            self.visits.append((rank, index, other))
        return cell

    # Memory.

    def read(self, rank: int, index: int, cell: Cell) -> Contents:
        contents = self.memory.get(cell)
        if contents is None:
            raise self.error(rank, index, f"reads {_place(cell)}, which was never written")
        self.check_order(rank, index, cell, [self.writer[cell]] if cell in self.writer else [])
        self.readers.setdefault(cell, []).append(self.base[rank] + index)
        return contents

    def write(self, rank: int, index: int, cell: Cell, contents: Contents) -> None:
        if cell[1] is Buffer.INPUT:
            raise self.error(rank, index, f"modifies {_place(cell)}: INPUT must not be modified")
        earlier = self.readers.get(cell, [])
        self.check_order(rank, index, cell, [*earlier, self.writer[cell]] if cell in self.writer else earlier)
        self.readers[cell] = []
        self.writer[cell] = self.base[rank] + index
        marked = self.schedules[rank].steps[index].final
        self.memory[cell] = Contents(contents.ranks, contents.order, True) if marked else contents

    def check_order(self, rank: int, index: int, cell: Cell, earlier: Iterable[int]) -> None:
        here = self.base[rank] + index
        before = self.before[here]
        for step in earlier:
            if step != here and not before >> step & 1:
                other = bisect_right(self.base, step) - 1
                where = step - self.base[other]
                raise self.error(rank, index, f"races with step {where} of rank {other} ({self.schedules[other].steps[where]}) on {_place(cell)}")

    def fold(self, rank: int, index: int, left: Contents, right: Contents) -> Contents:
        twice = left.ranks & right.ranks
        if twice:
            raise self.error(rank, index, f"folds the contribution of {ranks_text(twice)} twice")
        if left.final or right.final:
            raise self.error(rank, index, "folds into a block that was already final")
        return Contents(left.ranks | right.ranks, (left.order, right.order))

    # The end.

    def check_nothing_left(self) -> None:
        """Refuse an execution in which some queue did not come to its end, and say for every such queue what its head waits for."""
        done = {(rank, index) for event in self.trace for rank, index in (event[:2], event[2:])}
        stuck = []
        for rank, queues in enumerate(self.queues):
            for (side, peer), steps in queues.items():
                if not steps:
                    continue
                index = steps[-1]
                verb = "receive" if side == "send" else "send"
                if self.missing[rank][index]:
                    why = f"waits for its steps {[earlier for earlier in self.needed[rank][index] if (rank, earlier) not in done]}"
                elif self.queues[peer].get((verb, rank)):
                    why = f"rank {peer} is not ready to {verb}"
                else:
                    why = f"rank {peer} never {verb}s it"
                stuck.append(f"rank {rank} is at step {index} ({self.schedules[rank].steps[index]}): {why}")
        if stuck:
            what = "unmatched send or receive" if any(" never " in line for line in stuck) else "deadlock"
            more = [f"and {len(stuck) - 20} more"] if len(stuck) > 20 else []
            raise ScheduleError("\n  ".join([f"{title(self.schedules)}: {what}", *stuck[:20], *more]))

    def known_at_end(self, rank: int) -> int:
        """Return the set of steps, of all ranks, that are complete when this rank's operation is."""
        known = 0
        for step in self.tail[rank].values():
            known |= self.before[step] | 1 << step
        return known

    def check_visits(self) -> None:
        """See that every rank stays until the others have let go of its vector, and, in a barrier, until all have come."""
        ends = [self.known_at_end(rank) for rank in range(self.size)]
        for rank, index, other in self.visits:
            if not ends[other] >> (self.base[rank] + index) & 1:
                raise self.error(rank, index, f"touches the vector of rank {other}, which does not wait for that before it ends")
        if self.schedules[0].op == "barrier":
            for rank in range(self.size):
                of_rank = ((1 << len(self.schedules[rank].steps)) - 1) << self.base[rank]
                early = [other for other in range(self.size) if other != rank and not ends[other] & of_rank]
                if early:
                    raise ScheduleError(f"{title(self.schedules)}: rank {early[0]} may leave before rank {rank} has come")


def title(schedules: Sequence[Schedule]) -> str:
    first = schedules[0]
    return f"{first.op} ({first.algorithm}) of {len(schedules)} ranks, {first.chunks} chunks of {first.segments} segments"


def _place(cell: Cell) -> str:
    rank, buffer, chunk, segment = cell
    return f"{Block(buffer, chunk, segment)} of rank {rank}"


def ranks_text(mask: int) -> str:
    ranks = [rank for rank in range(mask.bit_length()) if mask >> rank & 1]
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks))}"
