"""bf16 and fp16: masters keep what 16 bits cannot, all ranks skip the same steps, and checkpoints fit every precision."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import PrecisionError
from ringfold.mixed_precision.loss_scaler import LossScaler
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.parallel.test_engine import make_engine

VOCABULARY, WIDTH, CONTEXT = 128, 32, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(CONTEXT, CONTEXT)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        causal = F.linear(y.transpose(1, 2), self.mix.weight.tril(), self.mix.bias).transpose(1, 2)
        return x + self.down(F.gelu(self.up(y + causal)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.register_buffer("table", torch.linspace(-1, 1, CONTEXT)[:, None] * torch.linspace(0, 1, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.router = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.table
        for block in self.blocks:
            x = block(x)
        return self.head(self.router(x)).transpose(1, 2)


def batches(count: int, rows: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Return rows of this file's own text."""
    text = torch.tensor(list(Path(__file__).read_bytes()), dtype=torch.int64).clamp(max=VOCABULARY - 1)
    windows = text.unfold(0, CONTEXT + 1, 3)
    generator = torch.Generator().manual_seed(0)
    chosen = [windows[torch.randint(len(windows), (rows,), generator=generator)] for _ in range(count)]
    return [(window[:, :-1], window[:, 1:]) for window in chosen]


def engine_of(world: Communicator, layout: str, **options: Any) -> Any:
    options.setdefault("optimizer", lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True))
    return make_engine(world, layout, Model, loss=F.cross_entropy, clip_norm=1.0, bucket_mb=0.02, **options)


def losses(world: Communicator, layout: str, steps: int, **options: Any) -> float:
    engine = engine_of(world, layout, **options)
    found = [engine.train_step(batch) for batch in engine.shard(batches(steps))]
    return sum(found[-20:]) / 20


@pytest.mark.parametrize(("layout", "within"), [("bf16", 0.02), ("bf16 zero3 recompute", 0.02), ("fp16 zero1", 0.01), ("fp16 micro2", 0.01)])
def test_training_in_16_bits_ends_where_float32_ends(layout: str, within: float) -> None:
    expected = run_ranks(2, losses, "", 150)[0]
    assert expected < 3.0, "nothing was learned"
    found = run_ranks(2, losses, layout, 150)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(expected, rel=within)
    assert found[0] != expected


def small_updates(world: Communicator, layout: str) -> dict[str, Tensor]:
    engine = engine_of(world, layout, optimizer=lambda p: torch.optim.SGD(p, lr=1e-4))
    for batch in engine.shard(batches(20)):
        engine.train_step(batch)
    return engine.state_dict()


def test_masters_take_updates_that_16_bits_would_lose() -> None:
    before = Model().state_dict()
    expected = run_ranks(1, small_updates, "")[0]
    for layout in ("bf16", "bf16 zero1", "bf16 zero2", "bf16 zero3"):
        found = run_ranks(2, small_updates, layout)[0]
        moved = (expected["head.weight"] - before["head.weight"]).norm()
        assert (
            before["head.weight"].bfloat16() + (expected["head.weight"] - before["head.weight"]).bfloat16() / 20 == before["head.weight"].bfloat16()
        ).float().mean() > 0.9
        assert found["head.weight"].dtype == torch.float32
        assert (found["head.weight"] - expected["head.weight"]).norm() < 0.05 * moved


def dtypes(world: Communicator, layout: str) -> tuple[dict[str, str], dict[str, str]]:
    engine = engine_of(world, layout, keep_float32=["router"])
    seen: dict[str, str] = {}
    for name, part in engine.module.named_modules():
        if isinstance(part, nn.Linear | nn.LayerNorm):
            part.register_forward_hook(lambda _, args, output, name=name: seen.update({name: f"{args[0].dtype} {output.dtype}"}))
    engine.train_step(next(iter(engine.shard(batches(1)))))
    return {name: str(p.dtype) for name, p in engine.module.named_parameters()}, seen


@pytest.mark.parametrize("layout", ["bf16", "bf16 zero3"])
def test_norms_and_what_is_named_stay_in_float32(layout: str) -> None:
    parameters, seen = run_ranks(2, dtypes, layout)[0]
    kept = {name for name, dtype in parameters.items() if dtype == "torch.float32"}
    assert kept == {"blocks.0.norm.weight", "blocks.0.norm.bias", "blocks.1.norm.weight", "blocks.1.norm.bias", "router.weight", "router.bias"}
    assert {dtype for name, dtype in parameters.items() if name not in kept} == {"torch.bfloat16"}
    assert seen["head"] == "torch.bfloat16 torch.bfloat16"


def seen_by_the_loss(world: Communicator, layout: str) -> list[Tensor]:
    seen = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(target)
        return F.mse_loss(output, target)

    engine = make_engine(world, layout, lambda: nn.Linear(3, 2), loss=loss)
    batch = torch.ones(2, 3), torch.full((2, 2), 1 + 2**-20)
    engine.train_step(batch)
    engine.evaluate([batch])
    return seen


@pytest.mark.parametrize("layout", ["", "bf16", "fp16 zero2", "fp64"])
def test_targets_reach_the_loss_as_they_were_given(layout: str) -> None:
    (seen,) = run_ranks(1, seen_by_the_loss, layout)
    assert len(seen) == 2
    assert all(target.eq(1 + 2**-20).all() and target.dtype == (torch.float64 if layout == "fp64" else torch.float32) for target in seen)


