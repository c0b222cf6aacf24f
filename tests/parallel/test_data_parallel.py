"""DataParallel: the same numbers as one process of plain PyTorch in float64 over the global batch, whatever the rows of each rank."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.buckets import GradientBuckets
from ringfold.parallel.data_parallel import DataParallel, broadcast_state
from torch import nn
from torch.nn import functional as F

from tests.harness import run_ranks

F64 = torch.float64
STEPS = 3
ROWS = {1: [7], 2: [5, 2], 3: [4, 0, 3]}  # uneven, and a rank with none


class Net(nn.Module):
    """Tied and frozen parameters, a table, norms, a head that is never used, and one that only some rows use."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(13, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.blocks = nn.Sequential(nn.Linear(6, 40, bias=False), nn.BatchNorm1d(40), nn.GELU(), nn.LayerNorm(40), nn.Linear(40, 6))
        self.unused = nn.Linear(6, 300)
        self.odd = nn.Linear(6, 6)
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("mask", torch.tensor([True, False, True, True, True, False]))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.table(ids)
        h = h + self.frozen(h) * self.scale + self.blocks(h) * self.mask
        if bool((ids % 2 == 1).any()):
            h = h + self.odd(h) * (ids % 2 == 1).unsqueeze(1)
        return h @ self.table.weight.t()


def batch(step: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(13, (rows,), generator=generator), torch.randint(13, (rows,), generator=generator)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)


