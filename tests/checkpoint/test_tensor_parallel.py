"""Checkpoints under tp: what one layout's ranks saved in parts, any other layout's ranks load, each element where it belongs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import CheckpointError, ConfigError, Corrupt, Incompatible, Incomplete
from ringfold.parallel.placement import Local, Placement, Shard
from ringfold.runtime import checkpoint
from ringfold.runtime.checkpoint import Piece, TensorPart, assembly
from ringfold.runtime.checkpoint.manifest import Manifest, Part
from ringfold.runtime.engine import Engine
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.checkpoint.state import flip
from tests.checkpoint.test_commands import anonymous_nbytes, run
from tests.harness import run_ranks
from tests.parallel.test_engine import LEARNING_RATE, global_batches, make_engine, mine
from tests.parallel.test_tensor_parallel import grouped, writer

FROZEN = "blocks.0.mlp.gate.weight"  # 20 rows, which 3 ranks do not divide
DIVIDED = "blocks.1.mlp.up.weight"
STEPS = 2
# One process, float64: what the order of sums over other ranks may change.
CLOSE = 1e-12

SAVED = {"dp2 tp2 zero3": 4, "tp2": 2, "tp3 zero1": 3, "dp2 tp2 bf16 zero2": 4, "dp2 zero3": 2}
LOADED = {
    "dp1": 1,
    "tp2": 2,
    "tp3": 3,
    "dp2 tp2 zero1": 4,
    "dp2 tp2 zero3": 4,
    "dp2 zero3": 2,
    "tp2 bf16": 2,
    "cp2 tp2 zero2": 4,
    "dp2 tp2 fp16 zero3": 4,
}

Whole = dict[str, dict[str, Tensor]]


def model() -> nn.Module:
    """Embedding and head tied, q, k and v fused, a frozen parameter that is divided and one that is not."""
    made = writer()
    made.get_parameter(FROZEN).requires_grad_(False)
    return made


def engine_of(world: Communicator, layout: str, make: Callable[[], nn.Module] = model) -> Engine:
    made = (lambda: make().float()) if "16" in layout else make
    return make_engine(world, layout, made, bucket_mb=0.001)  # of many buckets, so that ranks have pieces of most parameters


def train(engine: Engine, batches: list[Any]) -> list[float]:
    dp = engine.mesh["dp"]
    return [engine.train_step(mine(batch, dp.rank, dp.size)) for batch in batches]


def whole_optimizer_state(engine: Engine) -> Whole:
    """Put together what the optimizers of all ranks keep, by nothing that checkpoints use but Placement."""
    tensor, sharding, tp = engine._division.tensor, engine._sharding, engine.mesh.coordinate["tp"]
    placements, sizes = {} if tensor is None else tensor.placements(), {"tp": engine.mesh["tp"].size}
    named = [(name, p, 0, p.shape) for name, p in engine.module.named_parameters()] if sharding is None else sharding.named_pieces()
    state = engine.optimizer.state
    held = [(name, start, tuple(shape), {key: value.clone() for key, value in state.get(p, {}).items()}) for name, p, start, shape in named]
    locals_: dict[tuple[str, str, int], Tensor] = {}
    found: Whole = {}
    for place, of_rank in engine.mesh.world.all_gather_object((tp, held)):
        for name, start, shape, entries in of_rank:
            for key, value in entries.items():
                if key == "step":
                    assert found.setdefault(name, {}).setdefault(key, value) == value
                    continue
                flat = locals_.setdefault((name, key, place), torch.full(shape, torch.nan, dtype=value.dtype)).view(-1)
                flat[start : start + value.numel()] = value.reshape(-1)
    for (name, key, place), local in locals_.items():
        if name not in placements:
            assert torch.equal(found[name].setdefault(key, local), local), "ranks have other values of what is not divided"
            continue
        full = found[name].setdefault(key, torch.full(placements[name].shape, torch.nan, dtype=local.dtype))
        placements[name].put(full, local, {"tp": place}, sizes)
    return found


def save(world: Communicator, folder: Path, layout: str, make: Callable[[], nn.Module] = model) -> tuple[dict[str, Tensor], Whole]:
    engine = engine_of(world, layout, make)
    train(engine, global_batches()[:STEPS])
    engine.save(folder / f"step-{engine.step}", asynchronous=True)
    weights = {name: value.clone() for name, value in engine.state_dict().items()}
    state = whole_optimizer_state(engine)
    train(engine, global_batches()[STEPS:])  # what was saved is what it was then
    engine.close()
    return weights, state


def load(
    world: Communicator, folders: dict[str, Path], layout: str, make: Callable[[], nn.Module] = model
) -> dict[str, tuple[dict[str, Tensor], Whole, list[float]]]:
    found = {}
    for name, folder in folders.items():
        engine = engine_of(world, layout, make)
        assert engine.resume(folder) == STEPS
        weights, state = {key: value.clone() for key, value in engine.state_dict().items()}, whole_optimizer_state(engine)
        found[name] = (weights, state, train(engine, global_batches()[STEPS : STEPS + 2]))
        engine.close()
    return found


def plain_losses(weights: dict[str, Tensor], state: Whole) -> list[float]:
    """Go on with nothing but torch; the second loss says whether the state of the optimizer is right, too."""
    alone = model()
    alone.load_state_dict(weights)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=LEARNING_RATE)
    for name, parameter in alone.named_parameters():
        if name in state:
            optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value.to(torch.float64, copy=True) for key, value in state[name].items()
            }
    losses = []
    for tokens, target in global_batches()[STEPS : STEPS + 2]:
        optimizer.zero_grad()
        loss = F.cross_entropy(alone(tokens), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Of a wider dtype, or of a narrower one the values rounded: under bf16 masters are float32, and what is not trained is bfloat16."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Tensor], Whole]]:
    found = {}
    for layout, size in SAVED.items():
        folder = tmp_path_factory.mktemp(layout.replace(" ", "-"))
        weights, state = run_ranks(size, save, folder, layout)[0]
        assert set(state) == {name for name, p in model().named_parameters() if p.requires_grad and name != "unused"}
        assert not any(value.isnan().any() for entries in state.values() for value in entries.values())
        found[layout] = (folder, weights, state)
    return found


@pytest.mark.parametrize("layout", LOADED)
def test_every_layout_loads_what_every_other_saved(saved: dict[str, tuple[Path, dict[str, Tensor], Whole]], layout: str) -> None:
    for results in run_ranks(LOADED[layout], load, {name: folder for name, (folder, _, _) in saved.items()}, layout):
        for name, (weights, state, losses) in results.items():
            _, expected, expected_state = saved[name]
            if weights:  # rank 0 has them
                assert_same_bits(weights, expected)
            assert state.keys() == expected_state.keys()
            for parameter, entries in expected_state.items():
                assert_same_bits(state[parameter], entries)
            if "16" not in layout:
                assert {value.dtype for value in weights.values()} <= {torch.float64}
                assert losses == pytest.approx(plain_losses(expected, expected_state), rel=CLOSE)


@pytest.mark.parametrize(("size", "other"), [(2, 3), (3, 2)])
def test_what_one_mesh_divides_and_another_has_on_all_ranks(tmp_path: Path, size: int, other: int) -> None:
    """Three heads of keys and values: three ranks have one each, two have all of them."""
    expected, expected_state = run_ranks(size, save, tmp_path, f"tp{size}", grouped)[0]
    for results in run_ranks(other, load, {"": tmp_path}, f"tp{other}", grouped):
        weights, state, _ = results[""]
        if weights:
            assert_same_bits(weights, expected)
        for parameter, entries in expected_state.items():
            assert_same_bits(state[parameter], entries)


@pytest.mark.parametrize("layout", SAVED)
def test_one_process_reads_and_exports_whole_tensors(saved: dict[str, tuple[Path, dict[str, Tensor], Whole]], layout: str, tmp_path: Path) -> None:
    folder, expected, expected_state = saved[layout]
    found = checkpoint.load(folder)
    assert_same_bits(found.model_state(), expected)
    state = found.optimizer_state()
    assert state is not None
    for name, entries in expected_state.items():
        assert_same_bits(state["state"][name], entries)
    target = tmp_path / "model.safetensors"
    assert run("export", folder, "--to", target)[0] == 0
    assert_same_bits(load_file(target), {name: value for name, value in expected.items() if name != "head.weight"})
    with safe_open(target, framework="pt") as file:
        assert file.metadata()["head.weight"] == "embed.weight"
    code, output = run("verify", folder)
    assert (code, ": right;" in output) == (0, True)
    assert run("ls", folder)[1].split()[-2:] == [str(SAVED[layout]), "complete"]


def test_copies_are_saved_once_and_parts_of_all_coordinates_are(saved: dict[str, tuple[Path, dict[str, Tensor], Whole]]) -> None:
    for layout, (folder, weights, _) in saved.items():
        manifest = Manifest.read(folder / f"step-{STEPS}")
        tp = int(layout.partition("tp")[2][:1] or 1)
        assert manifest.sizes == ({"tp": tp} if tp > 1 else {})
        entries = manifest.sections["model"].tensors
        assert {part.coordinate.get("tp", 0) for part in entries[DIVIDED].parts} == set(range(tp))
        assert not any(entries["norm.weight"].placement.axes)
        for name, entry in entries.items():
            assert sum(numel(folder, name, part) for part in entry.parts) == weights[name].numel(), (layout, name)


def numel(folder: Path, name: str, part: Part) -> int:
    with safe_open(folder / f"step-{STEPS}" / part.file, framework="pt") as file:
        return int(file.get_tensor(part.key(name)).numel())


def save_without_pieces(world: Communicator, folder: Path) -> dict[str, Tensor]:
    right = Placement.at

    def at(self: Placement, coordinate: Mapping[str, int], sizes: Mapping[str, int]) -> Local:
        axes = {axis: Shard(kind.dim) if isinstance(kind, Shard) else kind for axis, kind in self.axes.items()}
        return right(replace(self, axes=axes), coordinate, sizes)

    Placement.at = at  # type: ignore[method-assign]
    try:
        return save(world, folder, "tp2")[0]
    finally:
        Placement.at = right  # type: ignore[method-assign]


def test_the_comparison_sees_q_k_and_v_that_are_told_as_the_halves_of_one(tmp_path: Path) -> None:
    weights = run_ranks(2, save_without_pieces, tmp_path)[0]
    found = checkpoint.load(tmp_path).model_state()
    differing = {name for name, value in weights.items() if not torch.equal(found[name], value)}
    assert differing == {f"blocks.{k}.attn.c_attn.{which}" for k in (0, 1) for which in ("weight", "bias")}


# -- memory ---------------------------------------------------------------------------------------------------------------------------------

NBYTES, TENSORS = 8 << 20, 8
LARGE = (1 << 11, 1 << 10)


def large(name: str, place: int, size: int) -> TensorPart:
    return rows(LARGE, place, size, name)


def save_large(world: Communicator, folder: Path) -> None:
    checkpoint.save(folder / "step-1", step=1, model_state={f"w{k}": large(f"w{k}", world.rank, 2) for k in range(TENSORS)}, comm=world)


def measure_load(folder: Path) -> int:
    """Return how much memory of its own a process has at most while it loads, more than before."""
    highest, original = 0, assembly._Reading.deliver
    wanted = {f"w{k}": large(f"w{k}", 1, 3) for k in range(TENSORS)}
    before = anonymous_nbytes()

    def watched(self: Any, flat: Tensor) -> None:
        nonlocal highest
        original(self, flat)
        highest = max(highest, anonymous_nbytes())

    assembly._Reading.deliver = watched  # type: ignore[method-assign]
    checkpoint.load(folder).load_model(wanted)
    return highest - before


def test_loading_takes_the_memory_of_what_is_wanted_and_of_one_tensor(tmp_path: Path) -> None:
    run_ranks(2, save_large, tmp_path)
    (more,) = run_ranks(1, measure_load, tmp_path, joined=False)
    assert more < TENSORS * NBYTES / 3 + 1.5 * NBYTES


# -- damage ---------------------------------------------------------------------------------------------------------------------------------


def flip_in(path: Path, key: str) -> None:
    """Change one bit of the last byte of a tensor in its file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    flip(path, 8 + length + json.loads(data[8 : 8 + length])[key]["data_offsets"][1] - 1)


