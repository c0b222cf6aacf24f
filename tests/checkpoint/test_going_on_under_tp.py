"""Checkpoints of divided parameters: any layout goes on from any other's, model and optimizer, where one process would have been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import CheckpointError
from ringfold.runtime.checkpoint.export import export
from safetensors.torch import load_file
from torch import nn

from tests.harness import run_ranks
from tests.parallel.test_engine import LOSSES, ROWS, assert_same_numbers, global_batches, make_engine, mine, plain_training, train_in_two_halves
from tests.parallel.test_tensor_parallel import MODELS, writer

PAIRS = [
    ((4, "dp2 tp2 zero3"), (1, "")),
    ((1, ""), (4, "dp2 tp2 zero3")),
    ((2, "tp2"), (3, "tp3 zero1")),
    ((3, "tp3 zero1"), (2, "tp2")),
    ((4, "dp2 tp2 zero2"), (3, "zero3")),
    ((3, "zero3"), (4, "tp2 cp2")),
    ((4, "dp2 tp2 zero3"), (4, "dp2 tp2 zero1")),
]


def half(world: Communicator, folder: Path, first: bool, layout: str, model: str) -> dict[str, Any]:
    return train_in_two_halves(world, folder, first, layout, MODELS[model])


@pytest.mark.parametrize("model", ["grouped", pytest.param("writer", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=lambda pair: pair[1] or "one process")
def test_every_layout_goes_on_from_every_other(tmp_path: Path, before: tuple[int, str], after: tuple[int, str], model: str) -> None:
    expected = plain_training(LOSSES["pair"], make=MODELS[model])
    stop = len(ROWS) // 2
    run_ranks(before[0], half, tmp_path, True, before[1], model)
    for found in run_ranks(after[0], half, tmp_path, False, after[1], model):
        assert_same_numbers(found, {key: value[stop:] if isinstance(value, list) else value for key, value in expected.items()})


def single() -> nn.Module:
    return writer().float()


def save_and_load(world: Communicator, folder: Path, layout: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train two steps and save; load into a new engine of the same layout; return the whole states of both."""
    states = []
    engine = make_engine(world, layout, single, loss=LOSSES["pair"])
    for batch in global_batches()[:2]:
        engine.train_step(mine(batch, engine.mesh["dp"].rank, engine.mesh["dp"].size))
    engine.save(folder / "step-2")
    states.append(everything(engine))
    engine.close()
    engine = make_engine(world, layout, single, loss=LOSSES["pair"])
    engine.resume(folder)
    states.append(everything(engine))
    return states[0], states[1]


def everything(engine: Any) -> dict[str, Any]:
    """Return all that this rank has, and the whole model."""
    found: dict[str, Any] = {f"own {number}": p.detach().clone() for number, p in enumerate(engine.optimizer.param_groups[0]["params"])}
    for number, parameter in enumerate(engine.optimizer.param_groups[0]["params"]):
        for key, value in engine.optimizer.state.get(parameter, {}).items():
            found[f"{key} {number}"] = value.clone() if isinstance(value, torch.Tensor) else value
    with engine.whole_parameters():
        return found | {name: value.clone() for name, value in engine.module.state_dict().items()}


@pytest.mark.parametrize(("size", "layout"), [(2, "tp2"), (3, "tp3 zero1"), (4, "dp2 tp2 bf16 zero2"), (4, "dp2 tp2 fp16 zero3")])
def test_what_is_loaded_has_the_bits_that_were_saved(tmp_path: Path, size: int, layout: str) -> None:
    for before, after in run_ranks(size, save_and_load, tmp_path, layout):
        assert before.keys() == after.keys()
        assert any(name.startswith("exp_avg") for name in before)
        for name, value in before.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[name])), name


def test_an_export_has_the_wholes(tmp_path: Path) -> None:
    before, _ = run_ranks(3, save_and_load, tmp_path / "saved", "tp3 zero1")[0]
    export(tmp_path / "saved" / "step-2", tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    expected = writer().state_dict()
    assert {"embed.weight", "blocks.1.mlp.down.weight", "blocks.0.attn.c_attn.bias"} <= found.keys() <= expected.keys()
    for name, value in found.items():
        assert torch.equal(value, before[name])
        assert value.shape == expected[name].shape


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.double()


def load_wrongly(world: Communicator, folder: Path) -> tuple[str, bool]:
    """Load another model's checkpoint, and tell whether training goes on as if nothing had been tried."""
    engine = make_engine(world, "tp2", Other, loss=LOSSES["pair"])
    before = [p.detach().clone() for group in engine.optimizer.param_groups for p in group["params"]]
    with pytest.raises(CheckpointError) as caught:
        engine.resume(folder)
    after = [p for group in engine.optimizer.param_groups for p in group["params"]]
    return str(caught.value), all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_another_models_checkpoint_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    run_ranks(2, save_and_load, tmp_path, "tp2")
    for message, is_unchanged in run_ranks(2, load_wrongly, tmp_path):
        assert "embed.weight" in message
        assert "up.weight" in message
        assert is_unchanged
