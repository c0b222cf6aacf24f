"""Every operation of a torch process group, as users call it, against what it must leave on each rank: small integers, so equality is exact."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.harness import run_ranks
from tests.torch_distributed.groups import ringfold_group

SIZES = [1, 2, 3]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]
# moved, not reduced
CARRIED = [torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.complex64, torch.complex128]
COUNTS = [0, 1, 5, 1003]


def values(rank: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return what a rank contributes: 1, 2 or 3, so that the product of three ranks is exact in every dtype."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    drawn = torch.randint(1, 4, shape, generator=generator)
    return (drawn % 2).to(dtype) if dtype is torch.bool else drawn.to(torch.float32).to(dtype)


def done(work: Any, async_op: bool) -> None:
    assert (work is not None) == async_op
    if work is not None:
        assert work.wait()
        assert work.is_completed()
        assert work.is_success()
        assert work.exception() is None


def equal(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.reshape(-1).view(torch.uint8).tolist() == expected.reshape(-1).view(torch.uint8).tolist()


def cases(dtypes: list[torch.dtype]) -> Iterator[tuple[torch.dtype, int, bool]]:
    yield from itertools.product(dtypes, COUNTS, (False, True))


def folded(op: Any, size: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    stacked = torch.stack([values(rank, *shape, dtype=dtype) for rank in range(size)])
    if op == dist.ReduceOp.AVG:
        total = stacked.to(torch.float64).sum(0) / size
        return (total if dtype.is_floating_point else total.trunc()).to(dtype)
    wide = stacked.to(torch.float64 if dtype.is_floating_point else torch.int64)
    fold = {dist.ReduceOp.SUM: wide.sum, dist.ReduceOp.PRODUCT: wide.prod, dist.ReduceOp.MIN: wide.amin, dist.ReduceOp.MAX: wide.amax}[op]
    return fold(0).to(dtype)


def check_all_reduce(folder: str) -> None:
    with ringfold_group(folder) as (rank, size):
        for dtype, count, async_op in cases(DTYPES):
            for op in (dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT, dist.ReduceOp.MIN, dist.ReduceOp.MAX):
                tensor = values(rank, count, dtype=dtype)
                done(dist.all_reduce(tensor, op, async_op=async_op), async_op)
                equal(tensor, folded(op, size, (count,), dtype))
            for root in range(size):
                tensor = values(rank, count, dtype=dtype)
                done(dist.reduce(tensor, root, async_op=async_op), async_op)
                equal(tensor, folded(dist.ReduceOp.SUM, size, (count,), dtype) if rank == root else values(rank, count, dtype=dtype))
        for dtype in (torch.float64, torch.int32):
            tensor = values(rank, 7, dtype=dtype) * 6
            dist.all_reduce(tensor, dist.ReduceOp.AVG)
            equal(tensor, folded(dist.ReduceOp.SUM, size, (7,), dtype) * (6 // size))
        for op, fold in ((dist.ReduceOp.BAND, torch.bitwise_and), (dist.ReduceOp.BOR, torch.bitwise_or), (dist.ReduceOp.BXOR, torch.bitwise_xor)):
            tensor, expected = values(rank, 9, dtype=torch.int32), values(0, 9, dtype=torch.int32)
            for other in range(1, size):
                expected = fold(expected, values(other, 9, dtype=torch.int32))
            dist.all_reduce(tensor, op)
            equal(tensor, expected)
        for factor in (0.5, torch.tensor([0.5])):
            tensor = values(rank, 9)
            dist.all_reduce(tensor, dist._make_nccl_premul_sum(factor))
            equal(tensor, folded(dist.ReduceOp.SUM, size, (9,), torch.float32) / 2)
        tensor = torch.complex(values(rank, 5), values(rank, 5, seed=1))
        expected = sum(torch.complex(values(r, 5), values(r, 5, seed=1)) for r in range(size))
        dist.all_reduce(tensor)
        equal(tensor, expected)
        transposed = values(rank, 6, 4).t()
        dist.all_reduce(transposed)
        equal(transposed.contiguous(), folded(dist.ReduceOp.SUM, size, (6, 4), torch.float32).t().contiguous())


def check_several_at_once(folder: str) -> None:
    shapes = [(3,), (0,), (5, 7), (1000,)]
    with ringfold_group(folder) as (rank, size):
        for async_op in (False, True):
            tensors = [values(rank, *shape) for shape in shapes]
            with dist.distributed_c10d._coalescing_manager(async_ops=async_op) as manager:
                for tensor in tensors:
                    dist.all_reduce(tensor)
            manager.wait()
            for tensor, shape in zip(tensors, shapes, strict=True):
                equal(tensor, folded(dist.ReduceOp.SUM, size, shape, torch.float32))

            inputs = [values(rank, *shape) for shape in shapes]
            outputs = [torch.empty(size * shape[0], *shape[1:]) for shape in shapes]
            with dist.distributed_c10d._coalescing_manager(async_ops=async_op) as manager:
                for output, input in zip(outputs, inputs, strict=True):
                    dist.all_gather_into_tensor(output, input)
            manager.wait()
            for output, shape in zip(outputs, shapes, strict=True):
                equal(output, torch.cat([values(r, *shape) for r in range(size)]))

            inputs = [values(rank, size * shape[0], *shape[1:]) for shape in shapes]
            outputs = [torch.empty(shape) for shape in shapes]
            with dist.distributed_c10d._coalescing_manager(async_ops=async_op) as manager:
                for output, input in zip(outputs, inputs, strict=True):
                    dist.reduce_scatter_tensor(output, input)
            manager.wait()
            for output, shape in zip(outputs, shapes, strict=True):
                total = sum(values(r, size * shape[0], *shape[1:]) for r in range(size))
                equal(output, total.chunk(size)[rank] if shape[0] else torch.empty(shape))


def check_moves(folder: str) -> None:
    with ringfold_group(folder) as (rank, size):
        for dtype, count, async_op in cases([torch.float32, torch.int64, *CARRIED]):
            of = [values(r, count, dtype=dtype) for r in range(size)]
            for root in range(size):
                tensor = of[rank].clone()
                done(dist.broadcast(tensor, root, async_op=async_op), async_op)
                equal(tensor, of[root])

                pieces = [torch.zeros_like(of[0]) for _ in range(size)] if rank == root else None
                done(dist.gather(of[rank], pieces, dst=root, async_op=async_op), async_op)
                for piece, expected in zip(pieces or [], of, strict=rank == root):
                    equal(piece, expected)

                tensor = torch.zeros_like(of[0])
                done(dist.scatter(tensor, [t.clone() for t in of] if rank == root else None, src=root, async_op=async_op), async_op)
                equal(tensor, of[rank])

            whole = torch.zeros(size * count, dtype=dtype)
            done(dist.all_gather_into_tensor(whole, of[rank], async_op=async_op), async_op)
            equal(whole, torch.cat(of))
            for pieces in ([torch.zeros_like(of[0]) for _ in range(size)], list(torch.zeros_like(whole).chunk(size))) if count else ():
                done(dist.all_gather(pieces, of[rank], async_op=async_op), async_op)
                equal(torch.cat(pieces), torch.cat(of))


def check_uneven(folder: str) -> None:
    with ringfold_group(folder) as (rank, size):
        for dtype, async_op in itertools.product((torch.float32, torch.bfloat16, torch.int64), (False, True)):
            counts = [3 * r + 1 for r in range(size)]
            of = [values(r, count, dtype=dtype) for r, count in enumerate(counts)]
            pieces = [torch.zeros_like(t) for t in of]
            done(dist.all_gather(pieces, of[rank], async_op=async_op), async_op)
            equal(torch.cat(pieces), torch.cat(of))

            output = torch.zeros(counts[rank], dtype=dtype)
            inputs = list(values(rank, sum(counts), dtype=dtype).split(counts))
            done(dist.reduce_scatter(output, inputs if async_op else [t.clone() for t in inputs], async_op=async_op), async_op)
            equal(output, folded(dist.ReduceOp.SUM, size, (sum(counts),), dtype).split(counts)[rank])

            # Rank s sends s + 2 d rows to rank d: nothing from 0 to 0.
            sent = [values(rank, rank + 2 * d, 3, dtype=dtype, seed=d) for d in range(size)]
            expected = [values(s, s + 2 * rank, 3, dtype=dtype, seed=rank) for s in range(size)]
            received = [torch.zeros_like(t) for t in expected]
            done(dist.all_to_all(received, sent, async_op=async_op), async_op)
            equal(torch.cat(received), torch.cat(expected))
            output = torch.zeros_like(torch.cat(expected))
            splits = [len(t) for t in expected], [len(t) for t in sent]
            done(dist.all_to_all_single(output, torch.cat(sent), *splits, async_op=async_op), async_op)
            equal(output, torch.cat(expected))
            even = values(rank, size * 4, dtype=dtype)
            output = torch.zeros_like(even)
            done(dist.all_to_all_single(output, even, async_op=async_op), async_op)
            equal(output, torch.cat([values(s, size * 4, dtype=dtype).chunk(size)[rank] for s in range(size)]))
        sparse = torch.sparse_coo_tensor([[rank, size]], values(rank, 2, 3), (size + 1, 3))
        dense = sum(torch.sparse_coo_tensor([[r, size]], values(r, 2, 3), (size + 1, 3)).to_dense() for r in range(size))
        dist.all_reduce(sparse)
        equal(sparse.to_dense(), dense)
        objects: list[Any] = [None] * size
        dist.all_gather_object(objects, "x" * 100 * rank)
        assert objects == ["x" * 100 * r for r in range(size)]


def check_messages(folder: str) -> None:
    with ringfold_group(folder) as (rank, size):
        after, before = (rank + 1) % size, (rank - 1) % size
        received = [torch.zeros(4), torch.zeros(5)]
        operations = [dist.P2POp(dist.isend, values(rank, 4 + i), after, tag=i) for i in range(2)]
        operations += [dist.P2POp(dist.irecv, received[i], before, tag=i) for i in (1, 0)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        for i in range(2):
            equal(received[i], values(before, 4 + i))
        with dist.distributed_c10d._coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
            dist.isend(values(rank, 3), after)
            dist.irecv(received[0][:3], before)
        manager.wait()
        equal(received[0][:3], values(before, 3))
        if rank == 0:
            seen = set()
            for _ in range(size - 1):
                tensor = torch.zeros(6)
                source = dist.recv(tensor)
                equal(tensor, values(source, 6))
                seen.add(source)
            assert seen == set(range(1, size))
        else:
            dist.send(values(rank, 6), 0)
        dist.barrier()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("check", [check_all_reduce, check_several_at_once, check_moves, check_uneven])
def test_every_rank_ends_with_what_the_operation_promises(check: Callable[[str], None], size: int, tmp_path: Any) -> None:
    run_ranks(size, check, str(tmp_path), joined=False)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_messages_are_told_apart_by_sender_and_tag(transport: str, tmp_path: Any) -> None:
    run_ranks(3, check_messages, str(tmp_path), transport=transport, joined=False)
