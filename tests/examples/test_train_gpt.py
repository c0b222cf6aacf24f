"""examples/train_gpt.py, run as a user runs it: through the launcher, on one and on two ranks, to the same loss."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from ringfold.collectives.errors import ConfigError

ROOT = Path(__file__).parents[2]
TINY = ("--size", "tiny", "--batch-size", "7", "--out", "run")
SAME = 2e-4  # float32 sums in another order, through a few AdamW steps; a row weighted wrongly changes the third digit
SCRIPT = ROOT / "examples" / "train_gpt.py"


def run(folder: Path, ranks: int, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ringfold", "run", "-n", str(ranks), *options, str(SCRIPT), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=110)


def records(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text in two files, in which a byte is told by those before it."""
    folder = tmp_path_factory.mktemp("text")
    for name, words in (("a.txt", "the quick brown fox "), ("b.txt", "jumps over the lazy dog ")):
        (folder / name).write_text(words * 2000)
    return folder


@dataclass
class Trained:
    folder: Path
    told: str
    records: list[dict[str, float]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[int, Trained]:
    """Six steps on one rank and on two. Of the 7 rows of a batch, one of two ranks has 4, the other 3."""
    results = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"on-{ranks}")
        done = run(folder, ranks, *TINY, "--data", str(text), "--steps", "6", options=("--log-dir", "logs"))
        assert done.returncode == 0, done.stdout + done.stderr
        results[ranks] = Trained(folder, done.stdout, records(folder / "logs" / "metrics.jsonl"))
    return results


def test_two_ranks_learn_what_one_learns(trained: dict[int, Trained]) -> None:
    one, two = trained[1].records, trained[2].records
    assert [record["step"] for record in two] == [1, 2, 3, 4, 5, 6, 6]
    for mine, theirs in zip(one, two, strict=True):
        key = "loss" if "loss" in mine else "validation_loss"
        assert mine[key] == pytest.approx(theirs[key], abs=SAME)
    assert two[-1]["validation_loss"] < two[0]["loss"]


def test_it_tells_the_loss_a_sample_and_where_everything_is(trained: dict[int, Trained]) -> None:
    told = trained[2].told
    for said in ("step 6  validation loss", "def read_", "checkpoint  run/step-6", "logs/metrics.jsonl", "--steps 12 --resume"):
        assert said in told
    assert (trained[2].folder / "run" / "step-6" / "manifest.json").exists()


def test_a_resumed_run_goes_on_where_it_was_on_another_number_of_ranks(tmp_path: Path, text: Path, trained: dict[int, Trained]) -> None:
    # The learning rate depends on --steps, but not in the first twentieth of the warm-up.
    for ranks, steps, more in ((2, "1", ()), (1, "3", ("--resume",))):
        done = run(tmp_path, ranks, *TINY, "--data", str(text), "--steps", steps, *more)
        assert done.returncode == 0, done.stdout + done.stderr
    losses = [record["loss"] for record in records(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert losses == pytest.approx([record["loss"] for record in trained[1].records[:3]], abs=SAME)


def test_a_checkpoint_of_another_size_lists_what_differs(trained: dict[int, Trained], text: Path) -> None:
    done = run(trained[1].folder, 2, "--data", str(text), "--out", "run", "--resume")
    assert done.returncode == 2
    assert "Incompatible" in done.stderr
    assert "shape of embed.weight: [256, 64] in the checkpoint, [256, 128] in the model" in done.stderr
    assert "missing in the checkpoint: blocks.4.down.weight" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_missing_data_is_one_clear_error_and_nothing_is_started(tmp_path: Path) -> None:
    done = run(tmp_path, 2, "--data", "absent.txt")
    assert done.returncode == 2
    assert "ConfigError: --data absent.txt: found 0 bytes of text" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert list(tmp_path.iterdir()) == []


def test_empty_data_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    read_rows = runpy.run_path(str(SCRIPT))["read_rows"]
    for path in (tmp_path, tmp_path / "empty.txt"):
        with pytest.raises(ConfigError, match="found 0 bytes"):
            read_rows(path, 8)


def test_rows_overlap_by_the_byte_that_is_predicted_next(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(256)) * 256)
    train, valid = runpy.run_path(str(SCRIPT))["read_rows"](tmp_path / "text", 7)
    assert (len(train), len(valid)) == ((58982 - 1) // 7, (6554 - 1) // 7)
    x, y = train[3]
    assert x.tolist() == list(range(21, 28))
    assert y.tolist() == list(range(22, 29))


def test_the_example_is_short_and_has_no_rank_branch() -> None:
    source = SCRIPT.read_text()
    assert len(source.splitlines()) < 120
    assert "rank" not in source.replace("rank 0", "")
