"""runtime/checkpoint/saver.py: training goes on while a checkpoint is written, and nothing of it gets into what is saved."""

from __future__ import annotations

import os
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ringfold.collectives.errors import CheckpointError
from ringfold.runtime import checkpoint
from ringfold.runtime.checkpoint import Saver, TensorPart, writer

from tests.harness import run_ranks

COUNT = 1 << 20


@contextmanager
def held_back() -> Iterator[threading.Event]:
    """Let no file be written before the event is set."""
    may_write, original = threading.Event(), writer.TensorFile.write

    def write(self: Any, path: Path) -> dict[str, str]:
        assert may_write.wait(60)
        return original(self, path)

    writer.TensorFile.write = write  # type: ignore[method-assign]
    try:
        yield may_write
    finally:
        may_write.set()
        writer.TensorFile.write = original  # type: ignore[method-assign]


def test_tensors_may_change_at_once_and_the_bytes_are_those_of_the_call(tmp_path: Path) -> None:
    saver, turned = Saver(), torch.arange(12.0).view(3, 4).t()
    state = {"w": torch.full((COUNT,), 1.0), "turned": turned, "half": torch.ones(5, dtype=torch.bfloat16)}
    with held_back() as may_write:
        path = saver.save(tmp_path / "step-1", step=1, model_state=state, extra={"n": [1, 2]}, asynchronous=True)
        for value in state.values():
            value.fill_(2)
        assert not (path / "manifest.json").exists()
        may_write.set()
        saver.wait()
    saved = checkpoint.load(tmp_path)
    loaded = saved.model_state()
    assert loaded["w"].eq(1).all()
    assert loaded["half"].eq(1).all()
    assert torch.equal(loaded["turned"], torch.arange(12.0).view(3, 4).t())
    assert saved.extra() == {"n": [1, 2]}
    saver.close()


def overlap_on_ranks(world: Any, folder: Path) -> None:
    saver = Saver(world)
    values = torch.full((COUNT,), float(world.rank))
    state = {"w": TensorPart(values, (COUNT * world.size,), COUNT * world.rank), "same": torch.zeros(COUNT)}
    for step in (1, 2, 3):
        with held_back() as may_write:
            saver.save(folder / f"step-{step}", step=step, model_state=state, asynchronous=True)
            values += 10
            state["same"] += 1
            # Training goes on, in an order of its own on each rank's thread.
            for _ in range(50):
                total = torch.ones(1000)
                world.all_reduce(total)
                assert total.eq(world.size).all()
            may_write.set()
            for _ in range(50):
                world.barrier()
            saver.wait()
    saver.close()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_ranks_train_on_while_their_threads_agree(tmp_path: Path, transport: str) -> None:
    run_ranks(3, overlap_on_ranks, tmp_path, transport=transport)
    for step in (1, 2, 3):
        state = checkpoint.load(tmp_path / f"step-{step}").model_state()
        expected = torch.arange(3.0).repeat_interleave(COUNT) + 10 * (step - 1)
        assert torch.equal(state["w"], expected)
        assert state["same"].eq(step - 1).all()


def test_the_next_save_waits_for_the_last_and_raises_what_became_of_it(tmp_path: Path) -> None:
    saver, state = Saver(), {"w": torch.zeros(3)}
    (tmp_path / "file").touch()
    saver.save(tmp_path / "file" / "step-1", step=1, model_state=state, asynchronous=True)
    with pytest.raises(CheckpointError, match="saving step 1"):
        saver.save(tmp_path / "step-2", step=2, model_state=state, asynchronous=True)
    assert not (tmp_path / "step-2").exists()
    saver.save(tmp_path / "step-2", step=2, model_state=state, asynchronous=True)
    saver.save(tmp_path / "step-3", step=3, model_state=state)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-2", "step-3"]
    saver.save(tmp_path / "file" / "step-4", step=4, model_state=state, asynchronous=True)
    with pytest.raises(CheckpointError, match="saving step 4"):
        saver.close()
    saver.close()


def fail_on_rank_1(world: Any, folder: Path) -> list[str]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    saver, texts = Saver(world), []
    saver.save(folder / "step-0", step=0, model_state={}, asynchronous=True)
    saver.wait()
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    state = {"w": TensorPart(torch.zeros(COUNT), (COUNT * world.size,), COUNT * world.rank)}
    for step in (1, 2):
        saver.save(folder / f"step-{step}", step=step, model_state=state, asynchronous=True)
        with pytest.raises(CheckpointError) as caught:
            saver.wait()
        texts.append(str(caught.value))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    saver.save(folder / "step-3", step=3, model_state=state, asynchronous=True, keep=1)
    saver.close()
    return texts