def misspelt(world: Communicator) -> None:
    with pytest.raises(PrecisionError, match=r"keep_float32: no module or parameter is called 'ruoter' \(did you mean 'router'\?\)"):
        engine_of(world, "bf16", keep_float32=["ruoter"])


def test_a_name_that_fits_nothing_is_refused() -> None:
    run_ranks(1, misspelt)


def overflow(world: Communicator, layout: str, at: int) -> tuple[list[float], list[bool], bool]:
    """Spoil the gradient of one parameter on the last rank in one step; return scales, which steps changed the weights, and whether all is finite."""
    engine = engine_of(world, layout)
    engine._update.scaler = LossScaler(initial=2.0**8)
    step = 0
    if world.rank == world.size - 1:
        engine.module.router.weight.register_hook(lambda grad: grad * float("inf") if step == at else grad)
    scales, moved = [], []
    before = engine.state_dict()
    for step, batch in enumerate(engine.shard(batches(5))):  # noqa: B007  the hook reads it
        engine.train_step(batch)
        scales.append(engine.loss_scale)
        after = engine.state_dict()
        moved.append(any(not torch.equal(value, before[name]) for name, value in after.items()))
        before = after
    return scales, moved, all(bool(value.isfinite().all()) for value in before.values())


@pytest.mark.parametrize("layout", ["fp16", "fp16 zero2", "fp16 zero3"])
def test_an_overflow_on_one_rank_is_skipped_by_all_and_halves_the_scale_once(layout: str) -> None:
    results = run_ranks(3, overflow, layout, 2)
    assert [scales for scales, _, _ in results] == [[256, 256, 128, 128, 128]] * 3
    assert results[0][1] == [True, True, False, True, True]
    assert all(finite for _, _, finite in results)


def summed(output: Tensor, target: Tensor) -> tuple[Tensor, int]:
    return F.cross_entropy(output, target, reduction="sum"), target.numel()


def skipped(world: Communicator, layout: str) -> int:
    engine = make_engine(world, layout, Model, loss=summed, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    for batch in engine.shard(batches(2, rows=64)):
        engine.train_step(batch)
    return engine.skipped_steps


def test_a_loss_that_counts_itself_overflows_no_more_on_two_ranks_than_on_one() -> None:
    for size, layout in ((1, "fp16"), (2, "fp16"), (2, "fp16 zero3 micro2")):
        assert run_ranks(size, skipped, layout) == [0] * size


def hopeless(world: Communicator) -> str:
    engine = engine_of(world, "fp16 zero2")
    engine._update.scaler = LossScaler(patience=3)
    if world.rank == 1:
        engine.module.blocks[1].up.weight.register_hook(lambda grad: grad * float("nan"))
    data = iter(engine.shard(batches(5)))
    for _ in range(2):
        engine.train_step(next(data))
    with pytest.raises(PrecisionError) as caught:
        engine.train_step(next(data))
    return str(caught.value)


def test_a_run_that_only_skips_ends_with_the_name_of_the_parameter_on_every_rank() -> None:
    for message in run_ranks(2, hopeless):
        assert "3 train steps in a row" in message
        assert "that of blocks.1.up.weight" in message


def trace(world: Communicator, layout: str) -> tuple[list[float], list[str]]:
    """Train with a scale that is too large at first, so that steps are skipped by themselves."""
    engine = engine_of(world, f"exact8 {layout}")
    engine._update.scaler = LossScaler(initial=2.0**24, growth_interval=6)
    scales, numbers = [], []
    for batch in engine.shard(batches(30)):
        numbers.append(engine.train_step(batch).hex())
        scales.append(engine.loss_scale)
    return scales, numbers


def test_skips_scales_and_losses_are_the_same_at_every_width_in_exact_mode() -> None:
    (expected,) = run_ranks(1, trace, "fp16")
    assert len(set(expected[0])) > 3
    for size, layout in ((2, "fp16 zero1"), (4, "fp16"), (4, "fp16 zero3")):
        assert run_ranks(size, trace, layout) == [expected] * size


def go_on(world: Communicator, folder: Path, layout: str, first: bool) -> tuple[list[float], dict[str, Tensor]]:
    engine = engine_of(world, layout)
    if not first:
        engine.resume(folder)
    data = engine.shard(batches(20))
    found = [engine.train_step(batch) for batch in itertools.islice(data, 10)]
    if first:
        engine.save(folder / "step-10")
    return found, engine.state_dict()


@pytest.mark.parametrize(("before", "after"), [("bf16 zero2", ""), ("", "bf16 zero3"), ("fp16 zero3", "fp16"), ("bf16", "bf16 zero1")])
def test_a_checkpoint_of_one_precision_goes_on_in_another(tmp_path: Path, before: str, after: str) -> None:
    run_ranks(2, go_on, tmp_path, before, True)
    expected = run_ranks(2, go_on, tmp_path, before, False)[0]
    found = run_ranks(3, go_on, tmp_path, after, False)[0]
    assert found[0] == pytest.approx(expected[0], rel=0.02)
    for name, value in expected[1].items():
        assert (found[1][name].float() - value.float()).norm() <= 0.05 * value.float().norm() + 1e-3, name
