"""Explain: what an engine says of a layout is what it then does."""

from __future__ import annotations

import resource
from collections import Counter

import psutil
import pytest
import torch
import torch.nn.functional as F
from ringfold.collectives.codes import DTYPES, OPERATIONS
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import OutOfMemory
from ringfold.runtime.explanation import Explanation
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.parallel.test_engine import make_engine
from tests.parallel.test_memory import WIDTH, Block

BLOCKS, ROWS = 5, 3
NAMES = {code: name for name, code in OPERATIONS.items()}
ITEMSIZES = {code: getattr(torch, name).itemsize for name, code in DTYPES.items()}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.first.bias.requires_grad_(False)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)


def explain(world: Communicator, layout: str) -> tuple[Explanation, Counter[str], Counter[str]]:
    """Return what is said, and how many collectives of a step there were, and their bytes."""
    engine = make_engine(world, layout, Model, loss=F.mse_loss, bucket_mb=0.15)
    for _ in range(2):
        engine.train_step(batch())
    before = world.page.read().next_op
    engine.train_step(batch())
    counts: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for record in world.page.operations()[before - world.page.read().next_op :]:
        operation = NAMES[record.op]
        size = record.count * ITEMSIZES[record.dtype]
        if size > 64:  # the loss and its counts are smaller
            counts[operation] += 1
            nbytes[operation] += size
    return engine.explain(), counts, nbytes


@pytest.mark.parametrize("layout", ["", "zero1", "zero2", "zero3", "zero3 micro3", "bf16 zero3", "zero2:group2", "bf16 zero1 micro2", "fp8 zero2"])
def test_a_step_sends_what_was_said(layout: str) -> None:
    for said, counts, nbytes in run_ranks(4, explain, layout):
        large = [each for each in said.traffic if each.nbytes > 64 * each.count]
        for operation in ("all_reduce", "reduce_scatter", "all_gather"):
            mine = [each for each in large if each.operation == operation]
            assert counts[operation] == sum(each.count for each in mine), operation
            assert nbytes[operation] == sum(each.nbytes for each in mine), operation


def test_least_bytes_sent_are_those_of_a_ring() -> None:
    said = run_ranks(4, explain, "zero2")[0][0]
    of = {each.purpose: each for each in said.traffic}
    assert of["gradients"].sent_nbytes == of["gradients"].nbytes * 3 / 4
    assert of["which parameters were used"].sent_nbytes == of["which parameters were used"].nbytes * 3 / 2


def test_every_parameter_is_told_with_all_its_dtypes_and_blocks_alike_in_one_line() -> None:
    said = run_ranks(2, explain, "bf16 zero3")[0][0]
    assert [use.name for use in said.parameters] == [name for name, _ in Model().named_parameters()]
    uses = {use.name: use for use in said.parameters}
    up, norm, frozen = uses["blocks.3.up.weight"], uses["blocks.3.norm.weight"], uses["first.bias"]
    assert (up.trained, up.computed, up.output, up.summed, up.kept) == (torch.float32, *[torch.bfloat16] * 4)
    assert up.state == {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    assert (norm.trained, norm.computed, norm.output, norm.summed, norm.kept) == (*[torch.float32] * 2, torch.bfloat16, *[torch.float32] * 2)
    assert (frozen.summed, frozen.kept, frozen.state) == (None, None, {})
    text = str(said)
    (line,) = [line for line in text.splitlines() if line.startswith("blocks.*.up.weight")]
    assert line.split()[1:4] == ["x", "5", f"{5 * 2 * WIDTH * WIDTH:,}"]
    assert "exp_avg float32, exp_avg_sq float32" in line
    assert "recompute: off" in text


def test_linears_in_8_bits_are_told() -> None:
    uses = {use.name: use for use in run_ranks(1, explain, "fp8")[0][0].parameters}
    assert uses["blocks.0.up.weight"].product == torch.float8_e4m3fn
    assert uses["blocks.0.up.bias"].product is None
    assert uses["first.weight"].product is None


def activations(world: Communicator, layout: str) -> list[int]:
    torch.manual_seed(0)
    engine = make_engine(world, layout, Model, loss=F.mse_loss)
    rows, state = batch(), torch.get_rng_state()
    found = [engine.memory(rows)["activations"], engine.explain(rows).memory["activations"]]
    assert torch.equal(torch.get_rng_state(), state)
    assert float(engine.module.calls) == 0
    engine.train_step(rows)
    assert "activations" not in engine.memory()
    return found


@pytest.mark.parametrize("layout", ["", "zero3"])
def test_activations_are_what_the_forward_leaves_for_backward(layout: str) -> None:
    row = ROWS * WIDTH * 4
    # first: its output. A block: its normalisation and two numbers a row, up and its gelu (twice as wide), the sum.
    expected = row + BLOCKS * (row + 2 * ROWS * 4 + 2 * row + 2 * row + row)
    for found in run_ranks(2, activations, layout):
        for nbytes in found:
            assert nbytes == pytest.approx(expected, rel=0.05)


def test_recomputed_blocks_leave_their_arguments_only() -> None:
    row = ROWS * WIDTH * 4
    for found in run_ranks(1, activations, "recompute"):
        assert found[0] <= (BLOCKS + 3) * row


def run_out(world: Communicator, layout: str) -> str:
    wide = 1 << 20
    engine = make_engine(world, layout, lambda: nn.Linear(8, wide), loss=lambda output, target: output.sum() * 0 + target.sum())
    engine.train_step((torch.ones(1, 8), torch.ones(1)))
    used = psutil.Process().memory_info().vms
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
    try:
        with pytest.raises(OutOfMemory) as caught:
            engine.train_step((torch.ones(64, 8), torch.ones(1).expand(64)))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    return str(caught.value)


def test_out_of_memory_says_what_has_it_and_which_words_need_less() -> None:
    (message,) = run_ranks(1, run_out, "")
    assert message.startswith("train step 2: out of memory (")
    assert "can't allocate memory" in message
    assert "This rank has " in message
    assert "optimizer state 72.0 MiB, parameters 36.0 MiB, activations and all else " in message
    assert "recompute, or a larger microN" in message


def test_out_of_memory_on_several_ranks_names_the_stages_that_would_do() -> None:
    for message in run_ranks(4, run_out, "zero1"):
        assert "need less with " in message
        assert "zero3" in message
        assert "zero1 (" not in message
