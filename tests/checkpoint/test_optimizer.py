"""runtime/checkpoint/optimizer.py: optimizer state by name, for any optimizer of torch, into a model that lists its parameters otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ringfold.collectives.errors import CheckpointError, ConfigError, Incompatible
from ringfold.runtime import checkpoint
from torch import nn
from torch.optim import lr_scheduler

from tests.checkpoint.state import assert_moments, fill_moments, sharded_adam, whole_adam

FACTORIES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "ASGD": torch.optim.ASGD,
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    "Rprop": torch.optim.Rprop,
    "Adafactor": torch.optim.Adafactor,
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=3),
}


def build(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5, dtype=dtype), nn.Tanh(), nn.Linear(5, 2, dtype=dtype))
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(7, 3, generator=generator)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **extra: Any) -> None:
    state = checkpoint.optimizer_state_by_name(optimizer, model.named_parameters())
    checkpoint.save(folder, step=3, model_state=model.state_dict(), optimizer_state=state, extra=extra)


@pytest.mark.parametrize("name", FACTORIES)
def test_training_goes_on_to_the_same_bits(tmp_path: Path, name: str) -> None:
    model = build()
    optimizer = FACTORIES[name](model.parameters())
    train(model, optimizer, 3, seed=1)
    save(tmp_path / "c", model, optimizer)
    train(model, optimizer, 2, seed=2)

    again = build()
    resumed = FACTORIES[name](again.parameters())
    found = checkpoint.load(tmp_path / "c")
    found.load_model(again)
    found.load_optimizer(resumed, again.named_parameters())
    train(again, resumed, 2, seed=2)
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)


class Named(nn.Module):
    """Two parameters whose order is a choice."""

    def __init__(self, order: str) -> None:
        super().__init__()
        for name in order:
            self.register_parameter(name, nn.Parameter(torch.full((2,), float(ord(name)))))


def test_state_follows_names_and_not_the_order_of_parameters(tmp_path: Path) -> None:
    model = Named("ab")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    (model.a.sum() + 5 * model.b.sum()).backward()
    optimizer.step()
    save(tmp_path / "c", model, optimizer)
    other = Named("ba")
    resumed = torch.optim.SGD(other.parameters(), lr=0.7, momentum=0.9)
    checkpoint.load(tmp_path / "c").load_optimizer(resumed, other.named_parameters())
    assert resumed.state[other.a]["momentum_buffer"].tolist() == [1.0, 1.0]
    assert resumed.state[other.b]["momentum_buffer"].tolist() == [5.0, 5.0]
    assert resumed.param_groups[0]["lr"] == 0.1


def test_groups_options_and_named_parameters_of_torch_come_back(tmp_path: Path) -> None:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        decayed = [(name, p) for name, p in model.named_parameters() if p.dim() > 1]
        rest = [(name, p) for name, p in model.named_parameters() if p.dim() < 2]
        return [{"params": decayed, "weight_decay": 0.3, "betas": (0.8, 0.9)}, {"params": rest, "weight_decay": 0.0}]

    model = build()
    optimizer = torch.optim.AdamW(groups(model), lr=0.02, foreach=True)
    train(model, optimizer, 1, seed=1)
    save(tmp_path / "c", model, optimizer)
    again = build()
    resumed = torch.optim.AdamW(groups(again), lr=0.5, fused=True)
    checkpoint.load(tmp_path / "c").load_optimizer(resumed, again.named_parameters())
    first, second = resumed.param_groups
    assert (first["weight_decay"], first["betas"], first["lr"]) == (0.3, (0.8, 0.9), 0.02)
    assert second["weight_decay"] == 0.0
    assert (first["fused"], first["foreach"]) == (True, None)
    assert first["param_names"] == ["0.weight", "2.weight"]


def test_float32_moments_of_a_bfloat16_model_keep_their_bits(tmp_path: Path) -> None:
    model = build(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    moments = {}
    for name, parameter in model.named_parameters():
        moments[name] = torch.rand(parameter.shape)
        optimizer.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": moments[name], "exp_avg_sq": moments[name] + 1}
    save(tmp_path / "c", model, optimizer)
    resumed = torch.optim.AdamW(model.parameters())
    checkpoint.load(tmp_path / "c").load_optimizer(resumed, model.named_parameters())
    for name, parameter in model.named_parameters():
        assert resumed.state[parameter]["exp_avg"].dtype == torch.float32
        assert torch.equal(resumed.state[parameter]["exp_avg"], moments[name])


def test_other_parameters_are_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    model = Named("abc")
    optimizer = torch.optim.SGD([{"params": [model.a]}, {"params": [model.b, model.c]}], lr=0.1)
    save(tmp_path / "c", model, optimizer)
    other = Named("abd")
    resumed = torch.optim.SGD([{"params": [other.a, other.b]}, {"params": [other.d]}], lr=0.5)
    with pytest.raises(Incompatible) as caught:
        checkpoint.load(tmp_path / "c").load_optimizer(resumed, other.named_parameters())
    for said in ("missing in the checkpoint: d", "not in the optimizer: c", "group of b: 1 in the checkpoint, 0 in the optimizer"):
        assert said in str(caught.value)
    assert resumed.param_groups[0]["lr"] == 0.5


def test_restore_changes_model_and_optimizer_or_neither(tmp_path: Path) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save(tmp_path / "c", model, optimizer)
    other = build()
    with torch.no_grad():
        other[0].weight.zero_()
    two_groups = torch.optim.SGD([{"params": list(other[0].parameters())}, {"params": list(other[2].parameters())}], lr=0.5)
    with pytest.raises(Incompatible, match="another optimizer"):
        checkpoint.load(tmp_path / "c").restore(other, two_groups)
    assert not other[0].weight.any()
    one_group = torch.optim.SGD(other.parameters(), lr=0.5)
    checkpoint.load(tmp_path / "c").restore(other, one_group)
    assert torch.equal(other[0].weight, model[0].weight)
    assert one_group.param_groups[0]["lr"] == 0.1


def test_a_checkpoint_without_optimizer_says_so(tmp_path: Path) -> None:
    model = build()
    checkpoint.save(tmp_path / "c", step=1, model_state=model.state_dict())
    with pytest.raises(Incompatible, match="no optimizer state"):
        checkpoint.load(tmp_path / "c").load_optimizer(torch.optim.SGD(model.parameters()), model.named_parameters())


def test_a_parameter_that_is_not_the_models_has_no_name(tmp_path: Path) -> None:
    model, stranger = build(), nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([*model.parameters(), stranger])
    with pytest.raises(CheckpointError, match=r"parameter 4 of group 0: \[4\]"):
        save(tmp_path / "c", model, optimizer)


def test_a_tied_parameter_is_saved_once_by_its_first_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 1, seed=0)
    assert list(checkpoint.optimizer_state_by_name(optimizer, model.named_parameters(remove_duplicate=False))["state"]) == ["0.weight"]


def test_a_piece_has_parts_for_what_it_has_a_value_for_each_element_of() -> None:
    optimizer, of_name = sharded_adam(1, 3)
    fill_moments(optimizer, of_name)
    state = checkpoint.optimizer_state_by_name(optimizer, of_name.items())["state"]
    for name, piece in of_name.items():
        assert isinstance(state[name]["step"], torch.Tensor)
        for key in ("exp_avg", "exp_avg_sq"):
            part = state[name][key]
            assert (part.shape, part.start, part.stop) == (piece.shape, piece.start, piece.stop)
            assert part.values.data_ptr() == optimizer.state[piece.parameter][key].data_ptr()


def test_a_piece_of_one_element_keeps_its_step_apart_from_its_elements() -> None:
    piece = checkpoint.Piece(nn.Parameter(torch.zeros(1)), 2, (2, 3))
    optimizer = torch.optim.Adam([piece.parameter])
    optimizer.state[piece.parameter] = {"step": torch.tensor([3.0]), "exp_avg": torch.zeros(1)}
    state = checkpoint.optimizer_state_by_name(optimizer, [("w", piece)])["state"]["w"]
    assert isinstance(state["step"], torch.Tensor)
    assert isinstance(state["exp_avg"], checkpoint.TensorPart)


def test_what_is_saved_by_pieces_loads_into_the_same_pieces_without_a_disk() -> None:
    optimizer, of_name = sharded_adam(1, 3)
    fill_moments(optimizer, of_name)
    state = checkpoint.optimizer_state_by_name(optimizer, of_name.items())
    again, its_pieces = sharded_adam(1, 3)
    checkpoint.load_optimizer_state(again, its_pieces.items(), state)
    assert_moments(again, its_pieces)


def test_a_piece_that_is_none_is_refused() -> None:
    for form, start in (((4,), 3), ((2, 2), 0), ((4,), -1)):
        with pytest.raises(ConfigError, match="not a piece of"):
            checkpoint.Piece(nn.Parameter(torch.zeros(form)), start, (2, 3))
        with pytest.raises(ConfigError, match="no part of"):
            checkpoint.TensorPart(torch.zeros(form), (2, 3), start)


@pytest.mark.parametrize(("saved", "loaded"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_state_of_another_precision_is_converted_if_asked_and_refused_if_not(tmp_path: Path, saved: torch.dtype, loaded: torch.dtype) -> None:
    optimizer, of_name = whole_adam(saved)
    fill_moments(optimizer, of_name)
    state = checkpoint.optimizer_state_by_name(optimizer, of_name.items())
    checkpoint.save(tmp_path / "c", step=1, model_state={}, optimizer_state=state)
    found = checkpoint.load(tmp_path / "c")
    other, its_pieces = sharded_adam(0, 1, loaded)
    said = [str(dtype).removeprefix("torch.") for dtype in (saved, loaded)]
    with pytest.raises(Incompatible, match=f"dtype of embed: {said[0]} in the checkpoint, {said[1]} in the optimizer"):
        found.load_optimizer(other, its_pieces.items())
    assert not other.state
    found.load_optimizer(other, its_pieces.items(), cast=True)
    for piece in its_pieces.values():
        assert {key: value.dtype for key, value in other.state[piece.parameter].items()} == {
            "step": torch.float32,
            "exp_avg": loaded,
            "exp_avg_sq": loaded,
        }
    if saved is torch.float32:
        assert_moments(other, its_pieces, loaded)


def test_another_shape_is_told_before_anything_is_changed(tmp_path: Path) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 1, seed=0)
    save(tmp_path / "c", model, optimizer)
    other = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    resumed = torch.optim.SGD(other.parameters(), lr=0.5)
    with pytest.raises(Incompatible, match=r"shape of 0\.bias: \[5\] in the checkpoint, \[6\] in the optimizer"):
        checkpoint.load(tmp_path / "c").load_optimizer(resumed, other.named_parameters())
    assert resumed.param_groups[0]["lr"] == 0.5


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "OneCycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.4, total_steps=20),
    "MultiStep": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4]),
    "Lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "Sequential": lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(o, 9)], [3]),
    "Restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_where_it_was(tmp_path: Path, name: str) -> None:
    model = build()

    def build_both() -> tuple[torch.optim.Optimizer, lr_scheduler.LRScheduler]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        return optimizer, SCHEDULERS[name](optimizer)

    def rates(optimizer: torch.optim.Optimizer, scheduler: lr_scheduler.LRScheduler, steps: int) -> list[float]:
        out = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            out.append(optimizer.param_groups[0]["lr"])
        return out

    optimizer, scheduler = build_both()
    rates(optimizer, scheduler, 3)
    save(tmp_path / "c", model, optimizer, scheduler=scheduler.state_dict())
    resumed, resumed_scheduler = build_both()
    found = checkpoint.load(tmp_path / "c")
    found.load_optimizer(resumed, model.named_parameters())
    resumed_scheduler.load_state_dict(found.extra()["scheduler"])
    assert rates(resumed, resumed_scheduler, 5) == rates(optimizer, scheduler, 5)
