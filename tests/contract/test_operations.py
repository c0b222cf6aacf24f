"""reduce, gather, scatter and all_to_all, every dtype and reduction, groups, strides, complex numbers: each against what one process computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from ringfold.collectives import select
from ringfold.collectives.algorithms import BUILDERS
from ringfold.collectives.cost import Topology
from torch import Tensor

from tests.harness import run_ranks
from tests.harness.cases import EVERY_DTYPE, Verdicts, finish, here, kinds_of_memory, random_values
from tests.harness.compare import FLOATS, assert_bitwise_equal, assert_fold, fold_bound, reference

every_world = pytest.mark.parametrize(("size", "transport"), [(n, t) for t in ("shm", "tcp") for n in (1, 2, 3, 5)])
some_worlds = pytest.mark.parametrize(("size", "transport"), [(3, "shm"), (2, "tcp")])
BITWISE = ("band", "bor", "bxor")


def algorithms_for(op: str) -> list[str | None]:
    return [None, *dict.fromkeys(algorithm for of, algorithm, _ in BUILDERS if of == op and algorithm != "hierarchical")]


def memory(world: Any, values: Tensor, registered: bool) -> Tensor:
    return world.empty(values.shape, dtype=values.dtype).copy_(values) if registered else here(values)


def uneven(size: int) -> list[int]:
    return [(7 * rank + 3) % 11 * 10 for rank in range(size)]


def check_reduce(world: Any) -> int:
    cases = 0
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for count in (0, 1, world.size + 1, 1000, 70_001):
            inputs = random_values(dtype, world.size, count)
            expected = reference("avg", inputs)
            bound = fold_bound("avg", inputs) if dtype in FLOATS else None
            for root in range(world.size):
                for algorithm in algorithms_for("reduce"):
                    for registered in kinds_of_memory(world.transport):
                        case = f"reduce {dtype} x {count} to {root}, {algorithm}, registered={registered}"
                        tensor = memory(world, inputs[world.rank], registered)
                        asynchronous = cases % 3 == 0
                        finish(world.reduce(tensor, root, "avg", async_op=asynchronous, algorithm=algorithm), asynchronous)
                        if world.rank == root:
                            assert_fold(tensor, expected, bound, case)
                        else:
                            assert_bitwise_equal(tensor, inputs[world.rank], f"{case}: the tensor of rank {world.rank}")
                        cases += 1
    return cases


@every_world
def test_reduce_gives_the_fold_to_its_root_and_leaves_the_others_alone(size: int, transport: str) -> None:
    assert min(run_ranks(size, check_reduce, transport=transport)) >= 3 * 5 * size * 2


def check_gather_and_scatter(world: Any) -> int:
    cases = 0
    for dtype in (torch.float16, torch.uint8, torch.bool):
        for counts in ([5] * world.size, [40_000] * world.size, uneven(world.size), [0] * world.size):
            given = None if len(set(counts)) == 1 else counts
            whole = random_values(dtype, sum(counts))
            piece = whole.split(counts)[world.rank]
            for root in range(world.size):
                for registered in kinds_of_memory(world.transport):
                    for algorithm in algorithms_for("gather"):
                        case = f"gather {dtype}, {counts} to {root}, {algorithm}, registered={registered}"
                        output = memory(world, torch.zeros_like(whole), registered) if world.rank == root else None
                        asynchronous = cases % 3 == 0
                        own = memory(world, piece, registered)
                        finish(world.gather(output, own, root, counts=given, async_op=asynchronous, algorithm=algorithm), asynchronous)
                        if output is not None:
                            assert_bitwise_equal(output, whole, case)
                    for algorithm in algorithms_for("scatter"):
                        source = memory(world, whole, registered) if world.rank == root else None
                        output = memory(world, torch.zeros_like(piece), registered)
                        finish(world.scatter(output, source, root, counts=given, async_op=asynchronous, algorithm=algorithm), asynchronous)
                        assert_bitwise_equal(output, piece, case.replace("gather", "scatter"))
                    cases += 1
    return cases


@every_world
def test_gather_and_scatter_are_inverse_from_every_root(size: int, transport: str) -> None:
    assert min(run_ranks(size, check_gather_and_scatter, transport=transport)) >= 3 * 4 * size


def check_all_to_all(world: Any) -> int:
    size, cases = world.size, 0
    for dtype in (torch.float32, torch.int8):
        for scale, is_even in ((1, True), (30_000, True), (1, False), (1000, False), (0, False)):
            # lengths[s][d]: what rank s sends to rank d
            lengths = [[scale * (1 if is_even else (3 * s + 5 * d) % 7) for d in range(size)] for s in range(size)]
            vectors = [random_values(dtype, sum(lengths[s]), seed=s) for s in range(size)]
            expected = torch.cat([vectors[s].split(lengths[s])[world.rank] for s in range(size)])
            counts = {} if is_even else {"input_counts": lengths[world.rank], "output_counts": [lengths[s][world.rank] for s in range(size)]}
            for algorithm in algorithms_for("all_to_all"):
                for registered in kinds_of_memory(world.transport):
                    tensor, output = memory(world, vectors[world.rank], registered), memory(world, torch.zeros_like(expected), registered)
                    asynchronous = cases % 3 == 0
                    finish(world.all_to_all(output, tensor, **counts, async_op=asynchronous, algorithm=algorithm), asynchronous)
                    assert_bitwise_equal(output, expected, f"all_to_all {dtype} {lengths}, {algorithm}, registered={registered}, rank {world.rank}")
                    cases += 1
    return cases


@every_world
def test_all_to_all_sends_every_piece_where_it_belongs(size: int, transport: str) -> None:
    assert min(run_ranks(size, check_all_to_all, transport=transport)) >= 2 * 5 * 2


def check_every_pair(world: Any) -> dict[str, int]:
    verdicts = Verdicts()
    for dtype in EVERY_DTYPE:
        for reduction in ("sum", "avg", "min", "max", "prod", *BITWISE):
            if (dtype in FLOATS and reduction in BITWISE) or (dtype is torch.bool and reduction == "avg"):
                continue
            inputs = random_values(dtype, world.size, 999, narrow=reduction == "prod" and dtype in FLOATS)
            expected, bound = reference(reduction, inputs), fold_bound(reduction, inputs) if dtype in FLOATS else None
            for registered in kinds_of_memory(world.transport):
                tensor = memory(world, inputs[world.rank], registered)
                world.all_reduce(tensor, reduction)
                verdicts.fold(f"{dtype} {reduction}, registered={registered}", tensor, expected, bound)
    return verdicts.checksums


@some_worlds
def test_every_reduction_exists_in_every_dtype_that_has_it(size: int, transport: str) -> None:
    results = run_ranks(size, check_every_pair, transport=transport)
    assert len(results[0]) >= 4 * 5 + 5 * 8 + 7
    assert all(result == results[0] for result in results)


def check_odd_tensors(world: Any) -> None:
    size, rank = world.size, world.rank
    # Gaps: every second column of a transposed matrix. What lies between stays as it is.
    for asynchronous in (False, True):
        base = torch.arange(60.0).view(6, 10).mul(rank + 1)
        view, before = base.t()[::2], base.clone()
        finish(world.all_reduce(view, async_op=asynchronous), asynchronous)
        factor = size * (size + 1) / 2 / (rank + 1)
        assert torch.equal(base[:, ::2], before[:, ::2] * factor)
        assert torch.equal(base[:, 1::2], before[:, 1::2])
    columns = torch.zeros(4, size).t()
    world.all_gather(columns, torch.full((4, 2), rank + 1.0)[:, :1].reshape(4)[::1])
    assert torch.equal(columns, torch.arange(1.0, size + 1)[:, None].expand(size, 4))
    moved = torch.zeros(3, 2 * size)[:, ::2] if rank else torch.arange(3.0 * size).view(size, 3).t()
    world.broadcast(moved, 0)
    assert torch.equal(moved, torch.arange(3.0 * size).view(size, 3).t())
    # Complex numbers are pairs; a conjugated view has the conjugate's values.
    z = torch.tensor([1 + 2j, -3 + 0.5j, 0j], dtype=torch.complex64)
    total = z.clone() * (rank + 1)
    world.all_reduce(total)
    assert torch.equal(total, z * (size * (size + 1) / 2))
    conjugate = z.clone().conj()
    world.all_reduce(conjugate, "avg")
    assert torch.equal(conjugate, z.conj())
    gathered = torch.zeros(3 * size, dtype=torch.complex128)
    world.all_gather(gathered, z.to(torch.complex128), counts=[3] * size)
    assert torch.equal(gathered, z.to(torch.complex128).repeat(size))
    # What is only moved may be of any dtype.
    for dtype in (torch.float8_e4m3fn, torch.uint16, torch.uint64):
        values = torch.arange(7).to(torch.uint8).view(torch.float8_e4m3fn) if dtype is torch.float8_e4m3fn else torch.arange(7).to(dtype)
        everyone = torch.zeros(7 * size, dtype=dtype)
        world.all_gather(everyone, values)
        assert torch.equal(everyone.view(torch.uint8), values.view(torch.uint8).repeat(size))
    # Nothing, and a scalar.
    world.all_reduce(torch.zeros(0, 5))
    world.all_to_all(torch.zeros(0), torch.zeros(0))
    scalar = torch.tensor(2.0)
    world.all_reduce(scalar, "prod")
    assert scalar.item() == 2.0**size
    # A scaled sum; the input of what is not in place stays.
    scaled = torch.full((5,), 4.0)
    world.all_reduce(scaled, scale=0.5 * (rank + 1))
    assert torch.equal(scaled, torch.full((5,), 2.0 * size * (size + 1) / 2))
    source, piece = torch.full((2 * size,), 3.0), torch.zeros(2)
    world.reduce_scatter(piece, source, scale=2)
    assert torch.equal(piece, torch.full((2,), 6.0 * size))
    assert torch.equal(source, torch.full((2 * size,), 3.0))
    kept = torch.full((3,), 1.5)
    world.reduce(kept, size - 1, scale=2)
    assert torch.equal(kept, torch.full((3,), 3.0 * size if rank == size - 1 else 1.5))


@some_worlds
def test_gaps_complex_numbers_odd_dtypes_nothing_and_scales(size: int, transport: str) -> None:
    run_ranks(size, check_odd_tensors, transport=transport)


def check_groups(world: Any) -> None:
    size, rank = world.size, world.rank
    shapes = [(3,), (0,), (2, 5), (), (300_001,), (7, 1)]
    for asynchronous in (False, True):
        group = [torch.full(shape, float(rank + 1)) for shape in shapes] + [torch.full((4,), rank + 1, dtype=torch.int32), torch.ones(2, 3).t()]
        before = world.counters.get("all_reduce")
        finish(world.all_reduce(group, async_op=asynchronous), asynchronous)
        # The large one, the small ones of float32 as one, those of int32.
        assert world.counters["all_reduce"].calls - (before.calls if before else 0) == 3
        for tensor in group[:-1]:
            assert torch.equal(tensor, torch.full_like(tensor, size * (size + 1) // 2))
        assert torch.equal(group[-1], torch.full((3, 2), float(size)))
        world.broadcast(group, size - 1, async_op=False)
    world.all_reduce([])


@some_worlds
def test_a_group_of_tensors_is_one_operation(size: int, transport: str) -> None:
    run_ranks(size, check_groups, transport=transport)


def check_objects(world: Any) -> None:
    size, rank = world.size, world.rank
    mine = {"rank": rank, "text": "x" * 1000 * rank}
    everyone = [{"rank": r, "text": "x" * 1000 * r} for r in range(size)]
    assert world.all_gather_object(mine) == everyone
    assert world.broadcast_object(mine, size - 1) == everyone[-1]
    assert world.gather_object(mine, size - 1) == (everyone if rank == size - 1 else None)
    assert world.scatter_object(everyone if rank == 0 else None) == mine
    assert world.all_to_all_object([(rank, d) for d in range(size)]) == [(s, rank) for s in range(size)]
    if size > 1:
        if rank == 0:
            world.send_object(mine, 1, tag=5)
        elif rank == 1:
            assert world.recv_object(tag=5) == everyone[0]


@pytest.mark.parametrize(("size", "transport"), [(1, "shm"), (3, "shm"), (2, "tcp")])
def test_objects_arrive_as_they_were(size: int, transport: str) -> None:
    run_ranks(size, check_objects, transport=transport)


def check_messages(world: Any) -> None:
    size, rank = world.size, world.rank
    right, left = (rank + 1) % size, (rank - 1) % size
    # In any order of tags, with gaps at both ends, all at once.
    out = [torch.full((4, 1000 * tag + 1), 10.0 * rank + tag).t() for tag in range(3)]
    received = [torch.zeros(4, 1000 * tag + 1).t() for tag in range(3)]
    world.exchange([(out[tag], right, tag) for tag in (0, 1, 2)], [(received[tag], left, tag) for tag in (2, 0, 1)])
    for tag in range(3):
        assert torch.equal(received[tag], torch.full((1000 * tag + 1, 4), 10.0 * left + tag))
    # From anybody: everyone sends to rank 0.
    if rank:
        world.send(torch.tensor([rank]), 0, tag=4)
        return
    sources = set()
    for _ in range(size - 1):
        value = torch.zeros(1, dtype=torch.int64)
        work = world.recv(value, None, tag=4, async_op=True)
        work.wait()
        assert work.source == int(value)
        sources.add(work.source)
    assert sources == set(range(1, size))


@pytest.mark.parametrize(("size", "transport"), [(2, "shm"), (4, "shm"), (3, "tcp")])
def test_messages_find_their_tags_and_say_where_they_are_from(size: int, transport: str) -> None:
    run_ranks(size, check_messages, transport=transport)


def check_every_algorithm(world: Any) -> int:
    """All algorithms of an operation, also those that the cost model would not pick here, on odd counts and more than one segment."""
    size, rank, cases = world.size, world.rank, 0
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for count in (0, 1, size - 1, size + 1, 1000, 600_001 // size):
            inputs = random_values(dtype, size, count)
            expected, bound = reference("sum", inputs), fold_bound("sum", inputs) if dtype in FLOATS else None
            counts = [count // size + (r < count % size) for r in range(size)]
            own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
            for algorithm in algorithms_for("all_reduce"):
                tensor = here(inputs[rank])
                world.all_reduce(tensor, algorithm=algorithm)
                assert_fold(tensor, expected, bound, f"all_reduce {dtype} x {count}, {algorithm}")
                cases += 1
            for algorithm in algorithms_for("reduce_scatter"):
                output = torch.zeros(counts[rank], dtype=dtype)
                world.reduce_scatter(output, here(inputs[rank]), counts=counts, algorithm=algorithm)
                assert_fold(output, expected[own], None if bound is None else bound[own], f"reduce_scatter {dtype} x {count}, {algorithm}")
            for algorithm in algorithms_for("all_gather"):
                whole = here(torch.zeros_like(inputs[0]))
                world.all_gather(whole, here(inputs[0, own]), counts=counts, algorithm=algorithm)
                assert_bitwise_equal(whole, inputs[0], f"all_gather {dtype} x {count}, {algorithm}")
            for algorithm in algorithms_for("broadcast"):
                root = count % size
                tensor = here(inputs[rank])
                world.broadcast(tensor, root, algorithm=algorithm)
                assert_bitwise_equal(tensor, inputs[root], f"broadcast {dtype} x {count} from {root}, {algorithm}")
    return cases


@pytest.mark.parametrize(("size", "transport"), [(n, t) for t in ("shm", "tcp") for n in (2, 3, 4, 5, 8)])
def test_every_algorithm_is_right_for_real(size: int, transport: str) -> None:
    assert min(run_ranks(size, check_every_algorithm, transport=transport, timeout_s=100)) >= 3 * 6 * 5


def check_hosts(world: Any, hosts: tuple[int, ...]) -> int:
    """Hosts that are only claimed: the schedule is what several hosts run, over one host's channels."""
    world.topology = Topology(hosts)
    size, rank, cases = world.size, world.rank, 0
    for dtype in (torch.float32, torch.int64):
        for count in (0, 1, size + 1, 1000, 300_001):
            inputs = random_values(dtype, size, count)
            expected, bound = reference("sum", inputs), fold_bound("sum", inputs) if dtype in FLOATS else None
            counts = [count // size + (r < count % size) for r in range(size)]
            own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
            root = count % size
            tensor = here(inputs[rank])
            world.all_reduce(tensor, algorithm="hierarchical")
            assert_fold(tensor, expected, bound, f"all_reduce {dtype} x {count} on {hosts}")
            output = torch.zeros(counts[rank], dtype=dtype)
            world.reduce_scatter(output, here(inputs[rank]), counts=counts, algorithm="hierarchical")
            assert_fold(output, expected[own], None if bound is None else bound[own], f"reduce_scatter {dtype} x {count} on {hosts}")
            whole = here(torch.zeros_like(inputs[0]))
            world.all_gather(whole, here(inputs[0, own]), counts=counts, algorithm="hierarchical")
            assert_bitwise_equal(whole, inputs[0], f"all_gather {dtype} x {count} on {hosts}")
            tensor = here(inputs[rank])
            world.broadcast(tensor, root, algorithm="hierarchical")
            assert_bitwise_equal(tensor, inputs[root], f"broadcast {dtype} x {count} from {root} on {hosts}")
            tensor = here(inputs[rank])
            world.reduce(tensor, root, algorithm="hierarchical")
            if rank == root:
                assert_fold(tensor, expected, bound, f"reduce {dtype} x {count} to {root} on {hosts}")
            cases += 1
    return cases


@pytest.mark.parametrize("hosts", [(0, 0, 1), (0, 0, 1, 1), (0, 1, 1, 2, 0)], ids=str)
def test_hierarchical_schedules_are_right_whatever_the_grouping(hosts: tuple[int, ...]) -> None:
    assert min(run_ranks(len(hosts), check_hosts, hosts)) == 10


def check_fallbacks(world: Any, fallback: str) -> int:
    """The registered schedules on memory that is not registered, or only on some ranks."""
    read_s_per_byte = 0.0 if fallback == "remote" else 1.0
    world.topology = Topology.on_one_host(world.size, remote_reads=True)
    near = replace(world.topology.near, name="forced", read_s_per_byte=read_s_per_byte, alpha_s=1e-9)
    world.topology = replace(world.topology, near=near)
    size, rank, cases = world.size, world.rank, 0
    for count in (1000, 300_001):
        assert select.choose("all_reduce", 4 * count, world.topology, "direct").fallback == fallback
        for mixed in (False, True):
            registered = mixed and rank % 2 == 0
            inputs = random_values(torch.float32, size, size * count)
            expected, bound = reference("sum", inputs), fold_bound("sum", inputs)
            own = slice(rank * count, (rank + 1) * count)
            tensor = memory(world, inputs[rank], registered)
            world.all_reduce(tensor, algorithm="direct")
            assert_fold(tensor, expected, bound, f"all_reduce x {count}, {fallback}, mixed={mixed}")
            output = memory(world, torch.zeros(count), registered)
            world.reduce_scatter(output, memory(world, inputs[rank], registered), algorithm="direct")
            assert_fold(output, expected[own], bound[own], f"reduce_scatter x {count}, {fallback}, mixed={mixed}")
            tensor = memory(world, inputs[rank], registered)
            world.reduce(tensor, size - 1, algorithm="direct")
            if rank == size - 1:
                assert_fold(tensor, expected, bound, f"reduce x {count}, {fallback}, mixed={mixed}")
            whole = memory(world, torch.zeros_like(inputs[0]), registered)
            world.all_gather(whole, memory(world, inputs[0, own], registered), algorithm="direct")
            assert_bitwise_equal(whole, inputs[0], f"all_gather x {count}, {fallback}, mixed={mixed}")
            tensor = memory(world, inputs[rank], registered)
            world.broadcast(tensor, 1, algorithm="direct")
            assert_bitwise_equal(tensor, inputs[1], f"broadcast x {count}, {fallback}, mixed={mixed}")
            exchanged = memory(world, torch.zeros_like(inputs[0]), registered)
            world.all_to_all(exchanged, memory(world, inputs[rank], registered))
            pieces = [inputs[s, own] for s in range(size)]
            assert_bitwise_equal(exchanged, torch.cat(pieces), f"all_to_all x {count}, {fallback}, mixed={mixed}")
            piece = memory(world, torch.zeros(count), registered)
            world.scatter(piece, memory(world, inputs[0], registered) if rank == 0 else None)
            assert_bitwise_equal(piece, inputs[0, own], f"scatter x {count}, {fallback}, mixed={mixed}")
            everything = memory(world, torch.zeros_like(inputs[0]), registered) if rank == 1 else None
            world.gather(everything, piece, 1)
            if everything is not None:
                assert_bitwise_equal(everything, inputs[0], f"gather x {count}, {fallback}, mixed={mixed}")
            cases += 1
    return cases


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("fallback", ["exchange", "remote"])
def test_memory_that_is_not_registered_is_sent_or_read_where_it_lies(size: int, fallback: str) -> None:
    assert min(run_ranks(size, check_fallbacks, fallback)) == 4
