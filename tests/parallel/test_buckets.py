"""GradientBuckets: what reaches the buckets, in which order they leave, and what the gradients are afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from ringfold.collectives.errors import CommunicationError, ConfigError
from ringfold.parallel.buckets import GradientBuckets
from torch import nn

from tests.harness import run_ranks

F64 = torch.float64


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = F64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]


def named(parameters: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{index}", parameter) for index, parameter in enumerate(parameters)]


def backward(parameters: list[nn.Parameter], factor: float) -> None:
    """Give every parameter the gradient `factor` times its index + 1, everywhere."""
    torch.stack([(index + 1) * factor * p.sum() for index, p in enumerate(parameters)]).sum().backward()


def assert_gradients(parameters: list[nn.Parameter], factor: float | None) -> None:
    for index, parameter in enumerate(parameters):
        if factor is None:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, torch.full_like(parameter, (index + 1) * factor)), index


def sums_in_small_buckets(world, averaged: bool) -> None:
    parameters = leaves((5, 3), (0, 2), (), (300,), (7,), (1, 1, 2))
    buckets = GradientBuckets(named(parameters), world, averaged, bucket_mb=0.001)
    total = sum(range(1, world.size + 1)) / (world.size if averaged else 1)
    for _ in range(3):
        backward(parameters, world.rank + 1.0)
        assert_gradients(parameters, total)
        assert world.size == 1 or len(buckets.nbytes_of_each) == 3
        for parameter in parameters:
            assert world.size == 1 or parameter.numel() == 0 or world.is_registered(parameter.grad)
            parameter.grad = None
    buckets.close()


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradients_of_all_shapes_are_reduced_into_registered_memory(size: int, averaged: bool) -> None:
    run_ranks(size, sums_in_small_buckets, averaged)


def sizes_of_buckets(world) -> None:
    parameters = leaves((1 << 17,), (1 << 18,), (1 << 18,), (1 << 17,), (1 << 16,), (10,), dtype=torch.float32)
    parameters += leaves((3,), dtype=torch.float64)
    buckets = GradientBuckets(named(parameters), world, True, bucket_mb=2)
    # The first bucket closes at 1 MiB (p5 p4 p3), the second at 2 MiB (p2 p1); p6, alone in its dtype, was begun before p0.
    megabytes = [nbytes / 2**20 for nbytes in buckets.nbytes_of_each]
    assert megabytes == pytest.approx([0.75, 2, 0, 0.5], abs=0.01)
    buckets.close()
    world.barrier()


def test_the_first_bucket_is_small_and_no_bucket_mixes_dtypes() -> None:
    run_ranks(2, sizes_of_buckets)


def order_of_hooks(world) -> None:
    parameters = leaves((1000,), (999,), (998,), (997,))
    buckets = GradientBuckets(named(parameters), world, False, bucket_mb=0.001)
    assert len(buckets.nbytes_of_each) == 4
    # Each rank walks through the parameters in another order, so hooks fire in another order.
    for step in range(4):
        order = [(position * 3 + world.rank + step) % 4 for position in range(4)]
        total = torch.zeros((), dtype=F64)
        for index in order:
            total = total * 1.0 + (index + 1.0) * parameters[index].sum()
        total.backward()
        assert_gradients(parameters, float(world.size))
        for parameter in parameters:
            parameter.grad = None
    buckets.close()


@pytest.mark.parametrize("size", [2, 3])
def test_buckets_leave_in_their_order_whatever_the_order_of_hooks(size: int) -> None:
    run_ranks(size, order_of_hooks)


def early_launch(world) -> int:
    parameters = leaves((1000,), (1000,), (1000,))
    buckets = GradientBuckets(named(parameters), world, False, bucket_mb=0.001)
    launched_before_the_last = []
    value = torch.ones((), dtype=F64, requires_grad=True)
    value.register_hook(lambda _: launched_before_the_last.append(buckets._launched))
    hidden = value * parameters[0].sum()
    (hidden * parameters[1].sum() * parameters[2].sum()).backward()
    buckets.close()
    return launched_before_the_last[0]


def test_communication_starts_before_backward_has_ended() -> None:
    assert all(launched >= 2 for launched in run_ranks(2, early_launch))


def unused_parameters(world) -> None:
    used_by_all, used_by_last, used_by_none, used_by_first = parameters = leaves((3,), (4,), (5,), (2, 2))
    buckets = GradientBuckets(named(parameters), world, True)
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        loss = used_by_all.sum()
        if world.rank == world.size - 1:
            loss = loss + 2.0 * used_by_last.sum()
        if world.rank == 0:
            loss = loss + 4.0 * used_by_first.sum()
        loss.backward()
        assert used_by_none.grad is None
        assert torch.equal(used_by_all.grad, torch.ones_like(used_by_all))
        torch.testing.assert_close(used_by_last.grad, torch.full_like(used_by_last, 2.0 / world.size), rtol=1e-15, atol=0)
        torch.testing.assert_close(used_by_first.grad, torch.full_like(used_by_first, 4.0 / world.size), rtol=1e-15, atol=0)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(used_by_none, torch.ones_like(used_by_none)), "weight decay was applied to a parameter that no rank used"
    buckets.close()


@pytest.mark.parametrize("size", [2, 3])
def test_unused_everywhere_keeps_none_and_unused_somewhere_contributes_zero(size: int) -> None:
    run_ranks(size, unused_parameters)


def states_of_grad(world) -> None:
    parameters = leaves((3,), (2, 5))
    buckets = GradientBuckets(named(parameters), world, True)
    mean = (world.size + 1) / 2
    backward(parameters, world.rank + 1.0)
    views = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad.zero_()  # zero_grad(set_to_none=False)
    backward(parameters, world.rank + 1.0)
    assert_gradients(parameters, mean)
    assert all(parameter.grad is view for parameter, view in zip(parameters, views, strict=True)), "copied without need"

    parameters[0].grad = torch.full_like(parameters[0], 10.0)  # the user's own tensor: accumulated into, then taken over
    parameters[1].grad = None
    backward(parameters, world.rank + 1.0)
    assert torch.equal(parameters[0].grad, torch.full_like(parameters[0], mean + 10))
    assert torch.equal(parameters[1].grad, torch.full_like(parameters[1], 2 * mean))
    assert parameters[0].grad is views[0]

    parameters[1].grad = None  # a stale view must not come back when the parameter is not used
    parameters[0].sum().backward()
    assert parameters[1].grad is None
    buckets.close()


@pytest.mark.parametrize("size", [2, 3])
def test_zeroed_dropped_and_replaced_gradients_are_all_right(size: int) -> None:
    run_ranks(size, states_of_grad)


def layouts_of_memory(world) -> None:
    parameters = [
        nn.Parameter(torch.ones(2, 3, 4, 5, dtype=F64).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.ones(4, 6, dtype=F64).t()),
        nn.Parameter(torch.ones(4, 6, dtype=F64)[:, ::2]),
        nn.Parameter(torch.ones(3, 1, dtype=F64).expand(3, 4)),
    ]
    buckets = GradientBuckets(named(parameters), world, False)
    factors = [torch.arange(float(p.numel()), dtype=F64).view(p.shape) for p in parameters]
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = None
        torch.stack([(p * f).sum() * (world.rank + 1) for p, f in zip(parameters, factors, strict=True)]).sum().backward()
        for parameter, factor in zip(parameters, factors, strict=True):
            assert torch.equal(parameter.grad, factor * sum(range(1, world.size + 1)))
    assert parameters[0].grad.stride() == parameters[0].stride()
    assert parameters[1].grad.stride() == parameters[1].stride()
    buckets.close()


def test_gradients_of_parameters_in_any_memory_layout_are_right() -> None:
    run_ranks(2, layouts_of_memory)


def accumulation(world) -> None:
    parameters = leaves((3,), (700,), (2,))
    buckets = GradientBuckets(named(parameters), world, False, bucket_mb=0.001)
    mine, total = world.rank + 1.0, float(sum(range(1, world.size + 1)))
    with buckets.no_sync():
        backward(parameters, mine)
        assert_gradients(parameters, mine)
        backward(parameters, mine)
        assert_gradients(parameters, 2 * mine)
    backward(parameters[:2], mine)  # p2 was used under no_sync only
    assert_gradients(parameters[:2], 3 * total)
    assert torch.equal(parameters[2].grad, torch.full((2,), 6 * total, dtype=F64))

    for parameter in parameters:
        parameter.grad = None
    with pytest.raises(ZeroDivisionError), buckets.no_sync():
        raise ZeroDivisionError
    backward(parameters, mine)
    assert_gradients(parameters, total)
    buckets.close()


@pytest.mark.parametrize("size", [2, 3])
def test_no_sync_accumulates_locally_and_the_next_backward_reduces_the_sum(size: int) -> None:
    run_ranks(size, accumulation)


def steps_by_hand(world) -> None:
    parameters = leaves((3,), (700,))
    buckets = GradientBuckets(named(parameters), world, False, bucket_mb=0.001)
    total = float(sum(range(1, world.size + 1)))
    # Weight gradients of a pipeline: torch.autograd.grad fires no hook.
    buckets.begin()
    grads = torch.autograd.grad((parameters[0].sum() + 2.0 * parameters[1].sum()) * (world.rank + 1.0), parameters)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
        buckets.gradient_ready(parameter)
    buckets.finish()
    assert_gradients(parameters, total)

    # Several backwards in one step, none of them on the last rank.
    for parameter in parameters:
        parameter.grad = None
    buckets.begin()
    if world.rank < world.size - 1:
        with buckets.no_sync():
            backward(parameters, 1.0)
        backward(parameters, 1.0)
        assert not all(parameter.grad is None for parameter in parameters)
    buckets.finish()
    assert_gradients(parameters, 2.0 * (world.size - 1))

    with pytest.raises(ConfigError, match=r"outside of backward.*begin\(\) and finish\(\)"):
        buckets.gradient_ready(parameters[0])
    buckets.begin()
    parameters[0].grad = None
    with pytest.raises(ConfigError, match=r"gradient_ready\(p0\) was called, but the parameter has no gradient"):
        buckets.gradient_ready(parameters[0])
    buckets.close()


@pytest.mark.parametrize("size", [2, 3])
def test_a_step_between_begin_and_finish_takes_gradients_from_anywhere_or_nowhere(size: int) -> None:
    run_ranks(size, steps_by_hand)


def no_backward(world) -> None:
    parameters = leaves((3,), (700,))
    buckets = GradientBuckets(named(parameters), world, True, bucket_mb=0.001)
    for idle in range(world.size):
        if world.rank == idle:
            buckets.finish()
        else:
            backward(parameters, 6.0)
        for index, parameter in enumerate(parameters):
            expected = torch.full_like(parameter, (index + 1) * 6.0 * (world.size - 1) / world.size)
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-15, atol=0)
            parameter.grad = None
    buckets.close()


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_without_a_backward_takes_part_through_finish(size: int) -> None:
    run_ranks(size, no_backward)


def different_parameters(world) -> str:
    shapes = [(2, 3), (4,)] if world.rank < 2 else [(2, 3), (5,), (1,)]
    parameters = leaves(*shapes, dtype=F64 if world.rank != 1 else torch.float32)
    parameters[0].requires_grad_(world.rank != 1)
    with pytest.raises(ConfigError) as caught:
        GradientBuckets(named(parameters), world, True)
    return str(caught.value)


def test_ranks_with_different_parameters_are_told_what_differs() -> None:
    messages = run_ranks(3, different_parameters)
    assert len(set(messages)) == 1
    for line in (
        "rank 1: p0 is (2, 3) float32 frozen, on rank 0 (2, 3) float64 trained",
        "rank 1: p1 is (4,) float32 trained, on rank 0 (4,) float64 trained",
        "rank 2: p2 is (1,) float64 trained, and rank 0 does not have it",
        "rank 2: p1 is (5,) float64 trained, on rank 0 (4,) float64 trained",
    ):
        assert line in messages[0]


def order_of_parameters(world) -> None:
    parameters = named(leaves((2,), (2,)))
    with pytest.raises(ConfigError, match="rank 1: the order differs: p1 stands where rank 0 has p0"):
        GradientBuckets(parameters if world.rank == 0 else parameters[::-1], world, True)


def test_the_same_parameters_in_another_order_are_refused() -> None:
    run_ranks(2, order_of_parameters)


def tied_and_frozen(world) -> None:
    shared, frozen, other = leaves((3,), (4,), (2,))
    frozen.requires_grad_(False)
    buckets = GradientBuckets([("a", shared), ("frozen", frozen), ("b", shared), ("c", other)], world, False)
    (shared.sum() + 2.0 * shared.sum() + other.sum() + frozen.sum()).backward()
    assert torch.equal(shared.grad, torch.full_like(shared, 3.0 * world.size))
    assert frozen.grad is None
    frozen.requires_grad_(True)
    with pytest.raises(ConfigError, match="requiring a gradient now, which would not be reduced: frozen"):
        (shared.sum() + frozen.sum()).backward()
    frozen.requires_grad_(False)
    for parameter in (shared, other):
        parameter.grad = None
    other.requires_grad_(False)  # freezing later is the same as not using
    shared.sum().backward()
    assert torch.equal(shared.grad, torch.full_like(shared, float(world.size)))
    assert other.grad is None
    buckets.close()


def test_tied_parameters_count_once_and_a_thawed_one_is_not_forgotten_silently() -> None:
    run_ranks(2, tied_and_frozen)


def reentrant_twice(world) -> None:
    from torch.utils.checkpoint import checkpoint

    weight, early = leaves((3,), (3,))
    buckets = GradientBuckets([("early", early), ("weight", weight)], world, False)
    x = torch.ones(3, dtype=F64, requires_grad=True)
    buckets.begin()
    hidden = checkpoint(lambda h: h * weight, x, use_reentrant=True)
    hidden = checkpoint(lambda h: h * weight, hidden * early, use_reentrant=True)
    with_buckets_of_their_own = GradientBuckets([("weight", weight)], world, False)
    with_buckets_of_their_own.begin()
    with pytest.raises(CommunicationError, match="weight became ready a second time"):
        hidden.sum().backward()
    for each in (with_buckets_of_their_own, buckets):
        each.close()
    world.barrier()


def test_a_gradient_that_changes_after_it_was_sent_is_an_error() -> None:
    run_ranks(2, reentrant_twice)


def forgotten(world) -> None:
    parameters = leaves((3,))
    buckets = GradientBuckets(named(parameters), world, True)
    backward(parameters, 1.0)
    reference, parameter = weakref.ref(buckets), weakref.ref(parameters[0])
    del buckets, parameters
    gc.collect()
    assert reference() is None
    assert parameter() is None
    world.barrier()


def test_buckets_that_are_dropped_without_close_do_not_leak_the_model() -> None:
    run_ranks(2, forgotten)


def closed(world) -> None:
    parameters = leaves((3,), (4,))
    buckets = GradientBuckets(named(parameters), world, True)
    backward(parameters, world.rank + 1.0)
    buckets.close()
    buckets.close()
    assert_gradients(parameters, 1.5)
    for parameter in parameters:
        parameter.grad = None
    backward(parameters, world.rank + 1.0)
    assert_gradients(parameters, world.rank + 1.0)
    buckets.finish()
    world.barrier()


def test_after_close_gradients_are_the_ranks_own() -> None:
    run_ranks(2, closed)
