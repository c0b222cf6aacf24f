"""Checkpoints in shards: every rank writes its own, and any other number of ranks loads them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ringfold.collectives.errors import CheckpointError, Corrupt, Incompatible, Incomplete
from ringfold.runtime import checkpoint
from ringfold.runtime.checkpoint import Piece, TensorPart
from ringfold.runtime.checkpoint.manifest import Manifest
from ringfold.runtime.checkpoint.tensor_file import TensorFile
from safetensors import safe_open

from tests.checkpoint.state import (
    SHAPES,
    assert_moments,
    fill_moments,
    flip,
    full_tensor,
    model_parts,
    sharded_adam,
    whole_adam,
)
from tests.harness import run_ranks

BIG = 3 << 20  # elements of a tensor that is worth dividing


def save_parts(world: Any, folder: Path, step: int = 4) -> None:
    optimizer, of_name = sharded_adam(world.rank, world.size)
    fill_moments(optimizer, of_name)
    checkpoint.save(
        folder / f"step-{step}",
        step=step,
        model_state=model_parts(world.rank, world.size),
        optimizer_state=checkpoint.optimizer_state_by_name(optimizer, of_name.items()),
        extra={"betas": (0.9, 0.95)},
        comm=world,
    )


def load_parts(world: Any, folder: Path) -> None:
    found = checkpoint.load(folder, comm=world)
    expected, wanted = model_parts(world.rank, world.size), model_parts(world.rank, world.size)
    for value in wanted.values():
        (value.values if isinstance(value, TensorPart) else value).zero_()
    optimizer, of_name = sharded_adam(world.rank, world.size)
    found.restore(wanted, optimizer, of_name.items())
    for name, value in wanted.items():
        theirs = expected[name]
        assert torch.equal(value.values, theirs.values) if isinstance(value, TensorPart) else torch.equal(value, theirs)
    assert_moments(optimizer, of_name)
    assert found.extra() == {"betas": (0.9, 0.95)}


def assert_loads_whole(folder: Path) -> None:
    found = checkpoint.load(folder)
    state = found.model_state()
    assert set(state) == set(SHAPES)
    assert all(torch.equal(value, full_tensor(name)) for name, value in state.items())
    optimizer, of_name = whole_adam()
    found.load_optimizer(optimizer, of_name.items())
    assert_moments(optimizer, of_name)


@pytest.fixture(scope="module")
def saved_by_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved-by-4")
    run_ranks(4, save_parts, folder)
    return folder


def test_uneven_pieces_of_4_ranks_load_whole_on_one(saved_by_4: Path) -> None:
    assert_loads_whole(saved_by_4)


@pytest.mark.parametrize("size", [2, 3])
def test_uneven_pieces_of_4_ranks_load_in_other_pieces(saved_by_4: Path, size: int) -> None:
    run_ranks(size, load_parts, saved_by_4)


def test_each_rank_writes_its_own_files_and_the_manifest_tells_all(saved_by_4: Path) -> None:
    manifest = Manifest.read(saved_by_4 / "step-4")
    assert manifest.ranks == 4
    assert sorted(manifest.files) == sorted(
        f"{section}-{place:05}-of-00004.safetensors" for section in ("model", "optimizer") for place in range(1, 5)
    )
    parts = manifest.sections["model"].tensors["up.weight"].parts
    assert len(parts) > 1
    bounds = [part.range for part in parts]
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
    assert bounds[-1][1] == 55


def test_what_one_rank_saved_whole_loads_in_pieces(tmp_path: Path) -> None:
    optimizer, of_name = whole_adam()
    fill_moments(optimizer, of_name)
    checkpoint.save(
        tmp_path / "step-1",
        step=1,
        model_state={name: full_tensor(name) for name in SHAPES},
        optimizer_state=checkpoint.optimizer_state_by_name(optimizer, of_name.items()),
        extra={"betas": (0.9, 0.95)},
    )
    run_ranks(3, load_parts, tmp_path)


def save_replicas(world: Any, folder: Path) -> None:
    """Two groups of two ranks: within a group the pieces differ, between groups they are copies."""
    halves = torch.arange(10.0).split([4, 6])
    half = world.rank % 2
    state = {"w": TensorPart(halves[half].clone(), (2, 5), 4 * half)}
    checkpoint.save(folder / "step-1", step=1, model_state=state, comm=world)


def test_replicas_of_a_piece_are_saved_once(tmp_path: Path) -> None:
    run_ranks(4, save_replicas, tmp_path)
    manifest = Manifest.read(tmp_path / "step-1")
    assert [part.range for part in manifest.sections["model"].tensors["w"].parts] == [(0, 4), (4, 10)]
    stored = 0
    for file in manifest.files:
        with safe_open(tmp_path / "step-1" / file, framework="pt") as opened:
            stored += sum(opened.get_tensor(key).numel() for key in opened.offset_keys())
    assert stored == 10
    assert torch.equal(checkpoint.load(tmp_path).model_state()["w"], torch.arange(10.0).view(2, 5))


def save_alike(world: Any, folder: Path) -> None:
    torch.manual_seed(0)
    state = {"big": torch.randn(3, BIG // 3), "middle": torch.randn(BIG // 4), "tied": (tied := torch.randn(BIG // 8)), "too": tied}
    state |= {f"small.{i}": torch.randn(10) for i in range(20)}
    checkpoint.save(folder / "step-1", step=1, model_state=state, comm=world)
    found = checkpoint.load(folder, comm=world).model_state()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert found["tied"] is found["too"]


def test_tensors_that_all_ranks_hold_are_divided_so_that_all_write_about_equally(tmp_path: Path) -> None:
    run_ranks(4, save_alike, tmp_path)
    nbytes = [path.stat().st_size for path in (tmp_path / "step-1").glob("model-*.safetensors")]
    assert len(nbytes) == 4
    assert max(nbytes) < 1.34 * sum(nbytes) / 4  # the largest first, each to the least loaded: within a third of the best there is
    assert sum(nbytes) < 4 * (BIG + BIG // 4 + BIG // 8) + 16384


def test_a_small_checkpoint_of_many_ranks_is_one_file_a_section(tmp_path: Path) -> None:
    run_ranks(3, save_small, tmp_path)
    assert sorted(path.name for path in (tmp_path / "step-1").iterdir()) == ["extra.safetensors", "manifest.json", "model.safetensors"]


def save_small(world: Any, folder: Path) -> None:
    state = {f"w{i}": torch.zeros(100) for i in range(9)}
    checkpoint.save(folder / "step-1", step=1, model_state=state, extra={"noise": torch.ones(3)}, comm=world)


def save_wrong(world: Any, folder: Path) -> list[str]:
    def said(**state: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.save(folder / "step-1", step=1, model_state=state, comm=world)
        return str(caught.value)

    rank = world.rank
    return [
        said(w=TensorPart(torch.zeros(4), (10,), 6 * rank)),
        said(w=TensorPart(torch.zeros(6), (10,), 4 * rank)),
        said(w=TensorPart(torch.zeros(4), (10,), 4 * rank)),
        said(w=torch.zeros(3 + rank)),
        said(**({"w": torch.zeros(2, dtype=torch.complex128)} if rank else {})),
        said(w=TensorPart(torch.zeros(4), (8,), 4 * rank), **{"w[0:4]": torch.zeros(2)}),
    ]


def test_pieces_that_are_no_tensor_are_refused_on_all_ranks(tmp_path: Path) -> None:
    for rank, texts in enumerate(run_ranks(2, save_wrong, tmp_path)):
        assert "nobody holds elements 4 to 6 of w" in texts[0]
        assert "several ranks hold different pieces with elements 4 to 6 of w" in texts[1]
        assert "nobody holds elements 8 to 10 of w" in texts[2]
        assert "w is float32 [4] on rank 1, and float32 [3] on rank 0" in texts[3]
        assert "complex128" in texts[4]
        assert ("on rank 1:" in texts[4]) is (rank == 0)
        assert "named like ranges" in texts[5]
    assert list(tmp_path.iterdir()) == []


def save_to_own_folder(world: Any, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(folder / f"host-{world.rank // 2}" / "step-1", step=1, model_state={"w": torch.zeros(2)}, comm=world)
    return str(caught.value)


def test_a_host_that_does_not_see_the_folder_is_named(tmp_path: Path) -> None:
    for text in run_ranks(3, save_to_own_folder, tmp_path):
        assert "cannot see" in text
        assert "host-1/.step-1." in text
        assert "that all hosts share" in text
    assert list((tmp_path / "host-0").iterdir()) == []


def save_where_rank_1_cannot_write(world: Any, folder: Path) -> str:
    if world.rank == 1:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    state = {"w": TensorPart(torch.full((1 << 19,), 1.0), (1 << 20,), world.rank << 19)}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(folder / "step-2", step=2, model_state=state, comm=world)
    return str(caught.value)


def test_a_disk_that_is_full_for_one_rank_fails_the_save_on_all_and_leaves_nothing(tmp_path: Path) -> None:
    run_ranks(2, save_parts, tmp_path)
    texts = run_ranks(2, save_where_rank_1_cannot_write, tmp_path)
    for rank, text in enumerate(texts):
        assert "the disk is full or a limit is reached (File too large)" in text
        assert "Nothing of it is left" in text
        assert text.startswith("on rank 1:") is (rank == 0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]
    assert_loads_whole(tmp_path)


def save_slowly(world: Any, folder: Path) -> None:
    if world.rank == 1:
        original = TensorFile.write

        def slow_write(self: TensorFile, path: Path) -> dict[str, str]:
            time.sleep(1.2)
            return original(self, path)

        TensorFile.write = slow_write  # type: ignore[method-assign]
    save_parts(world, folder)


def test_a_rank_whose_disk_is_slower_than_a_collectives_deadline_is_waited_for(tmp_path: Path) -> None:
    run_ranks(2, save_slowly, tmp_path, env={"RINGFOLD_TIMEOUT_S": "2"})
    assert_loads_whole(tmp_path)


@pytest.fixture
def two_saves(tmp_path: Path) -> Path:
    run_ranks(3, save_twice, tmp_path)
    return tmp_path


def save_twice(world: Any, folder: Path) -> None:
    save_parts(world, folder, step=4)
    save_parts(world, folder, step=9)


def load_damaged(world: Any, folder: Path) -> tuple[str, str]:
    found = checkpoint.load(folder, comm=world)
    wanted = model_parts(world.rank, world.size)
    with pytest.raises((Corrupt, Incomplete)) as caught:
        found.load_model(wanted)
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_shard_is_named_on_every_rank_with_the_checkpoint_before_it(two_saves: Path, damage: str) -> None:
    path = two_saves / "step-9" / "model-00003-of-00003.safetensors"
    tensor = next(name for _, name, part in Manifest.read(two_saves / "step-9").files[path.name] if part.range != (0, 1))
    if damage == "flipped":
        flip(path, path.stat().st_size - 1)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    for kind, text in run_ranks(3, load_damaged, two_saves):
        assert kind == ("Incomplete" if damage == "missing" else "Corrupt")
        assert path.name in text
        assert tensor.split(".")[0] in text
        assert f"The newest complete checkpoint before it is {two_saves / 'step-4'}: pass that folder." in text
    assert_loads_whole(two_saves / "step-4")


def test_only_parts_that_overlap_what_is_wanted_are_read(saved_by_4: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-4"
    shutil.copytree(saved_by_4 / "step-4", folder)
    manifest = Manifest.read(folder)
    first = manifest.sections["model"].tensors["up.weight"].parts[0]
    for file in manifest.files:
        if file.startswith("model") and file != first.file:
            (folder / file).unlink()
    found = checkpoint.load(folder)
    wanted = {name: TensorPart(torch.zeros(0), shape, 0) for name, shape in SHAPES.items() if shape != (0, 3)}
    start, stop = first.range
    values = torch.zeros(stop - start)
    wanted |= {"up.weight": TensorPart(values, (5, 11), start), "empty": TensorPart(torch.zeros(0), (0, 3), 0)}
    empty = manifest.sections["model"].tensors["empty"].parts[0].file
    if not (folder / empty).exists():
        shutil.copy(saved_by_4 / "step-4" / empty, folder / empty)
    found.load_model(wanted)
    assert torch.equal(values, full_tensor("up.weight").reshape(-1)[start:stop])


def test_without_an_earlier_checkpoint_the_error_says_so(saved_by_4: Path, tmp_path: Path) -> None:
    shutil.copytree(saved_by_4 / "step-4", tmp_path / "step-4")
    (tmp_path / "step-4" / "model-00001-of-00004.safetensors").unlink()
    with pytest.raises(Incomplete, match="There is no complete checkpoint before it"):
        checkpoint.load(tmp_path).model_state()


def test_a_damaged_manifest_names_another_checkpoint(two_saves: Path) -> None:
    (two_saves / "step-9" / "manifest.json").write_text("{")
    with pytest.raises(Corrupt, match=r"manifest\.json .*\n.*step-4: pass that folder"):
        checkpoint.load(two_saves)


def test_parts_that_the_manifest_lost_are_missed(saved_by_4: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-4"
    shutil.copytree(saved_by_4 / "step-4", folder)
    manifest = Manifest.read(folder)
    del manifest.sections["model"].tensors["up.weight"].parts[1]
    (folder / "manifest.json").write_text(manifest.to_json())
    with pytest.raises(Incomplete, match=r"parts of up\.weight"):
        checkpoint.load(folder).model_state()


def test_values_are_converted_if_asked_and_refused_if_not(saved_by_4: Path) -> None:
    found = checkpoint.load(saved_by_4)
    wanted = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()}
    with pytest.raises(Incompatible, match="dtype of embed: float32 in the checkpoint, bfloat16 in the model"):
        found.load_model(wanted)
    assert not wanted["embed"].any()
    found.load_model(wanted, cast=True)
    assert torch.equal(wanted["embed"], full_tensor("embed", dtype=torch.bfloat16))
    with pytest.raises(Incompatible, match="dtype of embed: float32 in the checkpoint, int64 in the model"):
        found.load_model({**wanted, "embed": torch.zeros(7, 5, dtype=torch.int64)}, cast=True)


def test_a_range_of_another_tensor_is_a_difference(saved_by_4: Path) -> None:
    wanted = {name: torch.zeros(shape) for name, shape in SHAPES.items()} | {"embed": TensorPart(torch.zeros(3), (5, 7), 0)}
    with pytest.raises(Incompatible, match=r"shape of embed: \[7, 5\] in the checkpoint, \[5, 7\] in the model"):
        checkpoint.load(saved_by_4).load_model(wanted)


VERSION_1 = Path(__file__).parent / "version_1"  # written by ringfold as it was before shards


def test_version_1_is_read_whole_and_in_pieces() -> None:
    found = checkpoint.load(VERSION_1)
    state = found.model_state()
    assert torch.equal(state["w"], torch.arange(6.0).view(2, 3))
    assert state["tied"] is state["w"]
    assert found.extra() == {"betas": (1, 2)}
    assert Manifest.read(VERSION_1).ranks == 1
    piece = Piece(torch.nn.Parameter(torch.zeros(3)), 2, (2, 3))
    optimizer = torch.optim.Adam([piece.parameter])
    found.load_optimizer(optimizer, [("w", piece)])
    assert optimizer.state[piece.parameter]["exp_avg"].tolist() == [3.0, 4.0, 5.0]
    assert optimizer.state[piece.parameter]["step"].item() == 3.0
    assert optimizer.param_groups[0]["lr"] == 0.1
