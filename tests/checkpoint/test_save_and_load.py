"""runtime/checkpoint/{writer,reader}.py: what is saved comes back bit by bit, whole or not at all."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ringfold.collectives.errors import CheckpointError, Corrupt, Incompatible, Incomplete
from ringfold.parallel.placement import Placement, Shard
from ringfold.runtime import checkpoint
from ringfold.runtime.checkpoint import writer
from ringfold.runtime.checkpoint.manifest import Manifest
from safetensors.torch import load_file, save_file
from torch import nn


class Tied(nn.Module):
    """Every dtype and shape that is awkward: tied, 0-dim, empty, bfloat16, bool, a view of a larger pool."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.body = nn.Linear(width, width, dtype=torch.bfloat16)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.pooled = nn.Parameter(torch.randn(1 << 20)[10:13])
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("turned", torch.arange(6, dtype=torch.int16).view(2, 3).t())


def filled(seed: int, **options: int) -> Tied:
    torch.manual_seed(seed)
    model = Tied(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_equal(left: nn.Module, right: nn.Module) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name


def save(folder: Path, step: int, model: nn.Module | None = None, **options: Any) -> Path:
    state = (model or filled(step)).state_dict()
    return checkpoint.save(folder / f"step-{step}", step=step, model_state=state, **options)


def test_a_model_comes_back_bit_by_bit(tmp_path: Path) -> None:
    model, other = filled(1), filled(2)
    assert save(tmp_path, 7, model) == tmp_path / "step-7"
    found = checkpoint.load(tmp_path)
    assert (found.step, found.path) == (7, tmp_path / "step-7")
    found.load_model(other)
    assert_equal(other, model)
    assert other.head.weight is other.embed.weight


def test_the_files_are_what_safetensors_reads_and_hold_a_view_without_its_pool(tmp_path: Path) -> None:
    model = filled(1)
    path = save(tmp_path, 7, model)
    assert names_of(path) == ["manifest.json", "model.safetensors"]
    assert (path / "model.safetensors").stat().st_size < 4096
    stored = load_file(path / "model.safetensors")
    assert "head.weight" not in stored  # tied: stored once
    state = model.state_dict()
    for name, value in stored.items():
        assert torch.equal(value, state[name])


def test_what_is_loaded_is_aligned_as_what_torch_makes_wherever_it_lies_in_the_file(tmp_path: Path) -> None:
    for length in range(1, 40, 3):  # of a name, which moves what comes after it
        state = {"n" * length: torch.arange(3.0), "other": torch.arange(33.0)}
        checkpoint.save(tmp_path / f"step-{length}", step=length, model_state=state, optimizer_state=None, extra={})
        loaded = checkpoint.load(tmp_path / f"step-{length}").model_state()
        assert [value.data_ptr() % 64 for value in loaded.values()] == [0, 0]


def test_tied_tensors_come_back_as_one(tmp_path: Path) -> None:
    save(tmp_path, 7)
    state = checkpoint.load(tmp_path).model_state()
    assert state["head.weight"] is state["embed.weight"]


def test_extra_state_comes_back_with_its_types(tmp_path: Path) -> None:
    extra = {"data": {"epoch": 2, "batches": 31}, "best": float("inf"), "betas": (0.9, 0.95), "noise": torch.tensor([1, 2], dtype=torch.uint8)}
    save(tmp_path, 7, extra=extra)
    found = checkpoint.load(tmp_path).extra()
    assert torch.equal(found.pop("noise"), extra.pop("noise"))
    assert found == extra
    assert isinstance(found["betas"], tuple)
    save(tmp_path, 8)
    assert checkpoint.load(tmp_path).extra() == {}
    assert checkpoint.load(tmp_path).optimizer_state() is None


def test_load_takes_the_one_saved_last_or_the_one_named(tmp_path: Path) -> None:
    save(tmp_path, 200)
    save(tmp_path, 100)  # training began again in the same folder
    assert checkpoint.load(tmp_path).step == 100
    assert checkpoint.load(tmp_path / "step-200").step == 200


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 7, filled(1))
    newer = filled(2)
    save(tmp_path, 7, newer)
    assert names_of(tmp_path) == ["step-7"]
    other = filled(3)
    checkpoint.load(tmp_path).load_model(other)
    assert_equal(other, newer)


def test_the_last_k_stay_and_other_names_are_never_removed(tmp_path: Path) -> None:
    state = filled(0).state_dict()
    checkpoint.save(tmp_path / "best", step=1, model_state=state)
    (tmp_path / "step-notes").mkdir()
    for step in (900, 10, 20, 30):
        save(tmp_path, step, keep=2)
    assert names_of(tmp_path) == ["best", "step-20", "step-30", "step-notes"]
    save(tmp_path, 40, keep=1)
    assert names_of(tmp_path) == ["best", "step-40", "step-notes"]
    with pytest.raises(CheckpointError, match="keep=0"):
        save(tmp_path, 50, keep=0)
    assert checkpoint.load(tmp_path).step == 40


