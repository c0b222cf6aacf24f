"""DeviceMesh: which ranks an axis joins, and that its communicators join exactly these."""

from __future__ import annotations

import pytest
import torch
from ringfold.collectives.errors import ConfigError, LayoutError
from ringfold.parallel.layout import Layout
from ringfold.parallel.mesh import DeviceMesh

from tests.harness import run_ranks


def mesh_of(world, text: str) -> DeviceMesh:
    return DeviceMesh(Layout.parse(text), world, local_rank=world.rank)


def ranks_of_axes(world, text: str, asked: list) -> list:
    mesh = mesh_of(world, text)
    return [list(mesh.ranks(axes)) for axes in asked]


def test_tp_is_fastest_then_cp_dp_pp() -> None:
    found = run_ranks(4, ranks_of_axes, "pp2 dp2", ["dp", "pp", ("dp", "pp"), "tp", ("pp", "tp")])
    assert found[0] == [[0, 1], [0, 2], [0, 1, 2, 3], [0], [0, 2]]
    assert found[3] == [[2, 3], [1, 3], [0, 1, 2, 3], [3], [1, 3]]


def sums_over_axes(world, text: str, asked: list) -> list:
    mesh = mesh_of(world, text)
    sums = []
    for axes in asked:
        value = torch.tensor([10.0**world.rank], dtype=torch.float64)
        assert mesh[axes].members == tuple(mesh.ranks(axes))
        mesh[axes].all_reduce(value)
        sums.append(int(value))
    mesh.close()
    return sums


def test_a_communicator_joins_the_ranks_of_its_axes() -> None:
    found = run_ranks(4, sums_over_axes, "dp2 tp2", ["dp", "tp", ("dp", "tp"), "cp"])
    assert found == [[101, 11, 1111, 1], [1010, 11, 1111, 10], [101, 1100, 1111, 100], [1010, 1100, 1111, 1000]]


def identities(world) -> None:
    mesh = mesh_of(world, "fp64")
    assert mesh.layout == Layout(dp=world.size, precision="fp64")
    assert (mesh.rank, mesh.size, mesh.local_rank, mesh.device) == (world.rank, world.size, world.rank, torch.device("cpu"))
    assert mesh.coordinate == {"pp": 0, "dp": world.rank, "cp": 0, "tp": 0}
    assert mesh["dp"] is mesh["dp"]
    assert mesh["dp", "cp"] is mesh["dp"]
    assert mesh["cp", "dp"] is mesh["dp"]
    assert mesh["dp"].size == world.size
    assert mesh["tp"].size == 1
    assert "dp" in mesh["dp"].name
    mesh.close()
    mesh.close()
    with pytest.raises(ConfigError, match="after the mesh was closed"):
        mesh["dp"]
    world.barrier()


@pytest.mark.parametrize("size", [1, 3])
def test_a_communicator_is_made_once_and_closed_with_the_mesh(size: int) -> None:
    run_ranks(size, identities)


def refusals(world) -> None:
    mesh = mesh_of(world, "")
    for axes, said in [("rows", "the axes are pp, dp, cp, tp"), ((), "name one axis"), (("dp", "dp"), "different")]:
        with pytest.raises(ConfigError, match=said):
            mesh[axes]
    with pytest.raises(LayoutError, match="dp3 needs 3 workers, world_size is 1"):
        mesh_of(world, "dp3")


def test_an_axis_that_is_none_and_a_layout_that_does_not_fit_are_refused() -> None:
    run_ranks(1, refusals)
