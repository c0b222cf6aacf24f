"""The contract tests of collectives on CUDA tensors, of ranks that share one GPU: through its memory (shm), and through host memory (tcp)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.contract import test_operations as contract
from tests.contract.test_random_operations import GROUPS, run_operations
from tests.harness import run_ranks
from tests.harness.cases import DTYPES, REDUCTIONS, Verdicts, assert_same_bits, counts_for, finish, folds, here
from tests.harness.compare import assert_bitwise_equal

pytestmark = pytest.mark.gpu

WAYS = pytest.mark.parametrize(("size", "transport"), [(2, "shm"), (3, "shm"), (2, "tcp")])


def on_gpu(world: Any, check: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """Run a check with CUDA as the default device; return its result and which way the tensors went."""
    torch.set_default_device("cuda")
    result = check(world, *args)
    carrier = world._device_carrier
    return result, carrier.name if carrier is not None else "host"


def run_on_gpu(size: int, transport: str, check: Callable[..., Any], *args: Any) -> list[Any]:
    answers = run_ranks(size, on_gpu, check, *args, transport=transport, timeout_s=110)
    assert {way for _, way in answers} == {"shared_device" if transport == "shm" else "host"}
    return [result for result, _ in answers]


def check_all_reduce(world: Any) -> dict[str, int]:
    verdicts = Verdicts()
    for dtype, reduction, inputs, expected, bound in folds(world.size, max(counts_for(world.size)) + 70_001):
        for count in (*counts_for(world.size, reduction), 70_001):
            tensor = here(inputs[world.rank, :count])
            finish(world.all_reduce(tensor, reduction, async_op=count % 2 == 1), count % 2 == 1)
            verdicts.fold(f"{dtype} {reduction} x {count}", tensor, expected[:count], None if bound is None else bound[:count])
    return verdicts.checksums


@WAYS
def test_all_reduce_in_every_dtype_has_the_same_bits_on_all_ranks(size: int, transport: str) -> None:
    assert_same_bits(run_on_gpu(size, transport, check_all_reduce), len(DTYPES) * len(REDUCTIONS) * 3)


@WAYS
@pytest.mark.parametrize(
    "check",
    [
        contract.check_reduce,
        contract.check_gather_and_scatter,
        contract.check_all_to_all,
        contract.check_every_pair,
        contract.check_odd_tensors,
        contract.check_groups,
        contract.check_objects,
        contract.check_messages,
        contract.check_every_algorithm,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_the_contract_holds(check: Callable[..., Any], size: int, transport: str) -> None:
    if check in (contract.check_objects, contract.check_messages):  # neither is an operation of a device
        run_ranks(size, on_gpu, check, transport=transport, timeout_s=110)
    else:
        run_on_gpu(size, transport, check)


def check_pieces(world: Any) -> None:
    """Vectors of many slots: the windows stay at their least length."""
    from ringfold.collectives.cuda import shared_device

    shared_device.GREATEST_SLOT_NBYTES = shared_device.LEAST_SLOT_NBYTES
    size, rank, count = world.size, world.rank, 1_300_007
    numbers = torch.arange(count).remainder(101).float()
    for _ in range(3):
        tensor = numbers + rank
        world.all_reduce(tensor)
        assert torch.equal(tensor, numbers * size + sum(range(size)))
        tensor = numbers + rank
        world.broadcast(tensor, size - 1)
        assert torch.equal(tensor, numbers + size - 1)
        lengths = [[(s + 2 * d) % 3 * 400_001 for d in range(size)] for s in range(size)]
        sent = torch.cat([torch.full((lengths[rank][d],), 10.0 * rank + d) for d in range(size)])
        received = torch.zeros(sum(lengths[s][rank] for s in range(size)))
        world.all_to_all(received, sent, input_counts=lengths[rank], output_counts=[lengths[s][rank] for s in range(size)])
        assert torch.equal(received, torch.cat([torch.full((lengths[s][rank],), 10.0 * s + rank) for s in range(size)]))
        counts = [count, 0, 3][:size]
        piece = torch.zeros(counts[rank])
        world.reduce_scatter(piece, torch.full((sum(counts),), rank + 1.0), counts=counts)
        assert torch.equal(piece, torch.full((counts[rank],), size * (size + 1) / 2))
        everyone = torch.zeros(sum(counts))
        world.all_gather(everyone, torch.full((counts[rank],), float(rank)), counts=counts)
        assert torch.equal(everyone, torch.cat([torch.full((counts[r],), float(r)) for r in range(size)]))


@pytest.mark.parametrize("size", [2, 3])
def test_long_vectors_pass_through_the_slots_in_pieces(size: int) -> None:
    run_on_gpu(size, "shm", check_pieces)


def check_large(world: Any) -> None:
    """Longer than the greatest slot."""
    count = 40_000_003
    tensor = torch.full((count,), world.rank + 1.0)
    tensor[-1] = 5.0
    world.all_reduce(tensor, "avg")
    assert tensor[:-1].eq((world.size + 1) / 2).all()
    assert tensor[-1] == 5.0


def test_a_vector_of_160_megabytes_is_averaged() -> None:
    run_on_gpu(2, "shm", check_large)


def check_mixed(world: Any) -> None:
    """CPU and CUDA tensors on one communicator, in flight together."""
    for number in range(20):
        on_cpu = torch.full((1000 + number,), world.rank + 1.0, device="cpu")
        on_gpu = torch.full((1000 + number,), world.rank + 1.0)
        works = [world.all_reduce(tensor, async_op=True) for tensor in ((on_cpu, on_gpu) if number % 2 else (on_gpu, on_cpu))]
        for work in works:
            work.wait()
        total = world.size * (world.size + 1) / 2
        assert on_cpu.eq(total).all()
        assert on_gpu.eq(total).all()


@WAYS
def test_a_communicator_takes_tensors_of_both_kinds(size: int, transport: str) -> None:
    run_on_gpu(size, transport, check_mixed)


def draws(operations: int, seed: int) -> list[Any]:
    import random

    from tests.contract.test_random_operations import EVERY_DTYPE, OPERATIONS, UFUNCS, Draw

    drawn = random.Random(seed)
    return [
        Draw(
            op=drawn.choice(OPERATIONS),
            group=drawn.choice(list(GROUPS)),
            dtype=drawn.randrange(len(EVERY_DTYPE)),
            reduction=drawn.choice([*UFUNCS, "avg"]),
            count=drawn.choice([drawn.randrange(41), 1000, 4097, 70_001]),
            root=drawn.randrange(4),
            kind_of_memory=drawn.randrange(3),
            asynchronous=drawn.random() < 0.5,
            uneven=drawn.random() < 0.5,
            seed=drawn.randrange(2**16),
        )
        for _ in range(operations)
    ]


def test_random_operations_on_five_communicators_agree_with_numpy() -> None:
    operations = draws(400, seed=20261126)
    done = run_on_gpu(4, "shm", run_operations, operations)
    assert sum(done) >= len(operations)


def check_orders(world: Any, rounds: int) -> None:
    """Overlapping operations on rows, columns and the world of a 2 x 2 mesh, waited for in differing orders."""
    import random

    rank = world.rank
    world.use_device(torch.device("cuda", 0))  # the first CUDA operation of a communicator waits for all members; so do subgroups then, when made
    row = world.subgroup([rank // 2 * 2, rank // 2 * 2 + 1], f"row {rank // 2}")
    column = world.subgroup([rank % 2, rank % 2 + 2], f"column {rank % 2}")
    order = random.Random(rank)
    for number in range(rounds):
        pending = []
        for comm in order.sample([row, column, world], 3):  # communicators do not wait for one another
            tensor = torch.full((1 + 97 * number,), float(comm.members.index(rank) + 1))
            pending.append((comm.all_reduce(tensor, async_op=True), tensor, comm.size * (comm.size + 1) / 2))
        order.shuffle(pending)
        for work, tensor, total in pending:
            work.wait()
            assert tensor.eq(total).all()
    row.close()
    column.close()


def test_communicators_of_a_mesh_overlap_in_any_order() -> None:
    run_on_gpu(4, "shm", check_orders, 100)


def check_strange(world: Any) -> None:
    from ringfold.collectives.errors import ConfigError

    tensor = torch.ones(3, device="cpu")
    with pytest.raises(ConfigError, match="on cpu and cuda:0, expected one device"):
        world.all_gather(torch.zeros(3 * world.size), tensor)
    with pytest.raises(ConfigError, match="expected one of"):
        world.all_reduce(torch.ones(3).to(torch.float8_e4m3fn))
    world.all_reduce(whole := torch.ones(3))
    assert_bitwise_equal(whole, torch.full((3,), float(world.size)).cpu())


def test_what_cannot_work_is_said_and_nothing_was_sent() -> None:
    run_on_gpu(2, "shm", check_strange)
