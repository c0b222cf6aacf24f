"""Offload: what rests in a file or in host memory trains as what stays where it is, takes no memory meanwhile, and leaves nothing behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.zero import rest
from ringfold.parallel.zero.shard_file import BLOCK_NBYTES, BOUNCE_NBYTES, ShardFile
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.parallel.test_engine import (
    CLIP_NORM,
    LOSSES,
    ROWS,
    assert_same_numbers,
    global_batches,
    make_engine,
    mine,
    plain_training,
    train,
    train_in_two_halves,
)
from tests.parallel.test_zero import OPTIMIZERS, Small


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 3 * BOUNCE_NBYTES // 2), min_size=1, max_size=4), st.integers(0, 5000))
def test_what_is_stored_is_what_is_fetched_whatever_its_length_and_address(lengths: list[int], askew: int) -> None:
    file = ShardFile("/tmp")
    resting = [file.new(length, torch.uint8) for length in lengths]
    stored = [torch.randint(256, (askew + length,), dtype=torch.uint8)[askew:] for length in lengths]
    for transfer in [file.store(there, values) for there, values in zip(resting, stored, strict=True)]:
        transfer.wait()
    fetched = [torch.zeros(askew + length, dtype=torch.uint8)[askew:] for length in lengths]
    for transfer in [file.fetch(there, into) for there, into in zip(resting, fetched, strict=True)]:
        transfer.wait()
    for there, values, found in zip(resting, stored, fetched, strict=True):
        assert torch.equal(found, values)
        assert torch.equal(there, values)  # the mapping shows it, too
        there.add_(1)  # and what is written through it is fetched
        file.fetch(there, found).wait()
        assert torch.equal(found, values + 1)
    assert file.nbytes % BLOCK_NBYTES == 0
    file.close()


@pytest.mark.parametrize("place", ["cpu", "nvme"])
@pytest.mark.parametrize(("stage", "size", "micro", "loss"), [(1, 2, 1, "torch"), (2, 4, 3, "pair"), (3, 3, 1, "terms"), (3, 1, 2, "torch")])
def test_offloaded_every_stage_has_the_numbers_of_plain_pytorch(place: str, stage: int, size: int, micro: int, loss: str, tmp_path: Path) -> None:
    expected = plain_training(LOSSES[loss])
    option = "cpu" if place == "cpu" else f"nvme={tmp_path}"
    results = run_ranks(size, train, micro, loss, CLIP_NORM, f"zero{stage}:{option}")
    for found in results:
        assert_same_numbers(found, expected)


@contextmanager
def on_a_device(applies: bool = True) -> Iterator[None]:
    """Train inside as where the host's memory is not the one that is computed in: masters on the host, gradients brought there."""
    make = rest.Rest.__init__

    def as_on_a_device(self: rest.Rest, offload: str | None, device: torch.device) -> None:
        make(self, offload, device)
        self.needs_masters = self.is_elsewhere = True

    if applies:
        rest.Rest.__init__ = as_on_a_device  # type: ignore[method-assign]
    try:
        yield
    finally:
        rest.Rest.__init__ = make  # type: ignore[method-assign]


def train_as_on_a_device(world: Communicator, micro: int, layout: str, folder: str) -> dict[str, Any]:
    with on_a_device():
        return train(world, micro, "torch", CLIP_NORM, layout.replace("DIR", folder))


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("layout", ["zero1:cpu", "zero2:cpu", "zero3:cpu", "zero3:nvme=DIR"])
def test_masters_apart_from_what_is_computed_with_have_the_numbers_of_plain_pytorch(layout: str, micro: int, tmp_path: Path) -> None:
    expected = plain_training(F.cross_entropy)
    for found in run_ranks(2, train_as_on_a_device, micro, layout, str(tmp_path)):
        assert_same_numbers(found, expected)


def test_the_comparison_sees_state_that_is_lost_on_its_way(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        assert_same_numbers(run_ranks(1, lose_state, str(tmp_path))[0], plain_training(F.cross_entropy))


def lose_state(world: Communicator, folder: str) -> dict[str, Any]:
    """The mutation: a vector of the first bucket is never written back."""
    store = ShardFile.store

    def forget(self: ShardFile, resting: Tensor, values: Tensor) -> Any:
        return store(self, resting, torch.zeros_like(values) if self._offset(resting) == 0 else values)

    ShardFile.store = forget  # type: ignore[method-assign]
    try:
        return train(world, 1, "torch", CLIP_NORM, f"zero2:nvme={folder}")
    finally:
        ShardFile.store = store  # type: ignore[method-assign]


def steps(world: Communicator, layout: str, optimizer: str) -> dict[str, Tensor]:
    engine = make_engine(
        world, layout, Small, optimizer=OPTIMIZERS[optimizer], loss=F.cross_entropy, bucket_mb=0.01
    )  # clipped, norms would round otherwise
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        tokens = torch.randint(13, (7, 2), generator=generator)
        engine.train_step(mine((tokens[:, 0], tokens[:, 1]), world.rank, world.size))
    with engine.whole_parameters():
        return {name: value.clone() for name, value in engine.module.state_dict().items()}


class Counting(torch.optim.SGD):
    """Counts its steps in a group and in itself."""

    def __init__(self, parameters: Any) -> None:
        super().__init__([{"params": list(parameters), "steps": 0, "sums": torch.zeros(1)}], lr=0.1, momentum=0.9)
        self.steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for group in self.param_groups:
            group["steps"] += 1
            group["sums"] += self.steps
            group["lr"] = 0.1 / (group["steps"] + float(group["sums"]))
        return super().step(closure)


def count_steps(world: Communicator, layout: str) -> tuple[list[Tensor], int, int]:
    engine = make_engine(world, layout, optimizer=Counting, bucket_mb=0.001)
    for batch in global_batches()[:3]:
        engine.train_step(mine(batch, world.rank, world.size))
    with engine.whole_parameters():
        return [value.clone() for value in engine.module.parameters()], engine.optimizer.param_groups[0]["steps"], engine.optimizer.steps


def test_an_optimizer_that_counts_its_steps_counts_one_for_all_buckets(tmp_path: Path) -> None:
    expected, *counts = run_ranks(2, count_steps, "zero2")[0]
    assert counts == [3, 3]
    found, *counts = run_ranks(2, count_steps, f"zero2:nvme={tmp_path}")[0]
    assert counts == [3, 3]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_in_a_file_every_optimizer_has_the_same_bits_as_in_memory(optimizer: str, tmp_path: Path) -> None:
    for stage in (2, 3):
        expected = run_ranks(2, steps, f"zero{stage}", optimizer)[0]
        for name, value in run_ranks(2, steps, f"zero{stage}:nvme={tmp_path}", optimizer)[0].items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("before", "after"), [("zero3:nvme=DIR", "zero1"), ("", "zero3:nvme=DIR"), ("zero2:nvme=DIR", "zero3:cpu")])
