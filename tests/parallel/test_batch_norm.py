"""Synchronised BatchNorm: forward, backward and running statistics of the whole batch, however its rows are spread."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from ringfold.parallel.batch_norm import desynchronise_batch_norm, synchronise_batch_norm
from torch import nn

from tests.harness import run_ranks

F64 = torch.float64
ROWS = {1: [5], 2: [4, 1], 3: [3, 0, 2], 4: [0, 1, 0, 4]}
CASES = {
    "1d": (lambda: nn.BatchNorm1d(3), (3,)),
    "1d with positions": (lambda: nn.BatchNorm1d(3), (3, 7)),
    "2d": (lambda: nn.BatchNorm2d(3), (3, 4, 5)),
    "3d": (lambda: nn.BatchNorm3d(3), (3, 2, 4, 5)),
    "without weight": (lambda: nn.BatchNorm2d(3, affine=False), (3, 4, 5)),
    "cumulative average": (lambda: nn.BatchNorm1d(3, momentum=None), (3,)),
    "without running statistics": (lambda: nn.BatchNorm1d(3, track_running_stats=False), (3,)),
    "torch's synchronised": (lambda: nn.SyncBatchNorm(3), (3, 4, 5)),
}


def compare(world, case: str, mean: float, rows: list[int], dtype: torch.dtype, tolerance: float) -> None:
    """Run three batches on the rank's rows, and on all rows in one plain module in float64; compare all that comes out."""
    build, shape = CASES[case]
    torch.manual_seed(1)
    plain = build().to(F64)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    module = copy.deepcopy(plain).to(dtype)
    synchronise_batch_norm(module, world)
    mine = slice(sum(rows[: world.rank]), sum(rows[: world.rank + 1]))
    for _ in range(3):
        x = (mean + torch.randn(sum(rows), *shape, dtype=F64)).to(dtype)
        dy = torch.randn(sum(rows), *shape, dtype=F64).to(dtype)
        whole, part = x.to(F64, copy=True).requires_grad_(), x[mine].detach().clone().requires_grad_()
        expected, output = plain(whole), module(part)
        assert output.dtype == dtype

        def close(actual: torch.Tensor, wanted: torch.Tensor, scale: float = 1.0) -> None:
            torch.testing.assert_close(actual.to(F64), wanted, rtol=tolerance, atol=tolerance * scale)

        close(output, expected[mine])
        for each in (module, plain):
            each.zero_grad()
        expected.backward(dy.to(F64))
        output.backward(dy[mine])
        close(part.grad, whole.grad[mine])
        for parameter, wanted in zip(module.parameters(), plain.parameters(), strict=True):
            gradient = parameter.grad.clone().float() if dtype is torch.bfloat16 else parameter.grad.clone()
            world.all_reduce(gradient)
            close(gradient, wanted.grad, scale=dy.numel())
        for (name, buffer), wanted in zip(module.named_buffers(), plain.buffers(), strict=True):
            if name != "num_batches_tracked":
                close(buffer, wanted)
            assert world.all_gather_object(buffer.tolist()) == [buffer.tolist()] * world.size
        assert not plain.track_running_stats or int(module.num_batches_tracked) == int(plain.num_batches_tracked)
    module.eval(), plain.eval()
    if world.rank == 0:  # alone: evaluation does not communicate
        x = mean + torch.randn(2, *shape, dtype=F64)
        close(module(x.to(dtype)), plain(x.to(dtype).to(F64)), scale=1 + abs(mean))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 3])
def test_it_equals_plain_batch_norm_over_all_rows(size: int, case: str) -> None:
    # A hundred roundings of float64, times the factor by which 1 / std magnifies them.
    run_ranks(size, compare, case, 0.5, ROWS[size], F64, 1e-12)


@pytest.mark.parametrize("size", [2, 4])
def test_it_is_exact_for_any_spread_of_rows(size: int) -> None:
    run_ranks(size, compare, "2d", 0.5, ROWS[size], F64, 1e-12)


def test_a_mean_far_from_zero_does_not_cancel_the_variance() -> None:
    # E[x^2] - E[x]^2 would lose (mean / std)^2 = 1e8 roundings; the merge loses mean / std = 1e4 of them.
    run_ranks(2, compare, "1d with positions", 1e4, ROWS[2], F64, 1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
def test_low_precision_is_as_good_as_its_roundings(dtype: torch.dtype, tolerance: float) -> None:
    # 2^-24 and 2^-9 for one rounding; outputs of order 4 and sums of a hundred values have some tens of them.
    run_ranks(2, compare, "2d", 0.5, ROWS[2], dtype, tolerance)


def wrong_merge(world) -> None:
    import ringfold.parallel.batch_norm as under_test

    merge = under_test._global_statistics

    def mean_of_means(x: torch.Tensor, comm):
        count, _, squares = merge(x, comm)
        local = x.mean(under_test._all_but_channels(x))
        comm.all_reduce(local, "avg")
        return count, local, squares

    under_test._global_statistics = mean_of_means
    try:
        compare(world, "1d", 0.5, ROWS[2], F64, 1e-12)
    finally:
        under_test._global_statistics = merge


def test_the_comparison_sees_a_mean_of_means() -> None:
    with pytest.raises(AssertionError, match="not close"):
        run_ranks(2, wrong_merge)


def one_value(world) -> None:
    module = nn.BatchNorm1d(3)
    synchronise_batch_norm(module, world)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got 1 on all 2 ranks"):
        module(torch.ones(1 - world.rank, 3))
    assert module(torch.ones(0, 3)).shape == (0, 3)
    assert torch.equal(module.running_mean, torch.zeros(3)), "an empty batch has no statistics"
    module(torch.ones(1, 3))  # one value here, two in all


def test_one_value_in_all_is_an_error_on_every_rank_and_no_value_is_none() -> None:
    run_ranks(2, one_value)


def channels_last(world) -> None:
    module = nn.BatchNorm2d(3)
    synchronise_batch_norm(module, world)
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    y = module(x)
    y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_stays_channels_last() -> None:
    run_ranks(2, channels_last)


class Own(nn.BatchNorm1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def conversion(world) -> None:
    shared = nn.BatchNorm1d(3)
    model = nn.Sequential(shared, nn.Sequential(nn.BatchNorm2d(3), shared), nn.LayerNorm(3), nn.InstanceNorm1d(3))
    before = [type(module) for module in model.modules()]
    parameters = list(model.parameters())
    synchronise_batch_norm(model, world)
    synchronise_batch_norm(model, world)
    assert model[0] is model[1][1] is shared
    assert shared.communicator is world
    assert isinstance(shared, nn.BatchNorm1d)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert type(model[2]) is nn.LayerNorm
    assert type(model[3]) is nn.InstanceNorm1d
    alone = copy.deepcopy(model)
    if world.rank == 0:
        alone[0](torch.randn(4, 3))
        assert alone[0].communicator is None
    desynchronise_batch_norm(model)
    assert [type(module) for module in model.modules()] == before
    assert not hasattr(shared, "communicator")
    with pytest.warns(UserWarning, match='"0" is a Own: its statistics stay those of each rank'):
        synchronise_batch_norm(nn.Sequential(Own(3)), world)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        synchronise_batch_norm(model, world)


def test_conversion_is_in_place_reversible_and_says_what_it_cannot_convert() -> None:
    run_ranks(2, conversion)
