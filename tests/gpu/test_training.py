"""Training on ranks that share one GPU gives what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ringfold as rf
import torch
import torch.nn.functional as F
from torch import nn

from tests.harness import run_ranks

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
ROWS = 13  # no number of ranks divides it
STEPS = 6


def net() -> nn.Module:
    # No bias before BatchNorm: its gradient is zero but for rounding, which AdamW would make a step of.
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 5)).double()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    drawn = []
    for _ in range(STEPS):
        target = torch.randint(0, 5, (ROWS,), generator=generator)
        target[:3] = -100
        drawn.append((torch.randn(ROWS, 8, dtype=torch.float64, generator=generator), target))
    return drawn


def train() -> tuple[list[float], dict[str, torch.Tensor], str]:
    mesh = rf.init()
    engine = rf.Engine(net, mesh, loss=F.cross_entropy, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), clip_norm=1.0)
    losses = [engine.train_step(batch) for batch in engine.shard(batches())]
    state = {name: value.cpu() for name, value in engine.state_dict().items()}
    carrier = mesh["dp"]._device_carrier
    device = f"{mesh.device.type} {carrier.name if carrier else 'host'}"
    rf.shutdown()
    return losses, state, device


def test_engine_on_one_gpu_has_the_losses_and_weights_of_one_process_on_the_cpu() -> None:
    ((losses, state, _),) = run_ranks(1, train, joined=False)
    for size in (1, 2, 3):
        answers = run_ranks(size, train, joined=False, env={"RINGFOLD_DEVICE": "cuda"}, timeout_s=110)
        assert answers[0][2].startswith("cuda")
        assert size == 1 or answers[0][2] == "cuda shared_device"
        for theirs, _, _ in answers:
            assert theirs == pytest.approx(losses, rel=1e-10)
        for name, value in answers[0][1].items():
            torch.testing.assert_close(value, state[name], rtol=1e-9, atol=1e-11, msg=f"{name} on {size} ranks")


def own_loop() -> list[torch.Tensor]:
    mesh = rf.init()
    model = rf.DataParallel(net().to(mesh.device), mesh["dp"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in rf.shard([(x[:12], y[:12].clamp(min=0)) for x, y in batches()], mesh["dp"]):
        F.cross_entropy(model(x.to(mesh.device)), y.to(mesh.device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = [parameter.detach().cpu() for parameter in model.parameters()]
    rf.shutdown()
    return weights


def test_data_parallel_on_one_gpu_has_the_weights_of_one_process_on_the_cpu() -> None:
    (expected,) = run_ranks(1, own_loop, joined=False)
    for answer in run_ranks(3, own_loop, joined=False, env={"RINGFOLD_DEVICE": "cuda"}, timeout_s=110):
        for ours, theirs in zip(answer, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def ringfold(*words: str, **environ: str) -> Any:
    command = [sys.executable, "-m", "ringfold", *words]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, timeout=110, check=False)


def test_the_example_trains_saves_and_resumes_on_two_ranks_of_one_gpu(tmp_path: Path) -> None:
    words = ("run", "-n", "2", "examples/train_gpt.py", "--out", str(tmp_path))
    first = ringfold(*words, "--steps", "60", RINGFOLD_DEVICE="cuda")
    assert first.returncode == 0, first.stdout + first.stderr
    again = ringfold(*words, "--steps", "80", "--resume", RINGFOLD_DEVICE="cuda")
    assert again.returncode == 0, again.stdout + again.stderr


def test_verify_proves_a_layout_on_the_gpu() -> None:
    ended = ringfold("verify", "examples/train_gpt.py:verified", "--layout", "dp3", RINGFOLD_DEVICE="cuda")
    assert ended.returncode == 0, ended.stdout + ended.stderr
