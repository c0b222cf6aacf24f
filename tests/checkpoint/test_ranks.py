"""Checkpoints of several ranks: rank 0 writes for all, and whatever goes wrong goes wrong on all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ringfold.collectives.errors import CheckpointError
from ringfold.runtime import checkpoint

from tests.harness import run_ranks


def model_of(seed: int, width: int = 3) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Linear(width, 2)


def raised(operation: Any) -> tuple[str, str]:
    try:
        operation()
    except CheckpointError as error:
        return type(error).__name__, str(error)
    return "", ""


def save_and_load(world: Any, folder: Path) -> tuple[str, int, list[list[float]], dict[str, Any]]:
    model = model_of(world.rank)
    state = model.state_dict() if world.rank == 0 else {}
    path = checkpoint.save(folder / "step-4", step=4, model_state=state, extra={"random": [1, 2]}, comm=world)
    found = checkpoint.load(folder, comm=world)
    found.load_model(model)
    return str(path), found.step, model.weight.tolist(), found.extra()


def test_every_rank_loads_what_rank_0_saved(tmp_path: Path) -> None:
    results = run_ranks(3, save_and_load, tmp_path)
    assert results == [(str(tmp_path / "step-4"), 4, model_of(0).weight.tolist(), {"random": [1, 2]})] * 3


def fail_everywhere(world: Any, folder: Path) -> list[tuple[str, str]]:
    (folder / "file").touch()
    state = model_of(0).state_dict()
    outcomes = [
        raised(lambda: checkpoint.save(folder / "file" / "step-1", step=1, model_state=state, comm=world)),
        raised(lambda: checkpoint.save(folder / "step-1", step=1, model_state=state, extra={"f": print}, comm=world)),
        raised(lambda: checkpoint.load(folder / "absent", comm=world)),
    ]
    checkpoint.save(folder / "step-1", step=1, model_state=state, comm=world)
    found = checkpoint.load(folder, comm=world)
    outcomes.append(raised(lambda: found.load_model(model_of(0, width=5 if world.rank == 1 else 3))))
    world.barrier()
    return outcomes


def test_an_error_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    for rank, outcomes in enumerate(run_ranks(3, fail_everywhere, tmp_path)):
        assert [name for name, _ in outcomes] == ["CheckpointError", "CheckpointError", "Incomplete", "Incompatible"]
        texts = [text for _, text in outcomes]
        assert "File exists" in texts[0]
        assert "f: builtins" in texts[1]
        assert "no such folder" in texts[2]
        assert "shape of weight: [2, 3] in the checkpoint, [2, 5] in the model" in texts[3]
        assert ("on rank 0" in texts[0]) is (rank != 0)
        assert ("on rank 1" in texts[3]) is (rank != 1)


def damage_after_opening(world: Any, folder: Path) -> str:
    checkpoint.save(folder / "step-1", step=1, model_state=model_of(0).state_dict(), comm=world)
    found = checkpoint.load(folder, comm=world)
    path = folder / "step-1" / "model.safetensors"
    if world.rank == 0:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    world.barrier()
    model = model_of(1)
    return raised(lambda: found.load_model(model))[0]


def test_a_corrupt_tensor_stops_every_rank(tmp_path: Path) -> None:
    assert run_ranks(2, damage_after_opening, tmp_path) == ["Corrupt"] * 2
