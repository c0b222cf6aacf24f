"""fp8: products are those of rounded operands, scales are the same on every rank and at any width, and training ends where float32 ends."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError, PrecisionError
from ringfold.mixed_precision import quantised
from ringfold.mixed_precision.casting import Casting
from ringfold.mixed_precision.fp8 import Fp8
from ringfold.mixed_precision.linears import QuantisedLinears
from ringfold.mixed_precision.quantised import E4M3, E5M2
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tests.harness import run_ranks
from tests.parallel.test_engine import make_engine
from tests.precision.test_quantised import own_scale, rounded
from tests.precision.test_training import batches, engine_of, losses

CPU = torch.device("cpu")
BF16 = 2.0**-8  # half a unit in the last of 8 bits


class Pair(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(32, 48, bias=bias)
        self.tied = nn.Embedding(48, 32)
        self.tied.weight = self.layer.weight
        self.bfloat16()


def quantised_pair(bias: bool = True, device: torch.device = CPU, **settings: Any) -> tuple[Pair, QuantisedLinears]:
    model = Pair(bias).to(device)
    return model, QuantisedLinears(model, {}, Casting(model, torch.bfloat16), OneRank(), Fp8(**settings), device)  # type: ignore[arg-type]


class OneRank:
    """The communicator of one rank: what it reduces stays as it is."""

    reductions = 0

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        assert op == "max"
        assert tensor.isfinite().logical_or(tensor == math.inf).all()
        self.reductions += 1


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(("lead", "bias"), [((3, 7), True), ((16,), False), ((), True), ((2, 1, 5), False), ((0, 4), True)])
def test_output_and_gradients_are_the_products_of_rounded_operands(
    monkeypatch: pytest.MonkeyPatch, native: bool, lead: tuple[int, ...], bias: bool
) -> None:
    """Against float64. torch emulates the hardware's product on CPUs, so its layouts and paddings are tested here too."""
    monkeypatch.setattr(quantised, "is_native", lambda _: native)
    compare_with_float64(torch.device("cpu"), lead, bias)


@pytest.mark.gpu
@pytest.mark.parametrize(("lead", "bias"), [((3, 7), True), ((16,), False), ((), True), ((2, 1, 5), False), ((0, 4), True)])
def test_on_hardware_with_fp8_they_are_too(lead: tuple[int, ...], bias: bool) -> None:
    device = torch.device("cuda", 0)
    if not quantised.is_native(device):
        pytest.skip("the GPU has no products of 8 bits: they need compute capability 8.9")
    compare_with_float64(device, lead, bias)


def compare_with_float64(device: torch.device, lead: tuple[int, ...], bias: bool) -> None:
    model, _ = quantised_pair(bias, device)
    layer = model.layer
    layer.zero_grad()
    x = (torch.randn(*lead, 32) * 3).bfloat16().to(device).requires_grad_()
    g = (torch.randn(*lead, 48) * 1e-3).bfloat16().to(device)
    layer(x).backward(g)
    if not x.numel():
        assert layer(x).shape == (*lead, 48)
        assert not layer.weight.grad.any()  # type: ignore[union-attr]
        return
    w = layer.weight.detach().cpu()
    rows, gradient = x.detach().cpu().reshape(-1, 32), g.cpu().reshape(-1, 48)
    xq, wq, gq = (rounded(value, own_scale(value, dtype), dtype) for value, dtype in ((rows, E4M3), (w, E4M3), (gradient, E5M2)))
    b = layer.bias.detach().cpu().double() if bias else torch.zeros(48, dtype=torch.float64)
    close(layer(x).detach().reshape(-1, 48), xq @ wq.T + b, xq.abs() @ wq.abs().T + b.abs(), 33)
    close(x.grad.reshape(-1, 32), gq @ wq, gq.abs() @ wq.abs(), 48)  # type: ignore[union-attr]
    close(layer.weight.grad, gq.T @ xq, gq.abs().T @ xq.abs(), len(rows))  # type: ignore[union-attr]
    if bias:
        close(layer.bias.grad, gradient.double().sum(0), gradient.double().abs().sum(0), len(rows))  # type: ignore[union-attr]