def test_a_folder_that_is_no_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all my work")
    for target in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            checkpoint.save(target, step=1, model_state=filled(0).state_dict())
    assert (tmp_path / "thesis.txt").read_text() == "all my work"


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"File exists .*can be written"):
        checkpoint.save(tmp_path / "file" / "step-1", step=1, model_state=filled(0).state_dict())


def test_nothing_to_load_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(Incomplete, match="no such folder"):
        checkpoint.load(tmp_path / "absent")
    with pytest.raises(Incomplete, match="no complete checkpoint"):
        checkpoint.load(tmp_path)
    (save(tmp_path, 3) / "manifest.json").unlink()
    with pytest.raises(Incomplete, match="step-3"):
        checkpoint.load(tmp_path)
    with pytest.raises(Incomplete):
        checkpoint.load(tmp_path / "step-3")


def test_a_missing_file_is_incomplete_and_named(tmp_path: Path) -> None:
    (save(tmp_path, 3) / "model.safetensors").unlink()
    with pytest.raises(Incomplete, match=r"model\.safetensors"):
        checkpoint.load(tmp_path).load_model(filled(0))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def test_one_flipped_bit_names_the_tensor_and_changes_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, 3, filled(1)) / "model.safetensors"
    flip(path, path.stat().st_size - 1)  # the last tensor: the bool mask, whose elements are the narrowest
    model = filled(2)
    with pytest.raises(Corrupt, match=r"sha256 differs of mask\."):
        checkpoint.load(tmp_path).load_model(model)
    assert_equal(model, filled(2))


@pytest.mark.parametrize("keep_nbytes", [0, 5, 100, -1])
def test_a_short_file_names_its_tensors(tmp_path: Path, keep_nbytes: int) -> None:
    path = save(tmp_path, 3) / "model.safetensors"
    os.truncate(path, keep_nbytes if keep_nbytes >= 0 else path.stat().st_size - 1)
    with pytest.raises(Corrupt, match=r"embed\.weight"):
        checkpoint.load(tmp_path).load_model(filled(0))


def test_a_changed_manifest_is_corrupt(tmp_path: Path) -> None:
    path = save(tmp_path, 3, extra={"lr": 0.125}) / "manifest.json"
    text = path.read_text()
    for damaged in (text.replace("0.125", "0.225"), text[:-20], "[]", ""):
        path.write_text(damaged)
        with pytest.raises(Corrupt, match=r"manifest\.json"):
            checkpoint.load(tmp_path)
    path.write_text(json.dumps({**json.loads(text), "version": 3}))
    with pytest.raises(Incompatible, match="version 3"):
        checkpoint.load(tmp_path)


def test_another_model_is_told_every_difference_and_is_not_changed(tmp_path: Path) -> None:
    save(tmp_path, 3, filled(1))
    model = filled(2, width=6)
    model.extra = nn.Linear(2, 2)
    model.scale = nn.Parameter(model.scale.detach().double())
    del model.empty
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(Incompatible) as caught:
        checkpoint.load(tmp_path).load_model(model)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:-1]]
    assert sorted(lines) == sorted(
        [
            "missing in the checkpoint: extra.weight float32 [2, 2]",
            "missing in the checkpoint: extra.bias float32 [2]",
            "not in the model: empty float32 [0, 3]",
            "dtype of scale: float32 in the checkpoint, float64 in the model",
            "shape of embed.weight: [7, 5] in the checkpoint, [7, 6] in the model",
            "shape of head.weight: [7, 5] in the checkpoint, [7, 6] in the model",
            "shape of body.weight: [5, 5] in the checkpoint, [6, 6] in the model",
            "shape of body.bias: [5] in the checkpoint, [6] in the model",
        ]
    )
    assert "differ in 8" in str(caught.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_tensors_that_only_the_model_ties_are_a_difference(tmp_path: Path) -> None:
    untied = filled(1)
    untied.head.weight = nn.Parameter(torch.zeros(7, 5))
    save(tmp_path, 3, untied)
    with pytest.raises(Incompatible, match=r"tied in the model, and different in the checkpoint: embed\.weight and head\.weight"):
        checkpoint.load(tmp_path).load_model(filled(2))
    again = filled(2)
    again.head.weight = nn.Parameter(torch.ones(7, 5))
    checkpoint.load(tmp_path).load_model(again)
    assert_equal(again, untied)


def test_what_needs_pickle_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 3, extra={"schedule": [len], "deep": {"model": nn.Linear(1, 1)}})
    assert "schedule.0" in str(caught.value)
    assert "deep.model" in str(caught.value)
    assert names_of(tmp_path) == []


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[None]:
    """Let writes fail past `nbytes`: a tmpfs where root may mount one, else a limit on the size of a file."""
    folder.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount") is not None
    mounted = mounted and subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", folder], capture_output=True).returncode == 0
    if mounted:
        try:
            yield
        finally:
            subprocess.run(["umount", folder], check=True)
        return
    with file_limit(nbytes):
        yield


