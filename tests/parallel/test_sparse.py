"""Sparse gradients of embeddings: they stay sparse, equal the dense ones, and keep nobody waiting."""

from __future__ import annotations

import pytest
import torch
from ringfold.parallel.buckets import GradientBuckets
from ringfold.parallel.sparse import sparse_parameter_names
from torch import nn

from tests.harness import run_ranks
from tests.parallel.test_buckets import F64, leaves


def sparse_tables(world) -> None:
    generator = torch.Generator().manual_seed(5)
    weights = {name: torch.randn(11, 4, generator=generator, dtype=F64) for name in ("table", "tied", "unused")}
    rows = [torch.tensor([[1, 3, 3]]), torch.tensor([[0]]), torch.zeros(1, 0, dtype=torch.int64)]  # counts differ; the last has none

    def build(sparse: bool) -> nn.ModuleDict:
        tables = {name: nn.Embedding(11, 4, sparse=sparse, dtype=F64) for name in weights}
        for name, table in tables.items():
            table.weight.data.copy_(weights[name])
        return nn.ModuleDict(tables)

    def loss(model: nn.ModuleDict, ids: torch.Tensor) -> torch.Tensor:
        hidden = model["table"](ids) ** 2 + model["tied"](ids)
        return hidden.sum() + (hidden @ model["tied"].weight.t()).sum() if ids.numel() else hidden.sum()

    model, oracle = build(sparse=True), build(sparse=False)
    sparse = sparse_parameter_names(model)
    assert sparse == {"table.weight", "tied.weight", "unused.weight"}
    buckets = GradientBuckets(model.named_parameters(), world, True, sparse=sparse)
    for step in range(3):
        for each in (model, oracle):
            each.zero_grad()
        if step == 2:  # accumulated first
            with buckets.no_sync():
                loss(model, rows[world.rank]).backward()
        loss(model, rows[world.rank]).backward()
        (sum(loss(oracle, ids) for ids in rows[: world.size]) * (2 if step == 2 else 1) / world.size).backward()
        table = model["table"].weight.grad
        assert table.is_sparse
        if world.size > 1:
            assert table.is_coalesced()
            assert table._nnz() == 3
        torch.testing.assert_close(table.to_dense(), oracle["table"].weight.grad, rtol=1e-13, atol=1e-13)
        tied = model["tied"].weight.grad
        torch.testing.assert_close(tied.to_dense() if tied.is_sparse else tied, oracle["tied"].weight.grad, rtol=1e-13, atol=1e-13)
        assert model["unused"].weight.grad is None
    buckets.close()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sparse_gradients_stay_sparse_and_equal_the_dense_ones(size: int) -> None:
    run_ranks(size, sparse_tables)


def undeclared_sparse(world) -> None:
    table = nn.Parameter(torch.zeros(5, 2, dtype=F64))
    buckets = GradientBuckets([("table", table)], world, False)
    nn.functional.embedding(torch.tensor([world.rank, 4]), table, sparse=True).sum().backward()
    expected = torch.zeros(5, 2, dtype=F64)
    expected[: world.size] = 1.0
    expected[4] = world.size
    assert torch.equal(table.grad, expected)
    buckets.close()


def test_a_sparse_gradient_that_was_not_announced_is_reduced_densely() -> None:
    run_ranks(2, undeclared_sparse)


def sparse_in_different_orders(world) -> None:
    """Two sets of buckets in one backward, begun in another order on each rank: they take turns, or the ranks wait for each other."""
    tables = [nn.Embedding(5, 2, sparse=True, dtype=F64) for _ in range(2)]
    dense = leaves((4,), (4,))
    sets = [
        GradientBuckets([("table", table.weight), ("dense", parameter)], world, False, sparse={"table"})
        for table, parameter in zip(tables, dense, strict=True)
    ]
    value = torch.zeros((), dtype=F64)
    for index in (0, 1) if world.rank == 0 else (1, 0):
        value = value * 1.0 + tables[index](torch.tensor([world.rank])).sum() + dense[index].sum()
    value.backward()
    for table, parameter in zip(tables, dense, strict=True):
        assert torch.equal(table.weight.grad.to_dense().sum(1), torch.tensor([2.0] * world.size + [0.0] * (5 - world.size), dtype=F64))
        assert torch.equal(parameter.grad, torch.full((4,), float(world.size), dtype=F64))
    for each in sets:
        each.close()


def test_two_sets_of_buckets_in_one_backward_do_not_wait_for_each_other() -> None:
    run_ranks(2, sparse_in_different_orders)
