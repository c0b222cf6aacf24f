"""torch's own parallelism over a ringfold process group, on ranks that share one GPU: the parameters are those of one process on the CPU, in float64.

The bound is that of tests/torch_distributed/test_parallelism.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.harness import run_ranks
from tests.torch_distributed.groups import ringfold_group
from tests.torch_distributed.test_parallelism import BOUND, STEPS, batch, make_model, oracle, sgd

pytestmark = pytest.mark.gpu

SIZE = 2


def train_on_gpu(model: nn.Module, rank: int) -> None:
    optimizer = sgd(model)
    for step in range(STEPS):
        x, y = (part.chunk(SIZE)[rank].cuda() for part in batch(step, SIZE))
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()


def with_ddp(rank: int) -> dict[str, Tensor]:
    model = make_model().cuda()
    train_on_gpu(DistributedDataParallel(model, bucket_cap_mb=0.001), rank)
    return dict(model.named_parameters())


def with_ddp_hook(rank: int) -> dict[str, Tensor]:
    model = make_model().cuda()
    parallel = DistributedDataParallel(model, bucket_cap_mb=0.001)
    parallel.register_comm_hook(None, default_hooks.allreduce_hook)
    train_on_gpu(parallel, rank)
    return dict(model.named_parameters())


def with_fsdp2(rank: int) -> dict[str, Tensor]:
    model = make_model().cuda()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    train_on_gpu(model, rank)
    return {name: parameter.full_tensor() for name, parameter in model.named_parameters()}  # type: ignore[attr-defined]


def on_gpu(folder: str, way: Callable[[int], dict[str, Tensor]]) -> dict[str, Tensor]:
    with ringfold_group(folder) as (rank, _):
        torch.cuda.set_device(0)
        trained = {name: parameter.detach().cpu() for name, parameter in way(rank).items()}
        assert dist.group.WORLD.communicator._device_carrier.name == "shared_device"  # type: ignore[union-attr]
        return trained


@pytest.mark.parametrize("way", [with_ddp, with_ddp_hook, with_fsdp2], ids=lambda way: way.__name__)
def test_torch_trains_on_one_gpu_as_one_process_does(way: Callable[[int], Any], tmp_path: Path) -> None:
    expected = oracle(SIZE)
    for parameters in run_ranks(SIZE, on_gpu, str(tmp_path), way, joined=False, timeout_s=100):
        for name, value in parameters.items():
            difference = float((value - expected[name]).abs().max())
            assert difference <= BOUND, f"{name} is off by {difference}"
