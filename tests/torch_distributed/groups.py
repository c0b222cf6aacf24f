"""A torch process group of the backend ringfold around the body of a test, on ranks that the harness has started with `joined=False`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ringfold.collectives.process_group  # noqa: F401  # registers the backend
import torch.distributed as dist
from ringfold.collectives import environment


@contextmanager
def ringfold_group(folder: str) -> Iterator[tuple[int, int]]:
    """Make the default group, yield (rank, size), and destroy it; `folder` is one of the test's own, the same on all ranks."""
    rank, size = int(os.environ[environment.RANK]), int(os.environ[environment.WORLD_SIZE])
    dist.init_process_group("ringfold", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
    try:
        yield rank, size
    finally:
        dist.destroy_process_group()