def load_damaged(world: Communicator, folder: Path, layout: str) -> tuple[str, str]:
    engine = engine_of(world, layout)
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    with pytest.raises((Corrupt, Incomplete)) as caught:
        engine.resume(folder)
    assert all(torch.equal(value, before[name]) for name, value in engine.module.state_dict().items()), "something was loaded"
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize("layout", ["dp1", "tp2"])
@pytest.mark.parametrize("damage", ["flipped", "missing", "not in the manifest"])
def test_a_damaged_part_is_named_with_its_file(
    saved: dict[str, tuple[Path, dict[str, Tensor], Whole]], tmp_path: Path, damage: str, layout: str
) -> None:
    folder = tmp_path / f"step-{STEPS}"
    shutil.copytree(saved["tp2"][0] / f"step-{STEPS}", folder)
    manifest = Manifest.read(folder)
    parts = manifest.sections["model"].tensors[DIVIDED].parts
    part = next(part for part in parts if part.coordinate == {"tp": 1})
    if damage == "flipped":
        flip_in(folder / part.file, part.key(DIVIDED))
    elif damage == "missing":
        (folder / part.file).unlink()
    else:
        parts.remove(part)
        (folder / "manifest.json").write_text(manifest.to_json())
    for kind, text in run_ranks(LOADED[layout], load_damaged, tmp_path, layout):
        assert kind == ("Corrupt" if damage == "flipped" else "Incomplete")
        assert DIVIDED in text
        assert str(folder if damage == "not in the manifest" else folder / part.file) in text
        assert "There is no complete checkpoint before it" in text
    if damage != "not in the manifest":
        code, output = run("verify", folder)
        assert code == 1
        assert part.file in output
        assert DIVIDED in output


