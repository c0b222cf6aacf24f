"""ZeRO: shards never change the numbers of plain PyTorch, and hold what they promise to hold."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ringfold as rf
import torch
import torch.nn.functional as F
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.zero.gradients import ShardedGradients
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.parallel.test_engine import (
    CLIP_NORM,
    LOSSES,
    ROWS,
    Reader,
    assert_same_numbers,
    global_batches,
    make_engine,
    mine,
    plain_training,
    train,
    train_in_two_halves,
    valid_pair,
)


@pytest.mark.parametrize(("micro", "loss"), [(1, "torch"), (3, "pair"), (2, "terms")])
@pytest.mark.parametrize(
    ("size", "layout"), [(size, f"zero{stage}") for size in (1, 2, 4) for stage in (1, 2, 3)] + [(4, f"zero{stage}:group2") for stage in (1, 2, 3)]
)
def test_every_stage_has_the_numbers_of_plain_pytorch(size: int, layout: str, micro: int, loss: str) -> None:
    expected = plain_training(LOSSES[loss])
    results = run_ranks(size, train, micro, loss, CLIP_NORM, layout)
    for found in results:
        assert_same_numbers(found, expected)
        assert all(torch.equal(weight, results[0]["weights"][name]) for name, weight in found["weights"].items()), "ranks drifted apart"


def train_without_one_reduction(world: Communicator) -> dict[str, Any]:
    settle = ShardedGradients._settle

    def spoil(self: ShardedGradients, filling: Any) -> None:
        settle(self, filling)
        if filling is self._buckets[-2]:  # the last one is of the unused parameter
            filling.shard.mul_(0.5)

    ShardedGradients._settle = spoil
    try:
        return train(world, 1, "torch", CLIP_NORM, "zero2")
    finally:
        ShardedGradients._settle = settle


def test_the_comparison_sees_one_bucket_that_is_wrong() -> None:
    with pytest.raises(AssertionError):
        assert_same_numbers(run_ranks(2, train_without_one_reduction)[0], plain_training(F.cross_entropy))


@pytest.mark.parametrize(
    ("before", "after"), [("zero2", "zero1"), ("", "zero2"), ("zero1", ""), ("zero3", "zero3"), ("zero3", "zero1"), ("", "zero3")]
)
def test_a_checkpoint_goes_on_at_another_width_and_stage(tmp_path: Path, before: str, after: str) -> None:
    expected = plain_training(valid_pair)
    half = len(ROWS) // 2
    run_ranks(4, train_in_two_halves, tmp_path, True, before)
    for found in run_ranks(3, train_in_two_halves, tmp_path, False, after):
        assert_same_numbers(found, {key: value[half:] if isinstance(value, list) else value for key, value in expected.items()})


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.2),
    "groups by shape": lambda p: torch.optim.AdamW(
        [{"params": [q for q in p if q.dim() >= 2], "weight_decay": 0.5}, {"params": [q for q in p if q.dim() < 2], "weight_decay": 0.0, "lr": 0.03}],
        lr=0.01,
    ),
}


class Small(nn.Module):
    """Tied and frozen parameters, some cut in the middle, of float64 and float32."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 40)
        self.frozen = nn.Linear(40, 40)
        self.frozen.requires_grad_(False)
        self.up = nn.Linear(40, 70)
        self.down = nn.Linear(70, 40, bias=False)
        self.down.weight.data = self.down.weight.data.t().contiguous().t()  # not row-major
        self.head = nn.Linear(40, 13, bias=False)
        self.head.weight = self.table.weight
        self.double()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.frozen(self.table(tokens))
        return self.head(x + self.down(F.gelu(self.up(x)))) * self.scale


def steps(world: Communicator, layout: str, optimizer: str) -> tuple[dict[str, Tensor], int]:
    engine = make_engine(world, layout, Small, optimizer=OPTIMIZERS[optimizer], loss=F.cross_entropy, bucket_mb=0.01, clip_norm=0.5)
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        tokens = torch.randint(13, (7, 2), generator=generator)
        engine.train_step(mine((tokens[:, 0], tokens[:, 1]), world.rank, world.size))
    states = [state for parameter, state in engine.optimizer.state.items() if parameter.requires_grad]
    count = sum(value.numel() for each in states for key, value in each.items() if key != "step" and isinstance(value, Tensor))
    with engine.whole_parameters():
        return {name: value.clone() for name, value in engine.module.state_dict().items()}, count


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_elementwise_optimizers_step_as_on_whole_parameters_and_hold_a_share_of_the_state(optimizer: str) -> None:
    (expected, whole), *_ = run_ranks(3, steps, "", optimizer)
    for layout in ("zero1", "zero2", "zero3"):
        results = run_ranks(3, steps, layout, optimizer)
        assert sum(state for _, state in results) == whole
        assert max(state for _, state in results) <= whole / 2
        for found, _ in results:
            for name, value in expected.items():
                # The same sums; what differs is the rounding of the norm, through the clip factor, and of the one float32 parameter.
                close = 1e-6 if value.dtype == torch.float32 else 1e-8
                torch.testing.assert_close(found[name], value, rtol=close, atol=close, msg=lambda text, name=name: f"{name}: {text}")


def refused_optimizer(world: Communicator, kind: str) -> str:
    makers: dict[str, Any] = {
        "Adafactor": lambda p: torch.optim.Adafactor(p),
        "SparseAdam": lambda p: torch.optim.SparseAdam(p),
        "Muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2]),
    }
    with pytest.raises(ConfigError) as caught:
        make_engine(world, "zero1", Reader, optimizer=makers[kind])
    return str(caught.value)


