"""examples/train_gpt.py, run as a user runs it: through the launcher, on one and on two ranks, to the same loss."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_gpt.py"


def run(folder: Path, ranks: int, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ringfold", "run", "-n", str(ranks), *options, str(SCRIPT), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=110)


def trained(folder: Path, ranks: int, *arguments: str, options: tuple[str, ...] = ()) -> tuple[str, list[dict[str, float]]]:
    folder.mkdir(exist_ok=True)
    done = run(folder, ranks, "--size", "tiny", "--batch-size", "7", "--out", "run", *arguments, options=options)
    assert done.returncode == 0, done.stdout + done.stderr
    log = folder / ("logs" if options else "run") / "metrics.jsonl"
    return done.stdout, [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text in two files, in which a byte is told by the one before it."""
    folder = tmp_path_factory.mktemp("text")
    for name, words in (("a.txt", "the quick brown fox "), ("b.txt", "jumps over the lazy dog ")):
        (folder / name).write_text(words * 2000)
    return folder


def test_two_ranks_learn_what_one_learns(tmp_path: Path, text: Path) -> None:
    # 7 rows: one rank has 4, the other 3.
    arguments = ("--data", str(text), "--steps", "6")
    told, one = trained(tmp_path / "one", 1, *arguments)
    _, two = trained(tmp_path / "two", 2, *arguments)
    assert [record["step"] for record in two] == [1, 2, 3, 4, 5, 6, 6]
    for mine, theirs in zip(one, two, strict=True):
        key = "loss" if "loss" in mine else "validation_loss"
        # float32 sums in another order, through 6 AdamW steps; a row weighted wrongly changes the third digit
        assert mine[key] == pytest.approx(theirs[key], abs=2e-4)
    assert two[-1]["validation_loss"] < two[0]["loss"]
    assert "validation loss" in told
    assert "def read_" in told
    assert re.search(r"checkpoint  run/step-6\b", told)
    assert "metrics.jsonl" in told
    assert "--steps 12 --resume" in told
    assert (tmp_path / "two" / "run" / "step-6" / "manifest.json").exists()


def test_a_resumed_run_goes_on_where_it_was_on_another_number_of_ranks(tmp_path: Path, text: Path) -> None:
    whole = trained(tmp_path / "whole", 1, "--data", str(text), "--steps", "4")[1]
    folder = tmp_path / "cut"
    # The schedule depends on --steps, but not within the warm-up.
    trained(folder, 2, "--data", str(text), "--steps", "2")
    _, records = trained(folder, 1, "--data", str(text), "--steps", "4", "--resume")
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses == pytest.approx([record["loss"] for record in whole if "loss" in record], abs=2e-4)


def test_the_launchers_log_dir_is_where_the_log_goes(tmp_path: Path, text: Path) -> None:
    told, records = trained(tmp_path, 1, "--data", str(text), "--steps", "1", options=("--log-dir", "logs"))
    assert [record["step"] for record in records] == [1, 1]
    assert "logs/metrics.jsonl" in told


@pytest.mark.parametrize("what", ["missing", "empty", "empty folder"])
def test_data_that_is_missing_or_empty_is_one_clear_error(tmp_path: Path, what: str) -> None:
    path = tmp_path / "data"
    if what == "empty":
        path.write_text("")
    elif what == "empty folder":
        path.mkdir()
    done = run(tmp_path, 1, "--data", str(path), "--out", "run")
    assert done.returncode == 2
    assert f"ConfigError: --data {path}: found 0 bytes of text" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_size_lists_what_differs(tmp_path: Path, text: Path) -> None:
    trained(tmp_path, 1, "--data", str(text), "--steps", "1")
    done = run(tmp_path, 2, "--data", str(text), "--out", "run", "--resume")
    assert done.returncode == 2
    assert "Incompatible" in done.stderr
    assert "shape of embed.weight: [256, 64] in the checkpoint, [256, 128] in the model" in done.stderr
    assert "missing in the checkpoint: blocks.4.down.weight" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_nothing_to_resume_from_is_one_clear_error(tmp_path: Path, text: Path) -> None:
    done = run(tmp_path, 1, "--data", str(text), "--resume", "--out", "run")
    assert done.returncode == 2
    assert "Incomplete: there is no checkpoint" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_the_example_is_short_and_has_no_rank_branch() -> None:
    source = SCRIPT.read_text()
    assert len(source.splitlines()) < 120
    assert "rank" not in source.replace("rank 0", "")