def test_an_error_behind_one_rank_is_raised_on_all_and_the_next_save_succeeds(tmp_path: Path) -> None:
    for rank, texts in enumerate(run_ranks(2, fail_on_rank_1, tmp_path)):
        for text in texts:
            assert "limit is reached" in text
            assert text.startswith("on rank 1:") is (rank == 0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def refuse_on_rank_1(world: Any, folder: Path) -> str:
    saver = Saver(world)
    extra = {"f": print} if world.rank == 1 else {}
    with pytest.raises(CheckpointError) as caught:
        saver.save(folder / "step-1", step=1, model_state={}, extra=extra, asynchronous=True)
    saver.close()
    return str(caught.value)


def test_state_that_cannot_be_saved_is_refused_at_once_on_all(tmp_path: Path) -> None:
    assert all("f: builtins" in text for text in run_ranks(2, refuse_on_rank_1, tmp_path))


def fail_to_copy(world: Any, folder: Path) -> str:
    from ringfold.runtime.checkpoint.host_copy import HostCopy

    def full(*_: Any) -> None:
        raise MemoryError("no memory")

    saver = Saver(world)
    if world.rank == 1:
        HostCopy.take = full  # type: ignore[assignment]
    saver.save(folder / "step-1", step=1, model_state={"w": torch.zeros(2)}, asynchronous=True)
    with pytest.raises(CheckpointError) as caught:
        saver.close()
    return str(caught.value)


def test_a_rank_without_memory_for_the_copy_fails_the_save_on_all(tmp_path: Path) -> None:
    assert all("cannot be copied to host memory: no memory" in text for text in run_ranks(2, fail_to_copy, tmp_path))
    assert list(tmp_path.iterdir()) == []


def measure_memory(world: Any, folder: Path) -> tuple[int, int, int]:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    saver = Saver(world)
    parts = {f"w{i}": TensorPart(torch.ones(4 * COUNT), (8 * COUNT,), 4 * COUNT * world.rank) for i in range(4)}
    saver.save(folder / "step-0", step=0, model_state={"w": torch.zeros(3)}, asynchronous=True)
    saver.wait()
    before, peak = resident(), 0
    for step in (1, 2, 3):
        saver.save(folder / f"step-{step}", step=step, model_state=parts, asynchronous=True, keep=1)
        while saver._behind._thread is not None and saver._behind._thread.is_alive():
            peak = max(peak, resident())
            time.sleep(0.001)
    saver.close()
    return sum(4 * part.values.numel() for part in parts.values()), peak - before, resident() - before


def test_an_asynchronous_save_takes_the_memory_of_one_copy_of_the_ranks_parts_and_gives_it_back(tmp_path: Path) -> None:
    for nbytes, peak, left in run_ranks(2, measure_memory, tmp_path):
        assert nbytes == 4 * 16 << 20
        assert 0.9 * nbytes < peak < 1.1 * nbytes
        assert left < 0.1 * nbytes


@pytest.mark.quiet
@pytest.mark.slow
def test_an_asynchronous_save_of_1_gb_costs_the_step_a_tenth_of_the_time_to_write_it(tmp_path: Path) -> None:
    saver, state = Saver(), {f"w{i}": torch.rand(1 << 22) for i in range(60)}  # 60 times 16 MiB
    blocked, written = [], []
    for step in range(6):
        begin = time.perf_counter()
        saver.save(tmp_path / f"step-{step}", step=step, model_state=state, keep=1, asynchronous=step % 2 == 0)
        returned = time.perf_counter() - begin
        saver.wait()
        (blocked if step % 2 == 0 else written).append(returned)
    saver.close()
    print(f"blocked {blocked} s, written in {written} s")
    assert min(blocked[1:]) < 0.1 * statistics.median(written)  # the first copy pays for fresh memory


SCRIPT = """
import sys, torch, ringfold as rf
from ringfold.runtime.checkpoint import Saver
mesh = rf.init()
saver = Saver(mesh.world)
saver.save(sys.argv[1], step=1, model_state={"w": torch.ones(1 << 20)}, asynchronous=True)
if sys.argv[2] == "shutdown":
    rf.shutdown()
"""


@pytest.mark.parametrize("end", ["exit", "shutdown"])
def test_a_process_that_ends_has_saved(tmp_path: Path, end: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "ringfold", "run", "-n", "2", str(tmp_path / "script.py"), str(tmp_path / "run" / "step-1"), end]
    subprocess.run(command, check=True, timeout=90, capture_output=True)
    assert checkpoint.load(tmp_path / "run").model_state()["w"].eq(1).all()


def test_a_process_that_ends_tells_of_a_save_that_failed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "file").touch()
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "file" / "step-1"), "exit"]
    done = subprocess.run(command, timeout=90, capture_output=True, text=True)
    assert "CheckpointError: saving step 1" in done.stderr


def engine_saves(folder: str) -> list[float]:
    import ringfold as rf

    mesh = rf.init()
    torch.manual_seed(0)
    options = {"loss": torch.nn.functional.mse_loss, "optimizer": lambda p: torch.optim.AdamW(p, lr=0.1)}
    engine = rf.Engine(torch.nn.Linear(4, 4), mesh, **options)
    batch = (torch.randn(8, 4), torch.randn(8, 4))
    engine.train_step(batch)
    engine.save(Path(folder) / "step-1", asynchronous=True)
    losses = [engine.train_step(batch) for _ in range(3)]
    engine.close()
    again = rf.Engine(torch.nn.Linear(4, 4), mesh, **options)
    assert again.resume(folder) == 1
    assert [again.train_step(batch) for _ in range(3)] == losses
    rf.shutdown()
    return losses


@pytest.mark.usefixtures("leaks")
def test_an_engine_trains_on_behind_an_asynchronous_save_and_resumes_from_it(tmp_path: Path) -> None:
    first, second = run_ranks(2, engine_saves, str(tmp_path), joined=False)
    assert first == second