@contextmanager
def file_limit(nbytes: int) -> Iterator[None]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def assert_previous_survives(folder: Path, model: nn.Module) -> None:
    assert names_of(folder) == ["step-1"]
    other = filled(9)
    checkpoint.load(folder).load_model(other)
    assert_equal(other, model)


def test_a_full_disk_leaves_the_previous_checkpoint_and_no_temporary(tmp_path: Path) -> None:
    folder, model = tmp_path / "disk", filled(1)
    big = {"w": torch.zeros(1 << 19)}
    with small_disk(folder, 1 << 20):
        save(folder, 1, model)
        with pytest.raises(CheckpointError, match=r"step 2 .* full .*: \d{7} bytes needed, \d+ bytes free"):
            checkpoint.save(folder / "step-2", step=2, model_state=big)
        assert_previous_survives(folder, model)


def test_a_disk_that_fills_up_while_saving_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    # The look at the free space beforehand cannot see this limit, so writing itself fails.
    save(tmp_path, 1, model := filled(1))
    with file_limit(1 << 20), pytest.raises(CheckpointError, match="bytes needed") as caught:
        checkpoint.save(tmp_path / "step-2", step=2, model_state={"w": torch.zeros(1 << 19)})
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert_previous_survives(tmp_path, model)


CRASHES = ("mkdir", "fsync", "rename")


def crash_at(folder: str, call: str, count: int) -> None:
    """Save over step-1 and beside it, and die by SIGKILL at the count-th call of os.`call`."""
    original, seen = getattr(os, call), 0

    def dying(*args: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(os, call, dying)
    for step in (1, 2):
        save(Path(folder), step, filled(2), extra={"a": torch.ones(3)}, keep=1)


@pytest.mark.parametrize("call", CRASHES)
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, call: str) -> None:
    context = multiprocessing.get_context("fork")
    old, new = filled(1), filled(2)
    for count in range(1, 20):
        folder = tmp_path / str(count)
        save(folder, 1, old)
        process = context.Process(target=crash_at, args=(str(folder), call, count))
        process.start()
        process.join(timeout=60)
        found = checkpoint.load(folder)
        model = filled(3)
        found.load_model(model)
        value = model.state_dict()["body.weight"]
        assert any(torch.equal(value, whole.state_dict()["body.weight"]) for whole in (old, new))
        save(folder, 3, new, keep=1)
        assert names_of(folder) == ["step-3"]
        if process.exitcode == 0:
            break
    assert process.exitcode == 0, f"os.{call} is called more than {count} times"
    assert count > 2


def test_a_corrupt_neighbour_does_not_keep_a_save_from_succeeding(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "manifest.json").write_text("{")
    for step in (2, 3, 4):
        save(tmp_path, step, keep=2)
    assert names_of(tmp_path) == ["step-1", "step-3", "step-4"]


def test_parts_of_sharded_writers_are_put_together_by_placement(tmp_path: Path) -> None:
    full, sizes = torch.arange(21.0).view(7, 3), {"tp": 2}
    path = checkpoint.save(tmp_path / "step-1", step=1, model_state={"w": full})
    (path / "model.safetensors").unlink()
    manifest = json.loads((path / "manifest.json").read_text())
    placement = Placement("w", (7, 3), {"tp": Shard(0, (4, 3))})
    parts = []
    for place in range(2):
        local = placement.take(full, {"tp": place}, sizes)
        save_file({"w": local}, path / f"model.{place}.safetensors")
        sha256 = writer.TensorFile({"w": local}).write(tmp_path / f"hash-{place}")["w"]
        parts.append({"file": f"model.{place}.safetensors", "coordinate": {"tp": place}, "sha256": sha256})
    section = manifest["sections"]["model"]
    section["tensors"]["w"] = {"dtype": "float32", "placement": json.loads(placement.to_json()), "parts": parts}
    entries = Manifest.read(path)
    rewritten = Manifest(1, entries.saved, entries.versions, sizes, entries.sections)
    rewritten.sections["model"].tensors["w"] = type(entries.sections["model"].tensors["w"]).from_json(section["tensors"]["w"])
    (path / "manifest.json").write_text(rewritten.to_json())
    assert torch.equal(checkpoint.load(path).model_state()["w"], full)


def test_no_module_of_it_can_unpickle() -> None:
    for path in Path(checkpoint.__file__).parent.glob("*.py"):
        assert not re.search(r"import pickle|torch\.(load|save)\b|marshal|\beval\(|\bexec\(", path.read_text()), path