def close(found: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """The result is rounded to bfloat16; the sum before is one of float32, or of the 14 bits that Hopper's tensor cores keep."""
    unit = 2.0**-24 if found.device.type == "cpu" else 2.0**-13
    error = (found.cpu().double() - exact).abs()
    assert (error <= BF16 * exact.abs() + terms * unit * magnitude + 1e-30).all()


def test_backward_keeps_the_input_in_one_byte_and_the_weight_itself() -> None:
    model, _ = quantised_pair()
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        model.layer(torch.randn(5, 32).bfloat16().requires_grad_())
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in saved if tensor.dim()] == [(E4M3, (5, 32)), (torch.bfloat16, (48, 32))]
    assert saved[2].data_ptr() == model.layer.weight.data_ptr()
    model.layer.requires_grad_(False)
    saved.clear()
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        model.layer(torch.randn(5, 32).bfloat16().requires_grad_())
    assert E4M3 not in [tensor.dtype for tensor in saved], "what a frozen layer needs no more"


def test_delayed_scales_follow_the_history_with_its_margin_and_saturate_what_is_beyond() -> None:
    model, linears = quantised_pair(bias=False, history=2, margin=1)
    nn.init.eye_(model.layer.weight)

    def step(value: float) -> float:
        output = model.layer(torch.full((1, 32), value).bfloat16())[0, 0].item()
        linears.finish_step()
        return output

    assert step(400.0) == 384.0  # no history: its own scale of 1; 400 lies between 384 and 416, the former even
    assert step(3000.0) == 896.0  # a scale of 1, doubled by the margin
    assert step(3000.0) == 3072.0  # 3000 / 448 needs 8, with the margin 16
    assert step(1.0) == 1.0
    assert step(100.0) == 96.0  # 3000 is still in the history of two steps: a spacing of 8 times 16 / 16
    assert step(300.0) == 224.0  # 3000 is forgotten: 100 / 448 needs 1 / 4, with the margin 1 / 2
    assert linears._comm.reductions == 6  # type: ignore[attr-defined]


def test_zeros_stay_zero_and_say_nothing_of_the_next_step() -> None:
    model, linears = quantised_pair(bias=False)
    x = torch.zeros(4, 32).bfloat16().requires_grad_()
    model.layer(x).backward(torch.zeros(4, 48).bfloat16())
    assert not x.grad.any()  # type: ignore[union-attr]
    linears.finish_step()
    x = torch.randn(4, 32).bfloat16()
    assert torch.equal(model.layer(x), quantised_pair(bias=False)[0].layer(x))


@pytest.mark.parametrize("spoiled", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_what_is_not_finite_shows_and_leaves_the_history_alone(spoiled: float, scaling: str) -> None:
    model, linears = quantised_pair(scaling=scaling)
    x = torch.randn(4, 32).bfloat16()
    for _ in range(2):
        expected = model.layer(x)
        linears.finish_step()
    bad = x.clone()
    bad[2, 5] = spoiled
    assert model.layer(bad)[2].isnan().all()
    linears.finish_step()
    assert torch.equal(model.layer(x), expected)


def test_only_training_records() -> None:
    model, linears = quantised_pair(bias=False, margin=0)
    x = torch.full((4, 32), 100.0).bfloat16()
    model.layer(x)
    linears.finish_step()
    known = linears.scales._known.clone()
    model.eval()
    assert torch.equal(model.layer(x * 64), model.layer(x * 640)), "both saturate by the scale that is known"
    linears.finish_step()
    assert torch.equal(linears.scales._known, known)


def test_a_compiled_layer_computes_and_records_the_same() -> None:
    found = []
    for compiled in (False, True):
        model, linears = quantised_pair()
        if compiled:
            model.layer.compile(backend="aot_eager")
        x = torch.linspace(-3, 5, 7 * 32).view(7, 32).bfloat16().requires_grad_()
        model.layer(x).square().sum().backward()
        found.append((x.grad, model.layer.weight.grad, linears.scales._seen))
    for plain, other in zip(*found, strict=True):
        assert torch.equal(plain, other)  # type: ignore[arg-type]


def test_names_stay_a_copy_is_plain_and_close_gives_forward_back() -> None:
    model, linears = quantised_pair()
    assert list(model.state_dict()) == list(Pair().state_dict())
    x = torch.randn(4, 32).bfloat16()
    plain = F.linear(x, model.layer.weight, model.layer.bias)
    assert not torch.equal(model.layer(x), plain)
    assert torch.equal(copy.deepcopy(model).layer(x), plain)
    linears.close()
    assert torch.equal(model.layer(x), plain)
    assert "forward" not in vars(model.layer)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(16, 24), "norm_in": nn.Linear(16, 16)})])
        self.attention = nn.MultiheadAttention(16, 2)
        self.head = nn.Linear(16, 32)


