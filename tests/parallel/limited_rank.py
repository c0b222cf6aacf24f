"""A rank that moves into its control group before it loads anything, then trains a GPT of 50 M parameters: limited_rank.py PREFIX LOSSES"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROWS, TOKENS, STEPS = 4, 16, 3  # so few that parameters, gradients and the optimizer's state are what takes memory


def train() -> list[float]:
    """Return the losses."""
    import ringfold as rf
    import torch
    from ringfold.benchmarks._model import GPT, Size, next_byte_loss, random_batches

    mesh = rf.init()
    torch.manual_seed(0)
    engine = rf.Engine(
        lambda: GPT(Size(dim=640, layers=10, heads=8), TOKENS),
        mesh,
        loss=next_byte_loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    )
    losses = [engine.train_step(batch) for batch in engine.shard(random_batches(STEPS, ROWS, TOKENS, seed=0))]
    rf.shutdown()
    return losses


if __name__ == "__main__":
    prefix, path = sys.argv[1:]
    rank = os.environ["RANK"]
    Path(f"{prefix}{rank}", "cgroup.procs").write_text("0")
    os.environ["RINGFOLD_DEVICE"] = "cpu"
    losses = train()
    if rank == "0":
        Path(path).write_text(json.dumps(losses))