def test_a_part_of_no_coordinate_is_damage(saved: dict[str, tuple[Path, dict[str, Tensor], Whole]], tmp_path: Path) -> None:
    folder = tmp_path / f"step-{STEPS}"
    shutil.copytree(saved["tp2"][0] / f"step-{STEPS}", folder)
    manifest = Manifest.read(folder)
    manifest.sections["model"].tensors[DIVIDED].parts[0].coordinate["tp"] = 2
    (folder / "manifest.json").write_text(manifest.to_json())
    with pytest.raises(Corrupt, match=rf"manifest\.json: the part of {DIVIDED} in model-0000.*axis tp shards .*no coordinate"):
        checkpoint.load(folder).model_state()


def rows(shape: tuple[int, ...], place: int, size: int, name: str = "w") -> TensorPart:
    local = Placement(name, shape, {"tp": Shard(0)}).at({"tp": place}, {"tp": size})
    return TensorPart(torch.zeros(local.shape).view(-1), local, 0)


def save_wrong(world: Communicator, folder: Path) -> list[str]:
    def said(**state: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.save(folder / "step-1", step=1, model_state=state, comm=world)
        return str(caught.value)

    rank = world.rank
    return [
        said(w=rows((5, 2), 0, 2)),
        said(w=rows((5, 2), rank, 2 + rank)),
        said(w=torch.zeros(5, 2) if rank else rows((5, 2), 0, 2)),
        said(w=rows((5, 2), rank, 2), v=rows((5, 2), rank, 3, "v")),
    ]


def test_parts_that_are_no_tensor_are_refused(tmp_path: Path) -> None:
    for texts in run_ranks(2, save_wrong, tmp_path):
        assert "nobody holds elements 0 to 4 of w (5, 2) at tp1" in texts[0]
        assert "w is float32 [5, 2] divided as {'tp': Shard(dim=0, pieces=())} over {'tp': 3} on rank 1, and" in texts[1]
        assert "w is float32 [5, 2] on rank 1, and float32 [5, 2] divided as" in texts[2]
        assert "of v (5, 2) at tp2" in texts[3]
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_no_part_and_no_piece() -> None:
    local = Placement("w", (5, 2), {"tp": Shard(0)}).at({"dp": 3, "tp": 1}, {"dp": 4, "tp": 2})
    assert (local.shape, local.coordinate) == ((2, 2), {"tp": 1})
    with pytest.raises(ConfigError, match=r"no part of a tensor of w \(5, 2\) at tp1"):
        TensorPart(torch.zeros(4), local, 1)
    with pytest.raises(ConfigError, match="not a piece of"):
        Piece(nn.Parameter(torch.zeros(5, 2)), 0, local)


def test_another_shape_is_a_difference(saved: dict[str, tuple[Path, dict[str, Tensor], Whole]]) -> None:
    found = checkpoint.load(saved["tp2"][0])
    wanted = {**found.model_state(), DIVIDED: rows((21, 12), 0, 2, DIVIDED)}
    with pytest.raises(Incompatible, match=rf"shape of {DIVIDED}: \[20, 12\] in the checkpoint, \[21, 12\] in the model"):
        found.load_model(wanted, cast=True)


def test_state_that_is_not_for_an_element_each_is_refused_where_a_parameter_is_divided() -> None:
    local = Placement("w", (5, 2), {"tp": Shard(0)}).at({"tp": 0}, {"tp": 2})
    optimizer = torch.optim.Adafactor([parameter := nn.Parameter(torch.zeros(local.shape))])
    parameter.grad = torch.ones(local.shape)
    optimizer.step()
    with pytest.raises(CheckpointError, match=r"optimizer keeps row_var of shape \(3, 1\) for w \(5, 2\) at tp0.*\n?.*Use an elementwise optimizer"):
        checkpoint.optimizer_state_by_name(optimizer, [("w", Piece(parameter, 0, local))])
