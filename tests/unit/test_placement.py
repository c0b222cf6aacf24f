"""Placement: taking a tensor apart over any grid and putting it together gives the same tensor."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.layout import Layout
from ringfold.parallel.placement import Partial, Placement, Replicate, Shard

GRIDS = ["dp1", "dp3", "tp2", "dp2 tp3", "dp2 tp2 cp3 pp2"]
AXES_CASES = {
    "replicated": {},
    "said to be replicated": {"tp": Replicate(), "dp": Replicate()},
    "one dim": {"tp": Shard(0)},
    "two dims": {"tp": Shard(0), "dp": Shard(1)},
    "one dim twice": {"tp": Shard(1), "dp": Shard(1)},
    "fused": {"tp": Shard(0, (5, 2, 0, 3))},
    "fused, and cut again": {"tp": Shard(0, (5, 2, 3)), "dp": Shard(0), "cp": Shard(0)},
    "cut, then fused": {"dp": Shard(0), "tp": Shard(0, (5, 2, 3))},
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("axes", AXES_CASES.values(), ids=AXES_CASES.keys())
def test_taking_apart_and_putting_together_is_the_identity(axes, grid) -> None:
    layout = Layout.parse(grid).resolve(world_of(grid))
    full = torch.arange(70.0).view(10, 7)
    placement = Placement("blocks.0.w", (10, 7), axes)
    together, copies = torch.zeros(10, 7), torch.zeros(10, 7)
    for rank in range(layout.world_size):
        place = layout.coordinate(rank)
        local = placement.take(full, place, layout.sizes)
        assert tuple(local.shape) == placement.local_shape(place, layout.sizes)
        if placement.is_first_copy(place):
            placement.put(together, local, place, layout.sizes)
            for of_full, _ in placement.blocks(place, layout.sizes):
                copies[of_full] += 1
    assert torch.equal(together, full)
    assert torch.equal(copies, torch.ones(10, 7)), "an element is held by no first copy, or by several"


def world_of(grid: str) -> int:
    world = 1
    for word in grid.split():
        world *= int(word[2:])
    return world


def test_uneven_lengths_differ_by_at_most_one_and_the_first_ranks_hold_more() -> None:
    placement = Placement("w", (7, 2), {"tp": Shard(0)})
    assert [placement.local_shape({"tp": place}, {"tp": 3}) for place in range(3)] == [(3, 2), (2, 2), (2, 2)]
    assert [placement.local_shape({"tp": place}, {"tp": 9})[0] for place in range(9)] == [1] * 7 + [0, 0]


def test_a_fused_tensor_is_cut_piece_by_piece() -> None:
    qkv = torch.arange(10)
    placement = Placement("qkv", (10,), {"tp": Shard(0, (6, 2, 2))})
    assert placement.take(qkv, {"tp": 0}, {"tp": 2}).tolist() == [0, 1, 2, 6, 8]
    assert placement.take(qkv, {"tp": 1}, {"tp": 2}).tolist() == [3, 4, 5, 7, 9]
    not_fused = Placement("qkv", (10,), {"tp": Shard(0)})
    assert not_fused.take(qkv, {"tp": 0}, {"tp": 2}).tolist() == [0, 1, 2, 3, 4]


def test_the_terms_of_a_partial_tensor_are_added_where_they_belong() -> None:
    placement = Placement("g", (5, 3), {"dp": Partial(), "tp": Shard(0)})
    sizes = {"dp": 3, "tp": 2}
    full = torch.zeros(5, 3)
    for dp, tp in product(range(3), range(2)):
        place = {"dp": dp, "tp": tp}
        assert placement.is_first_copy(place)
        placement.put(full, torch.full(placement.local_shape(place, sizes), 10.0**dp), place, sizes)
    assert torch.equal(full, torch.full((5, 3), 111.0))
    with pytest.raises(ConfigError, match="g is partial along dp"):
        placement.take(full, {"dp": 0, "tp": 0}, sizes)
    assert placement.take(full, {"dp": 0, "tp": 1}, {"dp": 1, "tp": 2}).shape == (2, 3)


def test_a_scalar_and_an_empty_tensor_have_a_place() -> None:
    assert Placement("step", ()).take(torch.tensor(3.0), {"dp": 1}, {"dp": 2}).item() == 3.0
    empty = Placement("e", (0, 3), {"tp": Shard(0)})
    assert empty.take(torch.zeros(0, 3), {"tp": 1}, {"tp": 2}).shape == (0, 3)


@pytest.mark.parametrize("axes", [*AXES_CASES.values(), {"dp": Partial()}])
def test_json_is_read_back_equal(axes) -> None:
    placement = Placement("blocks.0.w", (10, 7), axes)
    read = Placement.from_json(placement.to_json())
    assert read == placement
    assert hash(read) == hash(placement)
    assert list(read.axes) == list(placement.axes), "the order of axes is the order of the cuts"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "w", "shape": [2], "axes": {"tp": {"kind": "tiled"}}}', '{"name": "w", "shape": 3}'])
def test_json_that_is_no_placement_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a placement"):
        Placement.from_json(text)


def test_a_shard_that_does_not_fit_its_tensor_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"w has shape \(10, 7\): axis tp cannot shard dim 2"):
        Placement("w", (10, 7), {"tp": Shard(2)})
    with pytest.raises(ConfigError, match=r"pieces \(5, 4\), which add up to 9 and not to 10"):
        Placement("w", (10, 7), {"tp": Shard(0, (5, 4))})
    with pytest.raises(ConfigError, match=r"full tensor has shape \(7,\), expected \(10, 7\)"):
        Placement("w", (10, 7)).take(torch.zeros(7), {}, {})
    with pytest.raises(ConfigError, match=r"local tensor has shape \(10, 7\), expected \(5, 7\)"):
        Placement("w", (10, 7), {"tp": Shard(0)}).put(torch.zeros(10, 7), torch.zeros(10, 7), {"tp": 0}, {"tp": 2})
