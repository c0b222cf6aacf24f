"""Parts of random placements: what ranks of one mesh save in ranges, ranks of any other mesh read in other ranges."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise, product
from math import prod
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ringfold.parallel.placement import Local, Placement, Shard
from ringfold.runtime import checkpoint
from ringfold.runtime.checkpoint import TensorPart
from ringfold.runtime.checkpoint.boxes import boxes, overlaps

AXES = ("pp", "tp")


@dataclass(frozen=True)
class Held:
    """How the ranks of a mesh hold a tensor: placed over its axes, and each local tensor in ranges, which `copies` ranks have."""

    placement: Placement
    sizes: dict[str, int]
    cuts: tuple[float, ...]
    copies: int

    def parts(self, full: torch.Tensor) -> list[TensorPart]:
        """Return the part of each rank."""
        found = []
        for places in product(*(range(self.sizes[axis]) for axis in AXES)):
            local = self.placement.at(dict(zip(AXES, places, strict=True)), self.sizes)
            values = self.placement.take(full, dict(zip(AXES, places, strict=True)), self.sizes).reshape(-1)
            bounds = [0, *(int(cut * len(values)) for cut in self.cuts), len(values)]
            found += [TensorPart(values[start:stop].clone(), local, start) for start, stop in pairwise(bounds)] * self.copies
        return found


@st.composite
def ways_to_hold(draw: st.DrawFn, shape: tuple[int, ...]) -> Held:
    axes = {}
    for axis in draw(st.permutations(AXES))[: draw(st.integers(0, 2)) if shape else 0]:
        dim = draw(st.integers(0, len(shape) - 1))
        ends = sorted(draw(st.lists(st.integers(0, shape[dim]), max_size=3)))
        pieces = tuple(stop - start for start, stop in pairwise([0, *ends, shape[dim]])) if ends else ()
        axes[axis] = Shard(dim, pieces)
    sizes = {axis: draw(st.integers(1, 3)) for axis in AXES}
    cuts = tuple(sorted(draw(st.lists(st.floats(0, 1), max_size=2))))
    return Held(Placement("w", shape, axes), sizes, cuts, draw(st.integers(1, 2)))


@st.composite
def changes(draw: st.DrawFn) -> tuple[Held, Held]:
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    return draw(ways_to_hold(shape)), draw(ways_to_hold(shape))


@dataclass(frozen=True)
class Thread:
    """A rank that is a thread: all that a save asks of a communicator."""

    rank: int
    size: int
    barrier: Barrier
    told: list[Any] = field(repr=False)

    def all_gather_object(self, value: Any) -> list[Any]:
        self.told[self.rank] = value
        self.barrier.wait(30)
        everyone = list(self.told)
        self.barrier.wait(30)
        return everyone

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        return self.all_gather_object(value)[src]

    def gather_object(self, value: Any, dst: int = 0) -> list[Any] | None:
        everyone = self.all_gather_object(value)
        return everyone if self.rank == dst else None

    def subgroup(self, ranks: Sequence[int], name: str) -> Thread:
        raise NotImplementedError

    def close(self) -> None:
        pass


def save(folder: Path, parts: list[TensorPart]) -> None:
    size = len(parts)
    barrier, told = Barrier(size), [None] * size

    def of_rank(rank: int) -> None:
        checkpoint.save(folder / "step-1", step=1, model_state={"w": parts[rank]}, comm=Thread(rank, size, barrier, told))

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(of_rank, range(size)))


@settings(max_examples=60, deadline=None, database=None)
@given(changes())
def test_what_is_saved_in_parts_is_read_in_any_other_parts(change: tuple[Held, Held]) -> None:
    saved, wanted = change
    shape = saved.placement.shape
    full = torch.arange(1.0, prod(shape) + 1).view(shape)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), saved.parts(full))
        found = checkpoint.load(folder)
        assert torch.equal(found.model_state()["w"], full)
        for part in wanted.parts(full):
            target = TensorPart(torch.zeros_like(part.values), part.of, part.start)
            found.load_model({"w": target})
            assert torch.equal(target.values, part.values)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (2, 1, 3, 2), (1, 1, 5)])
def test_boxes_of_every_range_are_its_elements_once_and_few(shape: tuple[int, ...]) -> None:
    local = Local(Placement("w", shape))
    full, length = torch.arange(prod(shape)).view(shape), prod(shape)
    for start in range(length + 1):
        for stop in range(start, length + 1):
            found = boxes(local, start, stop)
            assert len(found) <= max(1, 2 * len(shape) - 1)
            seen = [value for box in found for value in box.view(torch.arange(start, stop)).reshape(-1).tolist()]
            assert sorted(seen) == list(range(start, stop))
            assert all(torch.equal(full[box.of_whole], box.view(torch.arange(start, stop))) for box in found)
            assert sum(box.numel for box in found) == stop - start
            whole = [mine for mine, _ in overlaps(found, boxes(local, 0, length))]
            assert sum(box.numel for box in whole) == stop - start
