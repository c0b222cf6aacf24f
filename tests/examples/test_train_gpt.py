"""examples/train_gpt.py, run as a user runs it: through the launcher, on one and on two ranks, to the same loss."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from ringfold.collectives.errors import ConfigError

ROOT = Path(__file__).parents[2]
TINY = ("--size", "tiny", "--batch-size", "7", "--out", "run")
SAME = 2e-4  # float32 sums in another order, through a few AdamW steps; a row weighted wrongly changes the third digit
SCRIPT = ROOT / "examples" / "train_gpt.py"


def run(folder: Path, ranks: int, *arguments: str, options: tuple[str, ...] = (), timeout_s: float = 110) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ringfold", "run", "-n", str(ranks), *options, str(SCRIPT), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s)


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


def train(folder: Path, ranks: int, text: Path, steps: int, *more: str, layout: str = "") -> Trained:
    options = ("--log-dir", "logs", *(("--layout", layout) if layout else ()))
    done = run(folder, ranks, *TINY, "--data", str(text), "--steps", str(steps), *more, options=options)
    assert done.returncode == 0, done.stdout + done.stderr
    return Trained(folder, done.stdout, records(folder / "logs" / "metrics.jsonl"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Trained, Trained]:
    """Six steps on a rank alone; and one, resumed on two ranks up to the sixth. Of the 7 rows of a batch, one of two ranks has 4, the other 3."""
    whole, resumed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("resumed")
    with ThreadPoolExecutor() as at_once:
        one, _ = at_once.map(lambda folder, steps: train(folder, 1, text, steps), (whole, resumed), (6, 1))
    return one, train(resumed, 2, text, 6, "--resume")


@pytest.fixture
def on_one_rank(trained: tuple[Trained, Trained]) -> Trained:
    return trained[0]


@pytest.fixture
def on_two_ranks(trained: tuple[Trained, Trained]) -> Trained:
    return trained[1]


def losses(trained: Trained) -> list[float]:
    return [record["loss"] for record in trained.records if "loss" in record]


def test_two_ranks_resume_from_one_and_learn_what_one_learns(on_one_rank: Trained, on_two_ranks: Trained) -> None:
    assert [record["step"] for record in on_two_ranks.records] == [1, 1, 2, 3, 4, 5, 6, 6]
    # The learning rate depends on --steps, but not in the first twentieth of the warm-up.
    assert losses(on_two_ranks) == pytest.approx(losses(on_one_rank), abs=SAME)
    one, two = (trained.records[-1]["validation_loss"] for trained in (on_one_rank, on_two_ranks))
    assert two == pytest.approx(one, abs=SAME)
    assert two < losses(on_two_ranks)[0]


@pytest.mark.parametrize(("ranks", "layout"), [(2, "dp1 tp2"), (2, "dp1 cp2"), pytest.param(4, "dp2 tp2 zero3", marks=pytest.mark.slow)])
def test_any_layout_of_the_launcher_learns_what_one_rank_learns(ranks: int, layout: str, on_one_rank: Trained, text: Path, tmp_path: Path) -> None:
    trained = train(tmp_path, ranks, text, 6, layout=layout)
    assert losses(trained) == pytest.approx(losses(on_one_rank), abs=SAME)
    assert trained.records[-1]["validation_loss"] == pytest.approx(on_one_rank.records[-1]["validation_loss"], abs=SAME)
    assert (tmp_path / "run" / "step-6" / "manifest.json").exists()


def test_it_tells_the_loss_a_sample_and_where_everything_is(on_two_ranks: Trained) -> None:
    for said in ("step 6  validation loss", "def read_", "checkpoint  run/step-6", "logs/metrics.jsonl", "--steps 12 --resume"):
        assert said in on_two_ranks.told
    assert (on_two_ranks.folder / "run" / "step-6" / "manifest.json").exists()


def test_a_checkpoint_of_another_size_lists_what_differs(on_one_rank: Trained, text: Path) -> None:
    done = run(on_one_rank.folder, 1, "--data", str(text), "--out", "run", "--resume")
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
