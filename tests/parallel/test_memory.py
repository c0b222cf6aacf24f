"""Memory: what a rank keeps is what ZeRO promises, counted, predicted, and as the system sees it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ringfold.collectives.communicator import Communicator
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.parallel.test_engine import make_engine

WIDTH, BLOCKS = 96, 6
RANKS = 4
BUCKET_MB = 0.05


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.register_buffer("table", torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * self.table[0]


def keep(world: Communicator, layout: str) -> tuple[dict[str, int], dict[str, float]]:
    engine = make_engine(
        world, layout, Model, loss=F.mse_loss, optimizer=lambda p: torch.optim.AdamW(p, fused=True), bucket_mb=BUCKET_MB, clip_norm=1.0
    )
    for _ in range(2):
        engine.train_step((torch.randn(3, WIDTH), torch.randn(3, WIDTH)))
    said = engine.explain()
    return said.memory, said.predicted


@pytest.mark.parametrize("layout", ["zero0", "zero1", "zero2", "zero3", "bf16 zero1", "bf16 zero2", "bf16 zero3"])
def test_every_rank_keeps_what_is_predicted_and_no_more(layout: str) -> None:
    count = sum(parameter.numel() for parameter in Model().parameters())
    norms = sum(parameter.numel() for name, parameter in Model().named_parameters() if "norm" in name)
    block = sum(parameter.numel() for parameter in Block().parameters())
    largest = max(2 * WIDTH * WIDTH * 4, BUCKET_MB * 2**20)
    stage = int(layout[-1])
    low = layout.startswith("bf16")
    element, master = (2, 4) if low else (4, 0)
    expected = {
        "parameters": count * element / (RANKS if stage == 3 else 1),
        "masters": count * master / RANKS,
        "gradients": count * element / (RANKS if stage > 1 or (stage and low) else 1),
        "optimizer state": count * 8 / (RANKS if stage else 1),
    }
    # Every parameter and bucket is rounded up, those of stage 3 also to different lengths; in bf16 normalisations stay in float32.
    slack = 64 * RANKS * 4 * (BLOCKS * 6 + BLOCKS * BLOCKS) + (BLOCKS * 2 * WIDTH * 4 if low else 0)
    results = run_ranks(RANKS, keep, layout)
    for found, predicted in results:
        for purpose, nbytes in expected.items():
            assert predicted[purpose] == pytest.approx(nbytes, abs=norms * 4 if low else 0), purpose
            assert found[purpose] <= nbytes + slack, purpose
        assert found["gradient buffers"] <= (2 * max(largest, block * 4) + slack if stage > 1 or low else 0)
        assert found["gathered blocks"] <= (2 * block * element + slack if stage == 3 else 0)
        assert found["buffers"] == (20 if low else 40)
        assert found["process"] > sum(nbytes for purpose, nbytes in found.items() if purpose != "process") / RANKS
    for purpose in ("optimizer state", "masters"):
        total = sum(found[purpose] for found, _ in results)
        assert total >= expected[purpose] * (RANKS if stage else 1) - slack, purpose