@pytest.mark.parametrize("kind", ["Adafactor", "SparseAdam", "Muon"])
def test_an_optimizer_that_is_not_elementwise_is_refused_by_what_it_does(kind: str) -> None:
    for message in run_ranks(2, refused_optimizer, kind):
        assert message.startswith(f"optimizer: {kind} ")
        assert "elementwise" in message


def moved_parameter(world: Communicator) -> str:
    engine = make_engine(world, "zero2")
    batch = mine(global_batches()[0], world.rank, world.size)
    engine.module.hidden.bias.data = torch.zeros(12, dtype=torch.float64)
    with pytest.raises(ConfigError) as caught:
        engine.train_step(batch)
    return str(caught.value)


def test_a_parameter_that_was_moved_behind_its_back_is_named() -> None:
    assert all("have left the memory that ZeRO keeps them in: hidden.bias" in message for message in run_ranks(2, moved_parameter))


def memory(world: Communicator, layout: str) -> int:
    """Return how many bytes of gradients this rank holds for good."""
    engine = make_engine(world, layout, bucket_mb=0.001)
    for batch in global_batches()[:2]:
        engine.train_step(mine(batch, world.rank, world.size))
    whole = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in engine.module.parameters() if p.grad is not None}
    pieces = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in engine._sharding.pieces if p.grad is not None}
    return sum({**whole, **pieces}.values())


def test_stage_2_holds_a_share_of_the_gradients() -> None:
    elements = sum(-(-p.numel() // 64) * 64 for p in Reader().parameters())
    padding = 6 * 64 * 4  # at most six buckets, each rounded up to 64 elements a rank
    stage_1 = run_ranks(4, memory, "zero1")
    assert (elements - 64) * 8 <= max(stage_1) <= (elements + padding) * 8  # 64: of the unused parameter
    assert all(nbytes <= (elements + padding) / 4 * 8 for nbytes in run_ranks(4, memory, "zero2"))


@pytest.mark.parametrize("layout", ["dp3 zero1", "dp4 zero2:group2 micro2", "dp2 zero3:cpu", "dp2 zero3:nvme=/tmp"])
def test_verify_proves_a_sharded_layout(layout: str) -> None:
    tokens = torch.randint(0, 11, (9, 6), generator=torch.Generator().manual_seed(0))
    report = rf.verify(Reader, (tokens[:, :-1], tokens[:, 1:]), F.cross_entropy, layout)
    assert report.ok, str(report)


def own_loop(world: Communicator, stage: int, passes: int, quietly: bool) -> tuple[dict[str, Tensor], list[float], dict[str, Tensor | None]]:
    """Train with the user's own loop: `passes` backwards a step, those before the last inside no_sync if quietly."""
    torch.manual_seed(0)
    module = Small()
    model = rf.ZeRO(module, world, stage=stage, bucket_mb=0.01) if stage else rf.DataParallel(module, world, bucket_mb=0.01)
    make = OPTIMIZERS["Adam"]
    optimizer = model.optimizer(make) if isinstance(model, rf.ZeRO) else make(list(model.parameters()))
    generator = torch.Generator().manual_seed(3 + world.rank)
    norms = []
    for _ in range(3):
        for index in range(passes):
            tokens = torch.randint(13, (4, 2), generator=generator)
            quiet = model.no_sync() if quietly and index < passes - 1 else contextlib.nullcontext()
            with quiet:
                F.cross_entropy(model(tokens[:, 0]), tokens[:, 1]).backward()
        if isinstance(model, rf.ZeRO):
            norms.append(model.clip_grad_norm_(0.2))
            grads = {name: model.grad(name) for name, _ in module.named_parameters()}
        else:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.2)))
            grads = {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.close()
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    return weights, norms, grads


@pytest.mark.parametrize("quietly", [True, False])
@pytest.mark.parametrize("passes", [1, 3])
def test_in_an_own_loop_every_stage_trains_as_data_parallel_does(passes: int, quietly: bool) -> None:
    weights, norms, grads = run_ranks(3, own_loop, 0, passes, quietly)[0]
    for stage in (1, 2, 3):
        for found in run_ranks(3, own_loop, stage, passes, quietly):
            assert found[1] == pytest.approx(norms, rel=1e-6)
            for name, value in weights.items():
                close = 1e-6 if value.dtype == torch.float32 else 1e-8
                torch.testing.assert_close(found[0][name], value, rtol=close, atol=close, msg=lambda text, name=name: f"{name}: {text}")
                if name not in grads:
                    continue  # tied, and compared under its other name
                torch.testing.assert_close(found[2][name], grads[name], rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def refused_options(world: Communicator) -> None:
    with pytest.raises(ConfigError, match="stage is 4, expected 1, 2 or 3"):
        rf.ZeRO(nn.Linear(2, 2), world, stage=4)
    with pytest.raises(ConfigError, match="group_size is 2, expected a divisor of the 3 ranks"):
        rf.ZeRO(nn.Linear(2, 2), world, group_size=2)
    model = rf.ZeRO(nn.Linear(2, 2), world)
    model.close()
    with pytest.raises(ConfigError, match="is closed"):
        model.clip_grad_norm_(1.0)


def test_options_that_cannot_work_are_refused() -> None:
    run_ranks(3, refused_options)
