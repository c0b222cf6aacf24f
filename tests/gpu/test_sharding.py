"""Sharded, offloaded, recomputed and low-precision training on ranks that share one GPU gives what one process gives on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import ringfold as rf
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.parallel.test_memory import WIDTH, Block

pytestmark = pytest.mark.gpu

ROWS, STEPS = 11, 6
GPU = {"RINGFOLD_DEVICE": "cuda"}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, WIDTH)
        nn.init.normal_(self.embed.weight, std=0.1)  # else the first loss overflows in fp16, and that step is skipped
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 17, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net() -> nn.Module:
    torch.manual_seed(7)
    return Model()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    drawn = []
    for _ in range(STEPS):
        target = torch.randint(17, (ROWS,), generator=generator)
        target[:3] = -100
        drawn.append((torch.randint(17, (ROWS,), generator=generator), target))
    return drawn


def train(
    layout: str, save: str | None = None, resume: str | None = None, clip_norm: float | None = 1.0
) -> tuple[list[float], dict[str, Tensor], str]:
    mesh = rf.init(layout)
    engine = rf.Engine(
        net, mesh, loss=F.cross_entropy, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True), clip_norm=clip_norm, bucket_mb=0.01
    )
    if resume is not None:
        engine.resume(resume)
    losses = [engine.train_step(batch) for batch in engine.shard(batches())]
    if save is not None:
        engine.save(Path(save) / "step")
    state = {name: value.cpu() for name, value in engine.state_dict().items()}
    assert "trained" in str(engine.explain())
    device = mesh.device.type
    rf.shutdown()
    return losses, state, device


@pytest.mark.parametrize(
    "layout",
    [
        "fp64 zero1",
        "fp64 zero2",
        "fp64 zero3",
        "fp64 zero3 micro2",
        "fp64 zero1:cpu",
        "fp64 zero2:cpu micro2",
        "fp64 zero3:cpu",
        "fp64 zero3 recompute",
    ],
)
@pytest.mark.parametrize("size", [1, 3])
def test_every_stage_has_the_losses_and_weights_of_one_process_on_the_cpu(layout: str, size: int) -> None:
    ((losses, state, _),) = run_ranks(1, train, "fp64", joined=False)
    answers = run_ranks(size, train, layout, joined=False, env=GPU, timeout_s=110)
    for theirs, _, device in answers:
        assert device == "cuda"
        assert theirs == pytest.approx(losses, rel=1e-10)
    for name, value in answers[0][1].items():
        torch.testing.assert_close(value, state[name], rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_in_a_file_too(tmp_path: Path) -> None:
    ((losses, _, _),) = run_ranks(1, train, "fp64", joined=False)
    for theirs, _, _ in run_ranks(2, train, f"fp64 zero3:nvme={tmp_path}", joined=False, env=GPU, timeout_s=110):
        assert theirs == pytest.approx(losses, rel=1e-10)


@pytest.mark.parametrize("where", ["cpu", "nvme"])
def test_a_step_beside_backward_too(where: str, tmp_path: Path) -> None:
    ((losses, state, _),) = run_ranks(1, train, "fp64", None, None, None, joined=False)
    layout = "fp64 zero3:cpu" if where == "cpu" else f"fp64 zero3:nvme={tmp_path}"
    answers = run_ranks(2, train, layout, None, None, None, joined=False, env=GPU, timeout_s=110)
    for theirs, _, _ in answers:
        assert theirs == pytest.approx(losses, rel=1e-10)
    for name, value in answers[0][1].items():
        torch.testing.assert_close(value, state[name], rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "layout", ["bf16 zero1", "bf16 zero3", "bf16 zero2:cpu", "fp16 zero2", "fp16 zero3:cpu", "fp8 zero3", "bf16 zero3 recompute:selective"]
)
def test_few_bits_stay_near_float32(layout: str) -> None:
    ((losses, _, _),) = run_ranks(1, train, "", joined=False)
    for theirs, _, _ in run_ranks(2, train, layout, joined=False, env=GPU, timeout_s=110):
        assert theirs == pytest.approx(losses, rel=0.05)


def test_a_checkpoint_goes_from_the_host_of_one_layout_to_the_gpu_of_another(tmp_path: Path) -> None:
    run_ranks(2, train, "fp64 zero3:cpu", str(tmp_path), joined=False, env=GPU, timeout_s=110)
    ((on_cpu, _, _),) = run_ranks(1, train, "fp64", None, str(tmp_path), joined=False)
    for theirs, _, _ in run_ranks(3, train, "fp64 zero2", None, str(tmp_path), joined=False, env=GPU, timeout_s=110):
        assert theirs == pytest.approx(on_cpu, rel=1e-9)
