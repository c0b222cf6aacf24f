"""SIGKILL of one rank or of all at random moments of saves: the newest complete checkpoint loads, and the next save clears up."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ringfold.runtime import checkpoint
from ringfold.runtime.checkpoint import Saver, TensorPart
from ringfold.runtime.checkpoint.verification import damages

from tests.harness import run_ranks, spawn_ranks

SIZE = 3
COUNT = 1 << 18


def state_of(step: int, rank: int) -> dict[str, Any]:
    """Return a state in which every element is the step."""
    part = TensorPart(torch.full((COUNT,), float(step)), (SIZE * COUNT,), rank * COUNT)
    return {"part": part, "same": torch.full((2 * COUNT,), float(step)), "small": torch.tensor(step)}


def save_for_ever(world: Any, folder: Path, asynchronous: bool) -> None:
    saver, step = Saver(world), 0
    while True:
        step += 1
        saver.save(
            folder / f"step-{step}", step=step, model_state=state_of(step, world.rank), extra={"step": step}, keep=2, asynchronous=asynchronous
        )
        if step == 2:  # with asynchronous saves, the first is then complete
            print("saved", flush=True)


def save_once(world: Any, folder: Path, step: int) -> None:
    checkpoint.save(folder / f"step-{step}", step=step, model_state=state_of(step, world.rank), extra={"step": step}, keep=1, comm=world)


def kill_at(folder: Path, seed: int) -> None:
    choice = random.Random(seed)
    victims = list(range(SIZE)) if seed % 2 else [choice.randrange(SIZE)]
    with spawn_ranks(SIZE, save_for_ever, folder, seed % 4 < 2) as ranks:
        ranks.wait_for_line(0, "saved")
        time.sleep(choice.uniform(0, 0.15))
        for rank in victims:
            ranks.kill(rank)
        ranks.wait(30)
    found = checkpoint.load(folder)
    state = found.model_state()
    assert found.extra() == {"step": found.step}
    assert all(value.eq(found.step).all() for value in state.values())
    assert state["part"].numel() == SIZE * COUNT
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    assert all(damages(path)[0] == [] for path in visible)
    if seed % 3 == 0:
        run_ranks(SIZE, save_once, folder, 99999)
        assert [path.name for path in folder.iterdir()] == ["step-99999"]


@pytest.mark.parametrize("seed", range(12))
def test_after_a_kill_at_any_moment_the_newest_complete_checkpoint_loads(tmp_path: Path, seed: int) -> None:
    kill_at(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_after_500_kills_the_newest_complete_checkpoint_loads(tmp_path: Path) -> None:
    for seed in range(100, 600):
        kill_at(tmp_path / str(seed), seed)
