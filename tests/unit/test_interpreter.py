"""Every schedule runs over point-to-point calls as the simulator promises, however late and in whatever order messages land."""

from __future__ import annotations

import itertools
import random
from collections import deque
from dataclasses import dataclass, field

import pytest
import torch
from ringfold.collectives.algorithms import BUILDERS, build
from ringfold.collectives.fold import FOLDS, fold
from ringfold.collectives.interpreter import ALIGN_NBYTES, REGISTERED, Execution, Plan
from ringfold.collectives.schedule import Schedule, ScheduleError, partition
from ringfold.collectives.simulator import simulate
from ringfold.collectives.transport import Request
from torch import Tensor

SCHEDULES = sorted(key for key in BUILDERS if key[2] != "registered")
SIZES = range(1, 6)
IN_PIECES = ("reduce_scatter", "all_gather", "gather", "scatter", "all_to_all")


@dataclass
class Message:
    """One half of a message: a tensor that is read, or written, at the moment of delivery and not before."""

    tensor: Tensor
    delivered: bool = False

    def test(self) -> bool:
        return self.delivered


@dataclass
class Network:
    """Messages between the ranks of one process. Sends and receives of one way and tag meet in order, and land in any."""

    random: random.Random
    sends: dict[tuple[int, int, int], deque[Message]] = field(default_factory=dict)
    receives: dict[tuple[int, int, int], deque[Message]] = field(default_factory=dict)
    met: list[tuple[Message, Message]] = field(default_factory=list)

    def deliver(self) -> bool:
        """Let one pair that has met land; False if there is none."""
        for way, sent in self.sends.items():
            expected = self.receives.get(way, deque())
            while sent and expected:
                self.met.append((sent.popleft(), expected.popleft()))
        if not self.met:
            return False
        send, receive = self.met.pop(self.random.randrange(len(self.met)))
        assert send.tensor.shape == receive.tensor.shape
        receive.tensor.copy_(send.tensor)
        send.delivered = receive.delivered = True
        return True


@dataclass
class End:
    """One rank's side of the network."""

    network: Network
    rank: int

    def isend(self, tensor: Tensor, peer: int, tag: int) -> Message:
        message = Message(tensor)
        self.network.sends.setdefault((self.rank, peer, tag), deque()).append(message)
        return message

    def irecv(self, tensor: Tensor, peer: int, tag: int) -> Message:
        tensor.fill_(99)  # nobody may count on what was there
        message = Message(tensor)
        self.network.receives.setdefault((peer, self.rank, tag), deque()).append(message)
        return message


def run(network: Network, executions: list[Execution]) -> None:
    """Advance all ranks, in any order, until they are finished; each is advanced again only after something has landed, or before."""
    while not all(execution.finished for execution in executions):
        moved = False
        for execution in network.random.sample(executions, len(executions)):
            moved = execution.advance() or moved
        landed = network.deliver()
        assert moved or landed, f"stuck: {[(e.steps_done, e.steps, e.waiting_for) for e in executions]}"
    assert not network.met
    assert not any(network.sends.values())
    assert not any(network.receives.values())


