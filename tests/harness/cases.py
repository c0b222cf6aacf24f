"""Cases for the contract tests: which dtypes, reductions and counts to try, on which memory, and how a result is judged on every rank."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.harness.compare import FLOATS, INTEGERS, assert_bitwise_equal, assert_fold, bits, fold_bound, reference

DTYPES = (*FLOATS, torch.int32, torch.int64, torch.uint8)
EVERY_DTYPE = (*FLOATS, *INTEGERS, torch.bool)
REDUCTIONS = ("sum", "avg", "min", "max", "prod")
ALGORITHMS = (None, "ring", "direct")


def counts_for(size: int, reduction: str = "sum") -> list[int]:
    """Return the counts to try; reductions differ in arithmetic only, so all but sum take two."""
    return sorted({0, 1, 3, size - 1, size, size + 1, 1000} if reduction == "sum" else {size + 1, 1000})


def kinds_of_memory(transport: str) -> tuple[bool, ...]:
    """Over tcp registered memory is memory like any other, and on a GPU there is none."""
    return (False, True) if transport == "shm" and torch.get_default_device().type == "cpu" else (False,)


def here(values: Tensor) -> Tensor:
    """Return a copy of a case's values on torch's default device, where the tensors of the tests are; values are drawn on the CPU."""
    return torch.empty_like(values, device=torch.get_default_device()).copy_(values)


def random_values(dtype: torch.dtype, *shape: int, seed: int = 0, narrow: bool = False) -> Tensor:
    """Return the same random tensor on every rank: integers of the whole range (they wrap), floats of mixed sign and size.

    `narrow`: magnitudes in [1/2, 2), so that a product of eight stays finite and normal in every dtype.
    """
    generator = torch.Generator("cpu").manual_seed(1000 * seed + EVERY_DTYPE.index(dtype))
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator, device="cpu") < 0.5
    if dtype in INTEGERS:
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max, shape, dtype=dtype, generator=generator, device="cpu")
    values = torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")
    if narrow:
        return (torch.sign(values) * torch.exp2(2 * torch.rand(shape, dtype=torch.float64, generator=generator, device="cpu") - 1)).to(dtype)
    return (values * torch.exp2(torch.randint(-4, 5, shape, generator=generator, device="cpu").double())).to(dtype)


class Memory:
    """Tensors to communicate from: ordinary ones and registered ones, cut out of two large ones for each dtype."""

    def __init__(self, world: Any, count: int) -> None:
        self.pools = {
            (dtype, registered): world.empty(count, dtype=dtype) if registered else torch.empty(count, dtype=dtype)
            for dtype in DTYPES
            for registered in (False, True)
        }

    def of(self, values: Tensor, registered: bool, offset: int = 0) -> Tensor:
        """Return memory that holds `values`, `offset` elements behind the pool's aligned beginning."""
        tensor = self.pools[values.dtype, registered][offset : offset + values.numel()]
        return tensor.copy_(values)


class Verdicts:
    """Checks cases and keeps a checksum of each result's bits, to be compared between ranks."""

    def __init__(self) -> None:
        self.checksums: dict[str, int] = {}

    def fold(self, case: str, actual: Tensor, expected: Tensor, bound: Tensor | None) -> None:
        assert_fold(actual, expected, bound, case)
        self.checksums[case] = zlib.crc32(bits(actual))

    def exact(self, case: str, actual: Tensor, expected: Tensor) -> None:
        assert_bitwise_equal(actual, expected, case)
        self.checksums[case] = zlib.crc32(bits(actual))


def assert_same_bits(results: list[dict[str, int]], at_least: int) -> None:
    first = results[0]
    assert len(first) >= at_least
    for rank, checksums in enumerate(results):
        assert checksums.keys() == first.keys()
        differing = [case for case in first if checksums[case] != first[case]]
        assert not differing, f"rank {rank} has other bits than rank 0 in {len(differing)} cases, first {differing[0]}"


def folds(size: int, count: int) -> Iterator[tuple[torch.dtype, str, Tensor, Tensor, Tensor | None]]:
    """Yield (dtype, reduction, inputs [size, count], expected, bound) for each pair."""
    for dtype in DTYPES:
        for reduction in REDUCTIONS:
            inputs = random_values(dtype, size, count, narrow=reduction == "prod")
            yield dtype, reduction, inputs, reference(reduction, inputs), None if dtype in INTEGERS else fold_bound(reduction, inputs)


def finish(work: Any, asynchronous: bool) -> None:
    """Wait for what an operation returned, which is a Work exactly if it was asked for one."""
    assert (work is not None) == asynchronous
    if work is not None:
        work.wait()
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()  # the CPU has not waited
    assert work is None or work.done()
