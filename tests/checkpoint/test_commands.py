"""`ringfold checkpoint ls | verify | export`, run as the command line runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from ringfold.runtime import checkpoint
from ringfold.runtime.checkpoint.__main__ import main
from ringfold.runtime.checkpoint.export import export
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

from tests.checkpoint.state import SHAPES, flip, full_tensor
from tests.checkpoint.test_shards import save_parts
from tests.harness import run_ranks


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.body = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tensor([True, False]))


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run_ranks(3, save_parts, tmp_path)
    checkpoint.save(tmp_path / "step-12", step=12, model_state={"w": torch.ones(3)})
    return tmp_path


def test_ls_tells_step_time_size_ranks_age_and_what_is_incomplete(folder: Path) -> None:
    (folder / "step-13").mkdir()
    (folder / "step-13" / "model.safetensors").write_bytes(b"x" * 1500)
    (folder / ".step-14.0123abcd.partial").mkdir()
    (folder / "notes").mkdir()
    code, output = run("ls", folder)
    assert code == 0
    header, *lines = [line.split() for line in output.splitlines()]
    assert header == ["name", "step", "saved", "(UTC)", "age", "size", "ranks", "state"]
    rows = {words[0]: words[1:] for words in lines}
    assert list(rows) == ["step-4", "step-12", ".step-14.0123abcd.partial", "step-13"]
    assert (rows["step-4"][0], rows["step-4"][-2:]) == ("4", ["3", "complete"])
    assert rows["step-4"][4] == "s"
    assert (rows["step-12"][0], rows["step-12"][-2:]) == ("12", ["1", "complete"])
    assert rows["step-13"] == ["1.5", "kB", "incomplete:", "no", "manifest.json"]
    assert rows[".step-14.0123abcd.partial"][2] == "incomplete:"
    shard = folder / "step-4" / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    (folder / "step-12" / "model.safetensors").unlink()
    output = run("ls", folder)[1]
    assert "incomplete: model-00002-of-00003.safetensors cut short or overwritten" in output
    assert "incomplete: model.safetensors missing" in output


def test_ls_of_a_folder_without_any_says_so(tmp_path: Path) -> None:
    assert run("ls", tmp_path) == (0, f"no checkpoints in {tmp_path}\n")


def test_verify_reads_everything_and_names_what_is_damaged(folder: Path) -> None:
    code, output = run("verify", folder)
    assert code == 0
    assert output.count(": right;") == 2
    shard = folder / "step-4" / "optimizer-00003-of-00003.safetensors"
    flip(shard, shard.stat().st_size - 1)
    code, output = run("verify", folder)
    assert code == 1
    assert f"{folder / 'step-12'}: right;" in output
    assert f"{folder / 'step-4'}: DAMAGED;" in output
    assert f"{shard} does not hold what was written: the sha256 differs of state." in output
    assert run("verify", folder / "step-12")[0] == 0


def test_export_is_one_file_of_whole_tensors(folder: Path) -> None:
    target = folder / "model.safetensors"
    code, output = run("export", folder / "step-4", "--to", target)
    assert code == 0, output
    assert f"{target}: 5 tensors" in output
    stored = load_file(target)
    assert {name: value.shape for name, value in stored.items()} == {name: torch.Size(shape) for name, shape in SHAPES.items()}
    assert all(torch.equal(value, full_tensor(name)) for name, value in stored.items())
    assert not [path for path in folder.iterdir() if path.name.endswith(".partial")]


def test_export_converts_floating_point_tensors_only_and_plain_pytorch_loads_it(tmp_path: Path) -> None:
    model = Tied()
    checkpoint.save(tmp_path / "step-1", step=1, model_state=model.state_dict())
    assert run("export", tmp_path, "--to", tmp_path / "m.safetensors", "--dtype", "bfloat16")[0] == 0
    stored = load_file(tmp_path / "m.safetensors")
    assert set(stored) == {"embed.weight", "body.weight", "body.bias", "mask"}
    assert torch.equal(stored["embed.weight"], model.embed.weight.detach().bfloat16())
    assert stored["mask"].dtype == torch.bool
    again = Tied()
    assert again.load_state_dict(stored, strict=False).missing_keys == ["head.weight"]
    assert torch.equal(again.head.weight, model.embed.weight.detach().bfloat16().float())


def test_tied_tensors_are_stored_under_the_first_name_and_safetensors_ties_them_again(tmp_path: Path) -> None:
    model, again = Tied(), Tied()
    checkpoint.save(tmp_path / "step-1", step=1, model_state=model.state_dict())
    run("export", tmp_path, "--to", tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}
    assert load_model(again, tmp_path / "m.safetensors") == (set(), [])
    assert again.head.weight is again.embed.weight
    assert torch.equal(again.head.weight, model.head.weight)


def test_export_of_a_damaged_checkpoint_leaves_no_file(folder: Path) -> None:
    shard = folder / "step-4" / "model-00002-of-00003.safetensors"
    flip(shard, shard.stat().st_size - 1)
    code, output = run("export", folder / "step-4", "--to", folder / "m.safetensors")
    assert code == 2
    assert shard.name in output
    assert sorted(path.name for path in folder.iterdir()) == ["step-12", "step-4"]


def anonymous_nbytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measure_export(folder: str) -> int:
    """Return how much memory of its own the process has at most during an export, more than before."""
    from ringfold.runtime.checkpoint import export as module

    highest, original, before = 0, module.read_ranges, anonymous_nbytes()

    def watched(*arguments: object) -> object:
        nonlocal highest
        found = original(*arguments)  # type: ignore[arg-type]
        highest = max(highest, anonymous_nbytes())
        return found

    module.read_ranges = watched  # type: ignore[assignment]
    export(Path(folder) / "step-1", Path(folder) / "m.safetensors")
    return highest - before


def test_export_takes_the_memory_of_one_tensor_and_what_the_allocator_keeps(tmp_path: Path) -> None:
    nbytes = 8 << 20
    state = {f"w{i}": torch.zeros(nbytes // 4) for i in range(40)}
    checkpoint.save(tmp_path / "step-1", step=1, model_state=state)
    (more,) = run_ranks(1, measure_export, str(tmp_path), joined=False)
    assert more < 6 * nbytes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ls", "absent"), "there is no folder absent"),
        (("verify", "absent"), "there is no folder absent"),
        (("verify", "."), "holds none that is complete"),
        (("export", "absent", "--to", "x"), "no checkpoint at"),
        (("export", "run", "--to", "run/step-1/model.safetensors"), "exists; remove it"),
        (("export", "run", "--to", "absent/x"), "exporting to absent/x failed: No such file or directory"),
        (("export", "run", "--to", "x", "--dtype", "int8"), "'int8' is not one of"),
        (("export", "run"), "Missing option '--to'"),
        (("list",), "No such command 'list'"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path / "run" / "step-1", step=1, model_state={"w": torch.ones(3)})
    code, output = run(*words)
    assert code == 2
    assert said in output
    assert "Traceback" not in output
