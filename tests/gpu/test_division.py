"""Work that is divided inside layers gives, on ranks that share one GPU, what one process of plain PyTorch gives on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import ringfold as rf
import torch

from tests.harness import run_ranks
from tests.parallel.test_engine import CLIP_NORM, LEARNING_RATE, LOSSES, assert_same_numbers, numbers_of, plain_training, slower
from tests.parallel.test_tensor_parallel import grouped

pytestmark = pytest.mark.gpu


def train(layout: str) -> tuple[str, dict[str, Any]]:
    mesh = rf.init(layout)
    torch.manual_seed(mesh.world.rank)  # as in plain_training on rank 0, which counts
    engine = rf.Engine(
        grouped,
        mesh,
        loss=LOSSES["pair"],
        optimizer=lambda p: torch.optim.AdamW(p, lr=LEARNING_RATE),
        scheduler=slower,
        clip_norm=CLIP_NORM,
        bucket_mb=0.001,
    )
    found = numbers_of(engine)
    rf.shutdown()
    return mesh.device.type, found


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (2, "fp64 tp2"),
        (2, "fp64 cp2"),
        (2, "fp64 cp2:ulysses"),
        (4, "fp64 tp2 cp2 micro2"),
        (4, "fp64 dp2 tp2 zero3"),
        (4, "fp64 dp2 cp2 zero2:cpu recompute"),
    ],
)
def test_every_layout_has_the_numbers_of_plain_pytorch(size: int, layout: str) -> None:
    expected = plain_training(LOSSES["pair"], make=grouped)
    for device, found in run_ranks(size, train, layout, joined=False, env={"RINGFOLD_DEVICE": "cuda"}, timeout_s=110):
        assert device == "cuda"
        assert_same_numbers(found, expected)