def oracle(rows: int) -> tuple[list[dict[str, torch.Tensor | None]], dict[str, torch.Tensor]]:
    """Return the gradients of each step and the final state of one process with the whole batch."""
    model = Net(seed=0).to(F64)
    optimizer = optimizer_of(model)
    gradients = []
    for step in range(STEPS):
        ids, target = batch(step, rows)
        optimizer.zero_grad()
        F.cross_entropy(model(ids), target).backward()
        gradients.append({name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    return gradients, model.state_dict()


def train(world, rows: list[int], bucket_mb: float) -> dict[str, torch.Tensor]:
    """Train and compare every gradient of every step and the final state with the oracle; return the state."""
    expected_gradients, expected_state = oracle(sum(rows))
    model = DataParallel(Net(seed=world.rank).to(F64), world, bucket_mb=bucket_mb)
    optimizer = optimizer_of(model)
    mine = slice(sum(rows[: world.rank]), sum(rows[: world.rank + 1]))
    for step in range(STEPS):
        ids, target = batch(step, sum(rows))
        optimizer.zero_grad()
        # The average over ranks of (local sum x ranks / global rows) is the global mean.
        (F.cross_entropy(model(ids[mine]), target[mine], reduction="sum") * world.size / sum(rows)).backward()
        for name, parameter in model.module.named_parameters():
            expected = expected_gradients[step][name]
            if expected is None:
                assert parameter.grad is None, name
            else:
                # A few hundred additions and products of numbers of order 1: 1e-12 is a thousand roundings.
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
        optimizer.step()
    state = model.state_dict()
    assert list(state) == list(expected_state)
    for name, value in state.items():
        assert value.dtype == expected_state[name].dtype
        # AdamW divides by |gradient|, which magnifies roundings of small ones: 1e-10 is what the project promises.
        torch.testing.assert_close(value, expected_state[name], rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    everyone = world.all_gather_object({name: value.numpy().tobytes() for name, value in state.items()})
    assert all(theirs == everyone[0] for theirs in everyone), "ranks drifted apart"
    model.close()
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("bucket_mb", [25, 0.001], ids=["one bucket", "many buckets"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_training_equals_one_process_with_uneven_rows(size: int, bucket_mb: float) -> None:
    run_ranks(size, train, ROWS[size], bucket_mb)


def train_without_one_reduction(world) -> None:
    launch = GradientBuckets._launch

    def spoil_the_last(self: GradientBuckets, bucket) -> None:
        own = bucket.flat.clone()
        launch(self, bucket)
        if self._launched == len(self._buckets) - 1:
            bucket.work.wait()
            bucket.flat[: bucket.bucket.numel] = own[: bucket.bucket.numel]

    GradientBuckets._launch = spoil_the_last
    try:
        train(world, ROWS[2], 0.001)
    finally:
        GradientBuckets._launch = launch


def test_the_comparison_sees_one_bucket_that_is_not_reduced() -> None:
    with pytest.raises(AssertionError, match="Mismatched elements"):
        run_ranks(2, train_without_one_reduction)


def train_without_weights(world) -> None:
    expected, _ = oracle(7)
    model = DataParallel(Net(seed=0).to(F64), world)
    mine = slice(0, 5) if world.rank == 0 else slice(5, 7)
    ids, target = batch(0, 7)
    F.cross_entropy(model(ids[mine]), target[mine]).backward()
    grad = model.module.table.weight.grad
    assert not torch.allclose(grad, expected[0]["table.weight"], rtol=1e-3), "the rows were meant to be too uneven for this"
    (gradients,) = torch.autograd.grad(F.cross_entropy(model.module(ids[mine]), target[mine]), [model.module.table.weight])
    world.all_reduce(gradients, "avg")
    torch.testing.assert_close(grad, gradients, rtol=1e-12, atol=1e-12)


def test_a_mean_loss_is_averaged_over_ranks_as_documented() -> None:
    run_ranks(2, train_without_weights)


def accumulate(world) -> None:
    rows = 4 + world.rank  # of each microbatch
    model = DataParallel(nn.Linear(3, 2, dtype=F64), world)
    reference = copy.deepcopy(model.module)
    x = torch.randn(3, 8, 3, dtype=F64, generator=torch.Generator().manual_seed(world.rank))[:, :rows]
    with model.no_sync():
        model(x[0]).pow(2).sum().backward()
        local = model.module.weight.grad.clone()
        with pytest.raises(ZeroDivisionError), model.no_sync():
            raise ZeroDivisionError
        model(x[1]).pow(2).sum().backward()
    assert not torch.equal(model.module.weight.grad, local)
    model(x[2]).pow(2).sum().backward()
    reference(x).pow(2).sum().backward()
    for parameter, plain in zip(model.parameters(), reference.parameters(), strict=True):
        world.all_reduce(plain.grad, "avg")
        torch.testing.assert_close(parameter.grad, plain.grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_sync_accumulates_without_communication(size: int) -> None:
    run_ranks(size, accumulate)


class Everything(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.brain = nn.Parameter(torch.randn(5, generator=generator).to(torch.bfloat16))
        self.wide = nn.Parameter(torch.randn(3, 7, generator=generator, dtype=F64).t())
        self.tied = self.wide
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("flags", torch.tensor([seed == 0, True, seed == 1]))
        self.register_buffer("empty", torch.empty(0, 4))
        self.register_buffer("phase", torch.tensor([1j * seed]))
        self.register_buffer("nan", torch.tensor([float("nan") if seed == 0 else 1.0, -0.0]))
        self.register_buffer("large", torch.full((9 << 18,), float(seed)))  # 9 MiB: travels alone
        self.register_buffer("hidden", torch.full((3,), float(seed)), persistent=False)


def broadcasts(world) -> None:
    src = world.size - 1
    module, expected = Everything(world.rank), Everything(src)
    messages = []
    broadcast = world.broadcast

    def counted(tensor: torch.Tensor, *args, **kwargs):
        messages.append(tensor.nbytes)
        return broadcast(tensor, *args, **kwargs)

    world.broadcast = counted
    broadcast_state(module, world, src)
    for (name, value), wanted in zip(
        [*module.named_parameters(), *module.named_buffers()], [*expected.parameters(), *expected.buffers()], strict=True
    ):
        assert pickle.dumps(value.detach().numpy() if value.dtype != torch.bfloat16 else value.tolist()) == pickle.dumps(
            wanted.detach().numpy() if wanted.dtype != torch.bfloat16 else wanted.tolist()
        ), name
    assert module.tied is module.wide
    assert len(messages) == (2 if world.size > 1 else 0), "one parcel, and the large tensor"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_parameters_and_buffers_of_every_dtype_reach_all_ranks_bit_by_bit_in_few_messages(size: int) -> None:
    run_ranks(size, broadcasts)


def different_models(world) -> str:
    model = nn.Sequential(nn.Linear(3, 4 + (world.rank == 1)), nn.BatchNorm1d(4 + (world.rank == 1)))
    with pytest.raises(ConfigError) as caught:
        DataParallel(model, world)
    return str(caught.value)


def test_ranks_with_different_models_are_told_what_differs() -> None:
    for message in run_ranks(2, different_models):
        assert "rank 1: 0.weight is (5, 3) float32, on rank 0 (4, 3) float32" in message
        assert "rank 1: 1.running_var is (5,) float32, on rank 0 (4,) float32" in message


def lazy_model(world) -> None:
    with pytest.raises(ConfigError, match=r"without a shape: 0\.weight, 0\.bias\. Run one batch"):
        DataParallel(nn.Sequential(nn.LazyLinear(3)), world)


def test_a_model_whose_shapes_are_not_known_yet_is_refused() -> None:
    run_ranks(1, lazy_model)


def failure(_: torch.Tensor) -> None:
    raise ZeroDivisionError("in backward")


def through_failure(x: torch.Tensor) -> torch.Tensor:
    x.register_hook(failure)
    return x


def failing_backward(world) -> None:
    model = DataParallel(nn.Sequential(nn.Linear(3, 400), nn.Linear(400, 2)).to(F64), world, bucket_mb=0.001)
    x = torch.full((2, 3), world.rank + 1.0, dtype=F64)
    first, second = model.module
    for step in range(3):
        model.zero_grad()
        with pytest.raises(ZeroDivisionError, match="in backward"):
            second(through_failure(first(x))).sum().backward()
        assert model.buckets.is_collecting, "the failure was meant to come after the first gradients"
        model.zero_grad(set_to_none=step % 2 == 0)
        model(x).sum().backward()
        assert not model.buckets.is_collecting
        expected = torch.stack([torch.full((2, 3), rank + 1.0, dtype=F64) for rank in range(world.size)])
        (gradient,) = torch.autograd.grad(sum(model.module(x).sum() for x in expected) / world.size, [first.weight])
        torch.testing.assert_close(first.weight.grad, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_an_exception_in_backward_leaves_it_usable(size: int) -> None:
    run_ranks(size, failing_backward)


def names_and_copies(world) -> None:
    net = Net(seed=world.rank)
    model = DataParallel(net, world)
    ids, target = batch(0, 5)
    F.cross_entropy(model(ids), target).backward()
    assert list(model.state_dict()) == list(net.state_dict())
    assert not hasattr(model, "table")
    assert model.module is net
    other = Net(seed=9)
    assert not any(model.load_state_dict(other.state_dict()))
    assert torch.equal(net.table.weight, other.table.weight)
    with pytest.raises(RuntimeError, match=r'Missing key.*"table\.weight"'):
        model.load_state_dict({})

    class Game(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.player = model

    game = Game()
    assert set(game.state_dict()) == {f"player.{name}" for name in net.state_dict()}
    state = {name: torch.zeros_like(value) for name, value in game.state_dict().items()}
    game.load_state_dict(state)
    assert not net.table.weight.any()
    model.load_state_dict(other.state_dict())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    copies = [copy.deepcopy(model), loaded, pickle.loads(pickle.dumps(model))]
    if world.rank == 0:  # alone: a copy that communicated would wait for the others
        for each in copies:
            F.cross_entropy(each(ids), target).backward()
            assert each.module.table.weight.grad.shape == (13, 6)
            assert not world.is_registered(each.module.table.weight.grad)
            with each.no_sync():
                each(ids)
            each.close()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    plain = io.BytesIO()
    torch.save(other.state_dict(), plain)
    assert buffer.tell() == pytest.approx(plain.tell(), rel=0.01), "the buckets were written too"
    model.zero_grad()
    F.cross_entropy(model(ids), target).backward()
    assert world.size == 1 or world.is_registered(net.table.weight.grad)


@pytest.mark.parametrize("size", [1, 2])
def test_names_are_the_models_own_and_copies_are_the_model_alone(size: int) -> None:
    run_ranks(size, names_and_copies)


def closing(world) -> None:
    net = Net(seed=world.rank).to(F64)
    types = [type(module) for module in net.modules()]
    model = DataParallel(net, world)
    ids, target = batch(world.rank, 5)
    F.cross_entropy(model(ids), target).backward()
    model.close()
    model.close()
    assert [type(module) for module in net.modules()] == types
    if world.rank == 0:
        net.zero_grad()
        F.cross_entropy(model(ids), target).backward()
        assert not world.is_registered(net.table.weight.grad)
    world.barrier()
    again = DataParallel(net, world)
    again.zero_grad()
    F.cross_entropy(again(ids), target).backward()
    grads = world.all_gather_object(net.table.weight.grad.tolist())
    assert grads[0] == grads[-1]


def test_close_gives_the_model_back_and_it_can_be_made_parallel_again() -> None:
    run_ranks(2, closing)


def checkpointed(world, use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([nn.Linear(4, 4, dtype=F64) for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=use_reentrant) if self.training else block(x)
            return x

    model = DataParallel(Blocks(), world, bucket_mb=0.0001)
    xs = [torch.full((rank + 1, 4), rank + 0.5, dtype=F64, requires_grad=True) for rank in range(world.size)]
    for _ in range(2):
        model.zero_grad()
        model(xs[world.rank]).pow(2).sum().backward()
    plain = copy.deepcopy(model).eval()
    (sum(plain(x).pow(2).sum() for x in xs) / world.size).backward()
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_blocks_are_reduced_once_and_right(use_reentrant: bool) -> None:
    run_ranks(2, checkpointed, use_reentrant)


def two_models(world) -> None:
    """Two models of equal shapes in one backward: the ranks use different ones of their parameters, so buckets are filled in another order."""
    torch.manual_seed(0)
    models = [DataParallel(nn.ModuleList([nn.Linear(4, 4, dtype=F64) for _ in range(2)]), world) for _ in range(2)]
    x = torch.full((2, 4), world.rank + 1.0, dtype=F64)
    a, b = (model.module for model in models)
    loss = a[0](x).sum() + b[0](x).sum() * 10
    loss = loss + (a[1](x).sum() if world.rank == 0 else b[1](x).sum() * 10)
    loss.backward()
    rows = 2.0 * sum(range(1, world.size + 1)) / world.size
    assert torch.allclose(a[0].weight.grad, torch.tensor(rows, dtype=F64), rtol=1e-14)
    assert torch.allclose(b[0].weight.grad, torch.tensor(10 * rows, dtype=F64), rtol=1e-14)
    assert torch.allclose(a[1].weight.grad, torch.tensor(2.0 / world.size, dtype=F64), rtol=1e-14)
    assert torch.allclose(b[1].weight.grad, torch.tensor(10 * (rows - 2.0 / world.size), dtype=F64), rtol=1e-14)


@pytest.mark.parametrize("size", [2, 3])
def test_two_models_in_one_backward_do_not_meet(size: int) -> None:
    run_ranks(size, two_models)


def dtypes_stay(world) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = DataParallel(nn.Linear(3, 2, dtype=dtype), world)
        model(torch.ones(1, 3, dtype=dtype)).sum().backward()
        assert model.module.weight.grad.dtype == dtype
        assert torch.equal(model.module.weight.grad, torch.ones(2, 3, dtype=dtype))
    mixed = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, dtype=F64))
    model = DataParallel(mixed, world)
    mixed[1](mixed[0](torch.ones(1, 3)).double()).sum().backward()
    assert [p.grad.dtype for p in mixed.parameters()] == [torch.float32] * 2 + [F64] * 2
    mixed.double()
    model.zero_grad()
    with pytest.raises(ConfigError, match=r"gradients of 0\.bias, 0\.weight have left their bucket"):
        mixed(torch.ones(1, 3, dtype=F64)).sum().backward()
    fresh = nn.Linear(3, 2)
    model = DataParallel(fresh, world)
    fresh.double()
    with pytest.raises(ConfigError, match=r"(bias|weight) is not the .* torch.float32 it was"):
        model(torch.ones(1, 3, dtype=F64)).sum().backward()


def test_gradients_have_the_dtype_of_their_parameters() -> None:
    run_ranks(2, dtypes_stay)


def dropped(world) -> None:
    model = DataParallel(Net(seed=0), world)
    ids, target = batch(0, 5)
    F.cross_entropy(model(ids), target).backward()
    reference = weakref.ref(model.module)
    del model
    gc.collect()
    assert reference() is None
    world.barrier()


def test_a_model_that_is_dropped_without_close_is_collected() -> None:
    run_ranks(2, dropped)