def plans_of(key: tuple[str, str, str], size: int, segments: int, root: int) -> list[Plan]:
    op, algorithm, variant = key
    hosts = tuple(rank // 2 for rank in range(size))  # of hierarchical schedules: the last host may have one rank only
    return [Plan(build(op, algorithm, variant, rank, size, segments, root, hosts=hosts)) for rank in range(size)]


def roots(op: str, size: int) -> list[int]:
    return sorted({0, size - 1}) if op in ("broadcast", "reduce", "gather", "scatter") else [-1]


def pieces_of(count: int, size: int) -> tuple[int, ...]:
    """Cut into very uneven pieces, many of them empty."""
    lengths = [0] * size
    lengths[size - 1] = count // 2
    lengths[(size - 1) // 2] += count - count // 2
    return tuple(lengths)


def requests_and_results(
    op: str, values: list[Tensor], counts: tuple[int, ...], root: int, reduction: str, shared: bool
) -> list[tuple[Request, Tensor | None]]:
    """Return for each rank its request on a copy of its values, and what its output must be in the end (None: there is none)."""
    size, count, dtype = len(values), values[0].numel(), values[0].dtype
    total = torch.stack(values).sum(0).to(dtype)
    total = torch.div(total, size, rounding_mode="trunc") if reduction == "avg" else total
    cut = [vector.split(counts) for vector in values]
    answer: list[tuple[Request, Tensor | None]] = []
    for rank in range(size):
        vector = values[rank].clone()
        at_root = rank == root
        if op in ("all_reduce", "broadcast", "barrier"):
            request = Request(op, reduction, dtype, count, vector, vector, root=root)
            answer.append((request, {"all_reduce": total, "broadcast": values[max(root, 0)], "barrier": values[rank]}[op]))
        elif op == "reduce":
            answer.append((Request(op, reduction, dtype, count, vector, vector if at_root else None, root=root), total if at_root else None))
        elif op == "reduce_scatter":
            output = vector.split(counts)[rank] if shared else torch.empty(counts[rank], dtype=dtype)
            answer.append((Request(op, reduction, dtype, count, vector, output, input_counts=counts), total.split(counts)[rank]))
        elif op in ("all_gather", "gather"):
            everyone = torch.cat([cut[r][r] for r in range(size)])
            has_output = op == "all_gather" or at_root
            output = torch.empty(count, dtype=dtype) if has_output else None
            own = output.split(counts)[rank] if shared and output is not None else torch.empty(counts[rank], dtype=dtype)
            own.copy_(cut[rank][rank])
            answer.append((Request(op, reduction, dtype, count, own, output, output_counts=counts, root=root), everyone if has_output else None))
        elif op == "scatter":
            output = vector.split(counts)[rank] if shared and at_root else torch.empty(counts[rank], dtype=dtype)
            request = Request(op, reduction, dtype, count, vector if at_root else None, output, input_counts=counts, root=root)
            answer.append((request, cut[root][rank]))
        else:
            received = tuple(counts[rank] for _ in range(size))
            expected = torch.cat([cut[peer][rank] for peer in range(size)])
            request = Request(op, reduction, dtype, count, vector, torch.empty(sum(received), dtype=dtype), counts, received)
            answer.append((request, expected))
    return answer


@pytest.mark.parametrize("key", SCHEDULES, ids=" ".join)
def test_every_schedule_gives_the_result_of_its_operation(key):
    op = key[0]
    reductions = ("sum", "avg") if op in ("all_reduce", "reduce_scatter", "reduce") else ("sum",)
    may_share = (False, True) if op in ("reduce_scatter", "all_gather", "gather", "scatter") else (False,)
    ran = 0
    for size, segments, count, reduction, shared in itertools.product(SIZES, (1, 3), (0, 1, 7, 230), reductions, may_share):
        for root in roots(op, size):
            generator = torch.Generator().manual_seed(count + size)
            values = [torch.randint(-1000, 1000, (count,), generator=generator) for _ in range(size)]
            cases = requests_and_results(op, values, pieces_of(count, size), root, reduction, shared)
            network = Network(random.Random(ran))
            plans = plans_of(key, size, segments, root)
            run(network, [Execution(plan, case[0], End(network, rank), 5) for rank, (plan, case) in enumerate(zip(plans, cases, strict=True))])
            for rank, (request, expected) in enumerate(cases):
                where = f"{key} of {size}, {count} elements, {segments} segments, {reduction}, root {root}, rank {rank}, shared {shared}"
                assert expected is None or (request.output is not None and torch.equal(request.output, expected)), where
                kept = op in ("reduce_scatter", "scatter", "all_to_all") and not shared and request.input is not None
                assert not kept or torch.equal(request.input, values[rank]), where
            ran += 1
    assert ran >= 40


def evaluate(order: object, values: list[Tensor]) -> Tensor:
    """Fold the ranks' values in the order that the simulator found."""
    if not isinstance(order, tuple):
        return values[order]
    out = torch.empty_like(values[0])
    fold(out, evaluate(order[0], values), evaluate(order[1], values), "sum")
    return out


@pytest.mark.parametrize("key", [key for key in SCHEDULES if key[0] in ("all_reduce", "reduce_scatter")], ids=" ".join)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_folds_are_in_the_simulators_order_to_the_bit(key, dtype):
    for size, segments in itertools.product((2, 3, 5), (1, 2)):
        count = 400
        generator = torch.Generator().manual_seed(size)
        values = [torch.randn(count, generator=generator).to(dtype) for _ in range(size)]
        counts = pieces_of(count, size)
        cases = requests_and_results(key[0], values, counts, -1, "sum", False)
        network = Network(random.Random(size))
        plans = plans_of(key, size, segments, -1)
        run(network, [Execution(plan, case[0], End(network, rank), 0) for rank, (plan, case) in enumerate(zip(plans, cases, strict=True))])
        align = ALIGN_NBYTES // dtype.itemsize
        shape = list(counts) if key[0] == "reduce_scatter" else count
        simulated = simulate([plan.schedule for plan in plans], shape, align)
        chunks = plans[0].schedule.chunks
        edges = [0, *itertools.accumulate(counts)] if key[0] == "reduce_scatter" else partition(count, chunks, align)
        for rank, (request, _) in enumerate(cases):
            for chunk in [rank] if key[0] == "reduce_scatter" else range(chunks):
                within = partition(edges[chunk + 1] - edges[chunk], segments, align)
                for segment in range(segments):
                    begin, end = edges[chunk] + within[segment], edges[chunk] + within[segment + 1]
                    expected = evaluate(simulated.outputs[rank][chunk, segment].order, [vector[begin:end] for vector in values])
                    base = edges[rank] if key[0] == "reduce_scatter" else 0
                    assert request.output is not None
                    assert torch.equal(request.output[begin - base : end - base], expected), (key, size, rank, chunk, segment)


def test_operations_in_flight_together_do_not_mix():
    size, network = 3, Network(random.Random(1))
    vectors = [[torch.full((50,), rank + 10.0 * tag) for rank in range(size)] for tag in range(4)]
    plans = plans_of(("all_reduce", "ring", "pipelined"), size, 2, -1)
    executions = []
    for rank in range(size):
        for tag in network.random.sample(range(4), 4):  # each rank begins them in an order of its own
            vector = vectors[tag][rank]
            executions.append(Execution(plans[rank], Request("all_reduce", "sum", vector.dtype, 50, vector, vector), End(network, rank), tag))
    run(network, executions)
    for tag in range(4):
        for vector in vectors[tag]:
            assert torch.equal(vector, torch.full((50,), 3.0 + 30.0 * tag))


def test_an_execution_that_waits_names_whom_and_does_not_block():
    network = Network(random.Random(0))
    vector = torch.zeros(10)
    plan = Plan(build("all_reduce", "ring", "pipelined", 0, 3))
    execution = Execution(plan, Request("all_reduce", "sum", vector.dtype, 10, vector, vector), End(network, 0), 0)
    assert execution.advance()
    assert not execution.advance()
    assert not execution.finished
    assert (execution.waiting_for, execution.steps_done, execution.steps) == (2, 0, len(plan.schedule.steps))


@pytest.mark.parametrize("op", ["all_reduce", "reduce_scatter", "all_gather", "broadcast"])
def test_schedules_in_registered_memory_are_refused(op):
    schedule: Schedule = build(op, "direct", "registered", 0, 2, 1, 0)
    assert REGISTERED & {step.kind for step in schedule.steps}
    with pytest.raises(ScheduleError, match=f"{op}.*cannot run here.*registered memory, which only the C\\+\\+ core has"):
        Plan(schedule)


FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DEFINED = [(dtype, reduction) for dtype in FLOATS for reduction in ("sum", "avg", "min", "max", "prod")]
DEFINED += [(dtype, reduction) for dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8) for reduction in FOLDS]
DEFINED += [(torch.bool, reduction) for reduction in FOLDS if reduction != "avg"]


@pytest.mark.parametrize(("dtype", "reduction"), DEFINED)
def test_a_fold_is_what_its_name_says(dtype, reduction):
    is_float = dtype.is_floating_point
    generator = torch.Generator().manual_seed(3)
    make = (lambda: torch.randn(100, generator=generator)) if is_float else (lambda: torch.randint(0, 256, (100,), generator=generator))
    left, right = make().to(dtype), make().to(dtype)
    if is_float:
        left[3] = right[4] = float("nan")
    out = torch.empty_like(left)
    fold(out, left, right, reduction, 3 if reduction == "avg" else 1)
    wide = [tensor.double() if is_float else tensor.to(torch.int64) for tensor in (left, right)]
    expected = {
        "sum": wide[0] + wide[1],
        "avg": wide[0] + wide[1],
        "prod": wide[0] * wide[1],
        "min": torch.minimum(*wide),
        "max": torch.maximum(*wide),
    }
    if not is_float:
        expected |= {"band": wide[0] & wide[1], "bor": wide[0] | wide[1], "bxor": wide[0] ^ wide[1]}
    result = expected[reduction]
    if reduction == "avg":
        result = result / 3 if is_float else torch.div(result.to(dtype).to(torch.int64), 3, rounding_mode="trunc")
    if not is_float:
        assert torch.equal(out, result.to(dtype))
        return
    # One operation in f32 or wider, perhaps a division, and one rounding to the type: one unit in the last place at most.
    assert torch.equal(out.isnan(), result.isnan())
    kept = ~result.isnan()
    assert ((out.double() - result)[kept].abs() <= torch.finfo(dtype).eps * result[kept].abs()).all()