def test_a_checkpoint_goes_from_memory_to_a_file_and_back(tmp_path: Path, before: str, after: str) -> None:
    (files := tmp_path / "files").mkdir()
    (saved := tmp_path / "saved").mkdir()
    expected = plain_training(LOSSES["pair"])
    half = len(ROWS) // 2
    run_ranks(2, train_in_two_halves, saved, True, before.replace("DIR", str(files)))
    for found in run_ranks(3, train_in_two_halves, saved, False, after.replace("DIR", str(files))):
        assert_same_numbers(found, {key: value[half:] if isinstance(value, list) else value for key, value in expected.items()})


WIDTH, BLOCKS = 128, 8


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x).relu()
        return x


def keep(world: Communicator, layout: str, folder: str) -> tuple[dict[str, int], list[str]]:
    engine = make_engine(world, layout.replace("DIR", folder), Deep, loss=F.mse_loss, bucket_mb=0.07)
    for _ in range(2):
        engine.train_step((torch.randn(3, WIDTH), torch.randn(3, WIDTH)))
    return engine.memory(), os.listdir(folder)


@pytest.mark.parametrize(
    ("layout", "in_file"), [("zero1:nvme=DIR", 2), ("zero3:nvme=DIR", 3), ("bf16 zero2:nvme=DIR", 3), ("bf16 zero3:nvme=DIR", 3.5)]
)
def test_what_lies_in_a_file_takes_no_memory_and_no_name(layout: str, in_file: float, tmp_path: Path) -> None:
    numel = BLOCKS * (WIDTH * WIDTH + WIDTH)
    padding = 4 * BLOCK_NBYTES * (BLOCKS + 1) * BLOCKS * 2  # ranges are whole blocks; those of stage 3 have lengths of their own
    results = run_ranks(2, keep, layout, str(tmp_path))
    assert sum(found["files"] for found, _ in results) >= numel * 4 * in_file
    for found, names in results:
        assert names == []
        assert found["files"] <= numel * 4 * in_file / 2 + padding
        assert found["optimizer state"] <= 4 * 4 * BLOCKS * 2  # a count of steps for each piece
        assert found["masters"] == 0
        assert found["parameters"] == (0 if "zero3" in layout else pytest.approx(numel * (2 if "bf16" in layout else 4), abs=padding))
        assert 0 < found["offload"] <= 2 * (3.5 * 4 * (WIDTH * WIDTH + 4 * WIDTH) / 2 + padding / BLOCKS)  # of the largest bucket's vectors, two rows


def refused(world: Communicator, folder: str) -> None:
    for place, message in ((f"{folder}/absent", "No such file or directory"), (f"{folder}/file", "Not a directory")):
        with pytest.raises(ConfigError, match=f"no file can be made in .*{place}.*{message}"):
            make_engine(world, f"zero3:nvme={place}", Deep, loss=F.mse_loss)
    spare = world.empty(8 << 20, dtype=torch.uint8)  # registered memory is a file, too: leave enough of it
    del spare
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * BLOCK_NBYTES, limit[1]))
    try:
        with pytest.raises(ConfigError, match=r"has no room \(File too large\).*needs .* for its next shard alone"):
            make_engine(world, f"zero1:nvme={folder}", Deep, loss=F.mse_loss)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_folder_that_is_not_there_or_too_small_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run_ranks(1, refused, str(tmp_path))


KILLED = """
import os, sys, torch
import ringfold as rf
mesh = rf.init(f"zero3:nvme={sys.argv[1]}")
engine = rf.Engine(lambda: torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8))), mesh, loss=torch.nn.functional.mse_loss,
                   optimizer=lambda p: torch.optim.AdamW(p))
for step in range(10**9):
    engine.train_step((torch.randn(2, 512), torch.randn(2, 512)))
    if step == 1:
        print("trains", flush=True)
"""


def test_after_kill_9_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "trains\n"
        assert os.listdir(tmp_path) == []
        links = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir() if link.is_symlink()]
        assert any(link.startswith(str(tmp_path)) and link.endswith("(deleted)") for link in links)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert os.listdir(tmp_path) == []