def refused(world: Communicator) -> list[str]:
    messages = []
    for model, keep in ((Odd, ["blocks.0.norm_in"]), (lambda: nn.LayerNorm(16), [])):
        with pytest.raises(PrecisionError) as caught:
            make_engine(world, "fp8", model, keep_float32=keep)
        messages.append(str(caught.value))
    return messages


def test_a_model_without_a_linear_for_it_is_told_why() -> None:
    odd, none = run_ranks(1, refused)[0]
    assert odd.splitlines() == [
        "fp8: no nn.Linear of the model can compute in it:",
        "  blocks.0.up: has 16 inputs and 24 outputs, not multiples of 16",
        "  blocks.0.norm_in: is kept in float32",
        "  attention.out_proj: lies outside of the blocks",
        "  head: lies outside of the blocks",
        "  Change them, or use bf16.",
    ]
    assert none == "fp8: the model has no nn.Linear. Use bf16."


@pytest.mark.parametrize("settings", [{"scaling": "delay"}, {"history": 0}, {"margin": -1}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"Fp8: {next(iter(settings))} is"):
        Fp8(**settings)


def train(world: Communicator, layout: str, steps: int, settings: Fp8 | None = None, unreduced: bool = False) -> tuple[list[str], Tensor, Tensor]:
    """Return losses and norms in hexadecimal, this rank's history, and its scales; batches have 3 to 11 rows, so some ranks have none."""
    engine = engine_of(world, layout, fp8=settings)
    if unreduced:
        engine._linears._comm = OneRank()
    numbers = []
    for batch in engine.shard([batches(step + 1, rows=3 + 5 * step % 9)[-1] for step in range(steps)]):
        numbers += [engine.train_step(batch).hex(), engine.grad_norm.hex()]
    scales = engine._linears.scales
    return numbers, scales._history, scales._known


def test_scales_are_the_same_on_every_rank_at_every_width_and_stage() -> None:
    (expected,) = run_ranks(1, train, "fp8", 3)
    assert int((expected[2] > 0).sum()) == 12, "up and down of two blocks; mix is never called"
    for size, layout in ((2, "fp8"), (3, "fp8 zero2"), (4, "fp8 zero3 recompute"), (2, "fp8 micro2")):
        for found in run_ranks(size, train, layout, 3):
            assert torch.equal(found[2], expected[2]), layout


def test_exact_mode_has_the_same_bits_at_every_width_and_stage() -> None:
    (expected,) = run_ranks(1, train, "exact8 fp8", 8)
    assert len(set(expected[0])) == 16
    layouts = [
        (2, "fp8"),
        (4, "fp8"),
        (2, "fp8 zero1"),
        (4, "fp8 zero2"),
        (4, "fp8 zero3"),
        (2, "fp8 zero3 recompute"),
        (1, "fp8 recompute"),
        (2, "fp8 zero1 recompute:selective"),
    ]
    for size, layout in layouts:
        for found in run_ranks(size, train, f"exact8 {layout}", 8):
            assert found[0] == expected[0], f"losses or norms of {size} ranks, {layout}"
            assert torch.equal(found[1], expected[1]), f"history of {size} ranks, {layout}"


def test_current_scales_have_the_same_bits_at_every_width_too_without_a_history() -> None:
    (expected,) = run_ranks(1, train, "exact8 fp8", 5, Fp8(scaling="current"))
    assert not expected[1].any()
    for found in run_ranks(4, train, "exact8 fp8 zero3 recompute", 5, Fp8(scaling="current")):
        assert found[0] == expected[0]


def test_without_the_reduction_ranks_have_other_scales() -> None:
    """The mutation: each rank goes by its own amaxes. Scales are powers of two, so whether a loss of the first steps departs depends on the CPU."""
    found = run_ranks(4, train, "exact8 fp8", 8, None, True)
    assert not all(torch.equal(one[2], found[0][2]) for one in found)


def test_the_amax_of_a_step_is_that_of_all_its_microbatches() -> None:
    """In the first step weights are the same however the batch is divided, and up to the rounding of 16 bits inputs and gradients are."""
    (expected,), (found,) = run_ranks(1, train, "fp8", 1), run_ranks(1, train, "fp8 micro3", 1)
    weights = slice(1, None, 3)
    assert torch.equal(found[1].flatten()[weights], expected[1].flatten()[weights])
    torch.testing.assert_close(found[1], expected[1], rtol=0.1, atol=0.0)


def end(world: Communicator, layout: str, settings: Fp8) -> float:
    return losses(world, layout, 150, fp8=settings)


@pytest.mark.parametrize(
    ("layout", "settings"),
    [("fp8", Fp8()), ("fp8 zero3 recompute", Fp8()), ("fp8 micro2", Fp8(history=1, margin=0)), ("fp8 zero1", Fp8("current"))],
)
def test_training_in_8_bits_ends_where_float32_ends(layout: str, settings: Fp8) -> None:
    expected = run_ranks(2, losses, "", 150)[0]
    found = run_ranks(2, end, layout, settings)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(expected, rel=0.01)
    assert found[0] != run_ranks(2, losses, layout.replace("fp8", "bf16"), 150)[0]


def go_on(world: Communicator, folder: Path, layout: str, first: bool) -> tuple[list[str], Tensor | None]:
    engine = engine_of(world, layout)
    if not first:
        engine.resume(folder)
    data = engine.shard(batches(14))
    before = None if engine._linears is None else engine._linears.scales._history.clone()
    if first:
        for batch in itertools.islice(data, 6):
            engine.train_step(batch)
        engine.save(folder / "step-6")
        before = None if engine._linears is None else engine._linears.scales._history.clone()
    return [engine.train_step(batch).hex() for batch in data], before


@pytest.mark.parametrize("layout", ["exact8 fp8", "exact8 fp8 zero3"])
def test_a_run_that_goes_on_from_a_checkpoint_is_the_one_that_was_not_interrupted(tmp_path: Path, layout: str) -> None:
    expected = run_ranks(2, go_on, tmp_path, layout, True)[0]
    for size in (2, 4):
        numbers, history = run_ranks(size, go_on, tmp_path, layout, False)[0]
        assert numbers == expected[0]
        assert history is not None
        assert expected[1] is not None
        assert torch.equal(history, expected[1])
        assert int(history.amax((1, 2)).count_nonzero()) == 6


def test_a_checkpoint_of_another_precision_begins_a_history_and_one_of_fp8_goes_on_elsewhere(tmp_path: Path) -> None:
    for before, after in (("bf16", "fp8"), ("fp8 zero2", "bf16")):
        expected = run_ranks(2, go_on, tmp_path / before, before, True)[0]
        found = run_ranks(2, go_on, tmp_path / before, after, False)[0]
        assert [float.fromhex(loss) for loss in found[0]] == pytest.approx([float.fromhex(loss) for loss in expected[0]], rel=0.02)
        assert found[1] is None or not found[1].any()


def test_a_history_of_another_length_or_of_other_linears_serves_as_far_as_it_goes() -> None:
    model, linears = quantised_pair(history=3)
    for value in (1.0, 2.0, 3.0, 4.0):
        model.layer(torch.full((2, 32), value).bfloat16())
        linears.finish_step()
    state = linears.state_dict()
    assert state is not None
    for length, expected in ((2, [3.0, 4.0]), (5, [0.0, 0.0, 2.0, 3.0, 4.0])):
        _, other = quantised_pair(history=length)
        other.load_state_dict(state)
        assert other.scales._history[:, 0, 0].tolist() == expected
    other.load_state_dict({**state, "linears": ["elsewhere"]})
    assert not other.scales._known.any()


def evaluated(world: Communicator) -> bool:
    engine = engine_of(world, "fp8 zero3")
    data = batches(3)
    engine.train_step(next(iter(engine.shard(data[:1]))))
    history = engine._linears.scales._history.clone()
    first = engine.evaluate(engine.shard(data))
    assert torch.equal(engine._linears.scales._history, history)
    assert not engine._linears.scales._seen.any()
    assert engine.evaluate(engine.shard(data)) == first
    engine.close()
    return all("forward" not in vars(part) for part in engine.module.modules())


def test_evaluation_goes_by_the_scales_and_records_nothing() -> None:
    assert run_ranks(2, evaluated) == [True, True]


def two_engines(world: Communicator, layout: str) -> list[str]:
    """Train a model whose blocks are Linears, then again by another engine."""
    torch.manual_seed(0)
    model, found = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 128)), []
    data = [(torch.randn(7, 32, generator=torch.Generator().manual_seed(step)), torch.arange(7)) for step in range(3)]
    for _ in range(2):
        engine = make_engine(world, layout, lambda: model)
        found += [engine.train_step(batch).hex() for batch in engine.shard(data)]
        engine.close()
        assert not any("forward" in vars(part) for part in model.modules())
    return found


def test_a_linear_that_is_a_block_itself_is_recomputed_and_let_go() -> None:
    (expected,) = run_ranks(1, two_engines, "exact4 fp8")
    assert len(set(expected)) == 6
    for layout in ("exact4 fp8 zero3 recompute", "exact4 fp8 zero1 recompute:selective"):
        assert run_ranks(2, two_engines, layout) == [expected] * 2
