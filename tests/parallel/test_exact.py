"""Exact mode: the same bits at any width, ZeRO stage and group, with or without recomputation."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.zero.counter import BinaryCounter
from ringfold.runtime.exact import ShardRandom, squared_norm
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.parallel.test_engine import make_engine

STEPS = 20
WIDTH = 24


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH + 1)  # not a multiple of a register
        self.down = nn.Linear(3 * WIDTH + 1, WIDTH)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.idle = nn.Parameter(torch.ones(5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.dropout(self.embed(tokens), 0.1, self.training)
        for block in self.blocks:
            x = block(x)
        return F.linear(x, self.embed.weight).transpose(1, 2)


def valid_pair(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(output, target, reduction="sum"), (target != -100).sum()


LOSSES = {"torch": F.cross_entropy, "pair": valid_pair, "weighted": nn.CrossEntropyLoss(weight=torch.linspace(0.1, 1.7, 17))}


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return global batches of 3 to 19 rows: shards of 0 to 3 rows with 0 to 6 valid tokens each."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in range(STEPS):
        tokens = torch.randint(17, (3 + step * 7 % 17, 7), generator=generator)
        ignored = torch.rand(tokens[:, 1:].shape, generator=generator) < torch.rand((len(tokens), 1), generator=generator)
        found.append((tokens[:, :-1], tokens[:, 1:].masked_fill(ignored, -100)))
    return found


def train(world: Communicator, layout: str, loss: str, fused: bool, folder: Path | None = None, until: int = STEPS) -> tuple[list[str], str]:
    """Return losses and norms in hexadecimal, and the bits of the weights; go on from a checkpoint in `folder` if there is one, and save there."""
    engine = make_engine(
        world,
        f"exact8 {layout}",
        Model,
        loss=LOSSES[loss],
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, fused=fused),
        clip_norm=0.8,
        bucket_mb=0.005,
    )
    torch.manual_seed(world.rank)  # what the ranks draw themselves does not matter
    if folder is not None and any(folder.iterdir()):
        engine.resume(folder)
    numbers = []
    for batch in itertools.islice(engine.shard(batches()), until - engine.step):
        numbers += [engine.train_step(batch).hex(), engine.grad_norm.hex()]
    if folder is not None:
        engine.save(folder / f"step-{engine.step}")
    with engine.whole_parameters():
        bits = torch.cat([value.reshape(-1).view(torch.int32) for value in engine.module.state_dict().values()])
    return numbers, bits.numpy().tobytes().hex()


@pytest.mark.parametrize(("loss", "fused"), [("torch", True), ("pair", False), ("weighted", True)])
def test_every_width_stage_and_resting_place_has_the_same_bits(loss: str, fused: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    (expected,) = run_ranks(1, train, "", loss, fused)
    layouts = [
        (1, "zero3"),
        (2, ""),
        (2, "zero1"),
        (4, "zero2"),
        (4, "zero3"),
        (2, "zero3 recompute"),
        (4, "zero1:group2 recompute"),
        (1, "recompute"),
        (1, f"zero1:nvme={tmp_path}"),
        (2, "zero2:cpu recompute"),
        (2, f"zero2:nvme={tmp_path}"),
        (2, f"zero3:nvme={tmp_path} recompute"),
        (4, f"zero3:nvme={tmp_path}:group2"),
    ]
    for size, layout in layouts:
        for found in run_ranks(size, train, layout, loss, fused):
            assert found[0] == expected[0], f"losses or norms of dp{size} {layout}"
            assert found[1] == expected[1], f"weights of dp{size} {layout}"
    assert len(set(expected[0])) > STEPS


def test_without_the_fixed_tree_the_bits_depart() -> None:
    """The mutation: sums in the order of arrival are what every other runtime has."""
    expected = run_ranks(1, train, "", "torch", True)[0]
    assert run_ranks(2, train_in_another_order, "zero2")[0][1] != expected[1]


def train_in_another_order(world: Communicator, layout: str) -> tuple[list[str], str]:
    def add(self: BinaryCounter, vector: Tensor) -> None:
        self._sums = [(0, self._sums[0][1] + vector)] if self._sums else [(0, vector.clone())]

    BinaryCounter.add = add
    return train(world, layout, "torch", True)


def test_a_run_that_goes_on_narrower_ends_with_the_bits_of_one_that_did_not_stop(tmp_path: Path) -> None:
    expected = run_ranks(2, train, "zero1", "torch", True)[0]
    first = run_ranks(4, train, "zero3", "torch", True, tmp_path, 9)[0]
    second = run_ranks(1, train, "", "torch", True, tmp_path, 14)[0]
    third = run_ranks(2, train, "zero2", "torch", True, tmp_path)[0]
    assert first[0] + second[0] + third[0] == expected[0]
    assert third[1] == expected[1]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 3), st.integers(0, 2**32))
def test_the_counter_adds_sums_of_groups_as_it_adds_single_vectors(count: int, level: int, seed: int) -> None:
    values = torch.randn(count << level, 3, generator=torch.Generator().manual_seed(seed))
    single, grouped = BinaryCounter(), BinaryCounter()
    for value in values:
        single.add(value)
    groups = values.view(count, 1 << level, 3)
    while groups.shape[1] > 1:
        groups = groups[:, ::2] + groups[:, 1::2]
    for group in groups[:, 0]:
        grouped.add(group)
    a, b = torch.empty(3), torch.empty(3)
    single.take(a)
    grouped.take(b)
    assert torch.equal(a, b)
    single.take(a)
    assert not a.any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32, allow_subnormal=True), min_size=1, max_size=300), st.data())
def test_the_norm_does_not_depend_on_how_elements_are_cut_and_is_right(values: list[float], data: st.DataObject) -> None:
    whole = torch.tensor(values, dtype=torch.float32)
    expected = squared_norm([whole], len(values), lambda *_: None)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=5)))
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(len(cuts)))
    pieces = [whole[order][a:b] for a, b in itertools.pairwise([0, *cuts, len(values)])]
    assert squared_norm(pieces, len(values), lambda *_: None) == expected
    truth = math.fsum(value**2 for value in whole.tolist())
    assert expected == pytest.approx(truth, rel=2**-30, abs=1e-290)


def test_a_norm_with_a_gradient_that_is_no_number_is_none() -> None:
    assert not math.isfinite(squared_norm([torch.tensor([1.0, math.nan])], 2, lambda *_: None))
    assert squared_norm([torch.tensor([1.0, math.inf])], 2, lambda *_: None) == math.inf
    assert squared_norm([], 5, lambda *_: None) == 0.0


def test_streams_of_shards_differ_and_leave_the_generator_as_it_was() -> None:
    random = ShardRandom(7, torch.device("cpu"))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    drawn = []
    for step, shard in ((0, 0), (0, 1), (1, 0), (0, 0)):
        with random.stream(step, shard):
            drawn.append(float(torch.rand(())))
    assert drawn[0] == drawn[3]
    assert len(set(drawn)) == 3
    assert torch.equal(torch.get_rng_state(), before)


def with_batch_norm(world: Communicator) -> None:
    with pytest.raises(ConfigError, match=r"exact mode: 1 keep running statistics of the batch"):
        make_engine(world, "exact4", lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))


def test_statistics_of_the_batch_are_refused() -> None:
    run_ranks(2, with_batch_norm)
