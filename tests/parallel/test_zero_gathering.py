"""Stage 3: blocks are gathered before they are used and not for longer, in whatever way a model uses them."""

from __future__ import annotations

import math

import pytest
import ringfold as rf
import torch
import torch.nn.functional as F
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import CollectiveMismatch, CommunicationError, ConfigError
from ringfold.parallel.zero.gathering import SLOTS, GatheredParameters
from ringfold.parallel.zero.units import Unit
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.parallel.test_engine import CLIP_NORM, POSITIONS, VOCABULARY, assert_same_numbers, global_batches, make_engine, mine, plain_training, train

WIDTH = 8
BLOCKS = 5


class Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH, bias=index % 2 == 0)
        self.down = nn.Linear(3 * WIDTH, WIDTH)
        self.frozen = nn.Parameter(torch.full((WIDTH,), 0.5), requires_grad=False)
        self.idle = nn.Parameter(torch.ones(4))  # used by no rank

    def forward(self, x: Tensor) -> Tensor:
        return x + self.frozen * self.down(F.gelu(self.up(self.norm(x))))


class Deep(nn.Module):
    """A trunk of blocks, one of which runs twice, between an embedding and a head that are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(index) for index in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.tensor(1.0))
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).cumsum(1) / torch.arange(1, POSITIONS + 1, device=tokens.device)[:, None]
        for block in self.blocks:
            x = block(x)
        x = self.blocks[1](x) * self.scale
        return F.linear(self.norm(x), self.embedding.weight).transpose(1, 2)


@pytest.mark.parametrize("layout", ["zero3", "zero3:group2", "zero3 recompute", "zero3 recompute:selective", "zero2 recompute"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_trunk_of_blocks_has_the_numbers_of_plain_pytorch(size: int, layout: str) -> None:
    expected = plain_training(F.cross_entropy, make=Deep)
    for found in run_ranks(size, train, 2, "torch", CLIP_NORM, layout, Deep):
        assert_same_numbers(found, expected)


def train_on_stale_parameters(world: Communicator) -> dict[str, object]:
    GatheredParameters.publish = lambda _: None  # blocks that still have memory are not gathered again
    return train(world, 1, "torch", CLIP_NORM, "zero3", Deep)


def test_the_comparison_sees_a_parameter_that_was_gathered_before_the_update() -> None:
    with pytest.raises(AssertionError):
        assert_same_numbers(run_ranks(2, train_on_stale_parameters)[0], plain_training(F.cross_entropy, make=Deep))


def gathers(world: Communicator) -> tuple[list[int], int, int]:
    """Return how often blocks are gathered in each step, the most that hold memory at once, and the bytes that a rank keeps of parameters."""
    begun, most = 0, 0
    begin = Unit.begin

    def counted(self: Unit, memory: Tensor, *, once: bool = False) -> None:
        nonlocal begun, most
        begin(self, memory, once=once)
        begun += self.name != ""
        held = engine._sharding._parameters
        most = max(most, sum(unit.memory is not None for unit in held.units if unit.name))

    Unit.begin = counted
    engine = make_engine(world, "zero3", Deep)
    counts = []
    for batch in global_batches()[:4]:
        before = begun
        engine.train_step(mine(batch, world.rank, world.size))
        counts.append(begun - before)
        assert all(math.isnan(float(block.up.weight.detach()[0, 0])) for block in list(engine.module.blocks)[2:]), "seen after its use"
    kept = sum(shard.nbytes for unit in engine._sharding._parameters.units for shard in unit._shards)
    return counts, most, kept


def test_blocks_are_gathered_once_a_pass_and_only_a_few_at_a_time() -> None:
    for counts, most, kept in run_ranks(2, gathers):
        assert most <= SLOTS
        # Forward: 5 blocks and the second run of blocks.1. Backward the same, but for what still lies in the slots at its beginning.
        assert counts[1:] == [2 * (BLOCKS + 1) - SLOTS] * 3
        whole = sum(-(-p.numel() // 64) * 64 for p in Deep().parameters()) * 8
        buckets = 2 * (BLOCKS + 1)  # trained and frozen
        assert kept <= whole / 2 + buckets * (BLOCKS + 1) * 64 * 8  # each is rounded up, and made longer than the others of its kind


def reads(world: Communicator) -> None:
    engine = make_engine(world, "zero3", Deep)
    weight = engine.module.blocks[3].down.weight
    assert weight.isnan().all()
    with pytest.raises(RuntimeError, match="single memory location"), torch.no_grad():
        weight.add_(1.0)
    with engine.whole_parameters():
        before = weight.detach().clone()
        assert not before.isnan().any()
    with engine.whole_parameters(write=True), torch.no_grad():
        weight.mul_(2.0)
    with engine.whole_parameters():
        assert torch.equal(weight, 2.0 * before)
    state = engine.state_dict()
    assert (len(state) == len(engine.module.state_dict())) == (world.rank == 0)
    if world.rank == 0:
        assert torch.equal(state["blocks.3.down.weight"], 2.0 * before)
    batch = mine(global_batches()[0], world.rank, world.size)
    loss = engine.eval_step(batch)["loss"]
    engine.load_state_dict(Deep().state_dict() if world.size == 1 else world.broadcast_object(state))
    assert engine.eval_step(batch)["loss"] == pytest.approx(loss, rel=1e-12)
    weight.data = torch.zeros_like(before)
    with pytest.raises(ConfigError, match=r"have left the memory that ZeRO keeps them in: blocks\.3\.down\.weight"):
        engine.optimizer.step()


def test_a_parameter_outside_its_block_is_nan_cannot_be_written_and_is_whole_on_demand() -> None:
    run_ranks(2, reads)


class Choosy(Deep):
    """Takes another way through the blocks on one rank."""

    skips = -1

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for index, block in enumerate(self.blocks):
            if index != self.skips:
                x = block(x)
        return F.linear(self.norm(x), self.embedding.weight).transpose(1, 2)


def diverge(world: Communicator) -> str:
    engine = make_engine(world, "zero3", Choosy)
    engine.module.skips = 2 if world.rank else -1
    with pytest.raises(CommunicationError) as caught:
        engine.train_step(mine(global_batches()[0], world.rank, world.size))
    world.session.close()
    return type(caught.value).__name__


def test_ranks_that_use_other_blocks_are_told_so_at_once() -> None:
    assert CollectiveMismatch.__name__ in run_ranks(2, diverge)


def test_verify_proves_stage_3_with_recomputation() -> None:
    tokens = torch.randint(0, VOCABULARY, (9, POSITIONS + 1), generator=torch.Generator().manual_seed(0))
    report = rf.verify(Deep, (tokens[:, :-1], tokens[:, 1:]), F.cross_entropy, "dp3 zero3 micro2 recompute")
    assert report.ok, str(report)
