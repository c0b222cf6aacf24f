"""Cut: dividing, joining, and following a change of shape, against indices that are simply looked up."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ringfold.parallel.split.cut import Cut, regroup, with_length


def seats(size: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(name="tp", rank=rank, size=size) for rank in range(size)]


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[int], list[Cut]]:
    """A shape, and a cut of it as each rank has it."""
    size = draw(st.integers(1, 3))
    outer, unit, pieces = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    bounds = [0, *sorted(draw(st.lists(st.integers(1, 6), min_size=pieces, max_size=pieces, unique=True)))]
    order = draw(st.lists(st.integers(0, size - 1), min_size=pieces, max_size=pieces))
    runs = tuple(tuple((a * unit, b * unit) for place, a, b in zip(order, bounds, bounds[1:], strict=False) if place == rank) for rank in range(size))
    shape = draw(st.lists(st.integers(1, 3), max_size=2))
    dim = draw(st.integers(0, len(shape)))
    shape.insert(dim, outer * bounds[-1] * unit)
    return shape, [Cut(seat, dim, outer, bounds[-1] * unit, runs) for seat in seats(size)]


@settings(max_examples=300, deadline=None)
@given(cuts())
def test_what_ranks_take_joins_to_the_whole(case: tuple[list[int], list[Cut]]) -> None:
    shape, of_ranks = case
    whole = torch.arange(math.prod(shape)).view(shape)
    parts = [cut.take(whole) for cut in of_ranks]
    assert [list(part.shape) for part in parts] == [with_length(shape, [cut]) for cut in of_ranks]
    assert of_ranks[0].join(parts).equal(whole)


@settings(max_examples=500, deadline=None)
@given(cuts(), st.data())
def test_a_cut_that_is_followed_through_a_view_is_that_of_the_view(case: tuple[list[int], list[Cut]], data: st.DataObject) -> None:
    shape, of_ranks = case
    whole = torch.arange(math.prod(shape)).view(shape)
    factors = data.draw(st.permutations([p for p in (2, 2, 3, 3, 5) if True]))
    after, rest = [], math.prod(shape)
    for factor in factors:
        if rest % factor == 0 and data.draw(st.booleans()):
            after.append(factor)
            rest //= factor
    after.insert(data.draw(st.integers(0, len(after))), rest)
    for cut in of_ranks:
        found = regroup(cut, shape, after)
        if found is not None:
            assert cut.take(whole).reshape(with_length(after, [found])).equal(found.take(whole.view(after)))
    assert len({regroup(cut, shape, after) is None for cut in of_ranks}) == 1, "ranks would part here"


@settings(max_examples=300, deadline=None)
@given(cuts(), st.data())
def test_the_cut_within_a_range_is_that_of_the_range(case: tuple[list[int], list[Cut]], data: st.DataObject) -> None:
    shape, of_ranks = case
    whole = torch.arange(math.prod(shape)).view(shape)
    length = of_ranks[0].length
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    found = [cut.within(start, stop) for cut in of_ranks]
    assert len({one is None for one in found}) == 1
    for cut, one in zip(of_ranks, found, strict=True):
        if one is not None:
            part, begin = one
            mine = cut.take(whole).narrow(cut.dim, begin, part.local_length)
            assert mine.equal(part.take(whole.narrow(cut.dim, start, stop - start)))


SEAT = seats(2)[0]
HEADS = Cut.evenly(SEAT, 2, 24)


@pytest.mark.parametrize(
    ("cut", "before", "after", "dim", "outer", "period"),
    [
        (HEADS, (5, 7, 24), (5, 7, 6, 4), 2, 1, 6),
        (Cut.evenly(SEAT, 1, 7), (5, 7, 24), (35, 24), 0, 5, 7),
        (Cut(SEAT, 0, 5, 7, Cut.evenly(SEAT, 0, 7).runs), (35, 24), (5, 7, 24), 1, 1, 7),
        (Cut(SEAT, 2, 3, 8, Cut.evenly(SEAT, 0, 8).runs), (5, 7, 24), (5, 7, 3, 2, 4), 3, 1, 2),
        (Cut(SEAT, 2, 1, 24, (((0, 4), (8, 12), (16, 20)), ((4, 8), (12, 16), (20, 24)))), (5, 7, 24), (5, 7, 3, 2, 4), 3, 1, 2),
        (Cut.evenly(SEAT, 2, 6), (5, 7, 6, 4), (5, 7, 24), 2, 1, 24),
    ],
)
def test_views_of_attention_are_followed(cut: Cut, before: tuple, after: tuple, dim: int, outer: int, period: int) -> None:
    found = regroup(cut, before, after)
    assert found is not None
    assert (found.dim, found.outer, found.period) == (dim, outer, period)


@pytest.mark.parametrize(("before", "after"), [((0, 5, 12), (0, 5, 6, 2)), ((0, 5, 12), (0, 12)), ((0, 12), (0, 5, 12)), ((3, 0, 12), (3, 0, 2, 6))])
def test_views_without_rows_are_followed(before: tuple, after: tuple) -> None:
    cuts = [Cut.evenly(seat, len(before) - 1, 12) for seat in seats(2)]
    for cut in cuts:
        found = regroup(cut, before, after)
        assert found is not None
        assert found.take(torch.empty(after)).shape == cut.take(torch.empty(before)).reshape(with_length(after, [found])).shape


def test_rows_without_any_merge_with_a_divided_dimension_and_part_again() -> None:
    cut = Cut.evenly(SEAT, 1, 6)
    merged = regroup(cut, (0, 6, 12), (0, 12))
    assert merged is not None
    assert merged.outer == 0
    assert regroup(merged, (0, 12), (0, 6, 12)) == cut


def test_a_view_that_divides_a_head_is_not_followed() -> None:
    assert regroup(Cut.evenly(SEAT, 1, 12), (2, 12), (2, 3, 4)) is None
