"""runtime/metrics.py: what a run says, to whom, and that saying it costs a step next to nothing."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ringfold.collectives import environment
from ringfold.collectives.errors import ConfigError
from ringfold.runtime.metrics import Metrics


class Mesh:
    """A mesh of which only this rank's place and its waiting are asked."""

    def __init__(self, rank: int = 0, sizes: dict[str, int] | None = None) -> None:
        sizes = sizes or {"pp": 1, "dp": 2, "cp": 1, "tp": 1}
        self.rank = rank
        self.layout = SimpleNamespace(sizes=sizes)
        self.coordinate = dict.fromkeys(sizes, 0)
        self.seconds_waited = 2.0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(environment.LOG_DIR, raising=False)
    monkeypatch.delenv(environment.QUIET, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_plain_line_is_what_the_style_says() -> None:
    out = io.StringIO()
    with Metrics(Mesh(sizes={"pp": 1, "dp": 2, "cp": 1, "tp": 2}), total_steps=120, stream=out) as metrics:
        for step in range(1, 121):
            metrics.step(step, 2.3151, tokens=4096)
    first, last = out.getvalue().splitlines()
    number = r"\d+(\.\d+)?[kM]?"
    assert re.fullmatch(rf"\d\d:\d\d:\d\d dp0\.tp0 \| step 1  loss 2\.315  \d+ ms \(comm 0%\)  {number} tokens/s", first)
    assert re.fullmatch(rf"\d\d:\d\d:\d\d dp0\.tp0 \| step 120  loss 2\.315  \d+ ms \(comm 0%\)  {number} tokens/s  0:00 left", last)


def test_only_rank_0_says_and_writes(tmp_path: Path) -> None:
    out = io.StringIO()
    with Metrics(Mesh(rank=1), log_dir=tmp_path / "logs", stream=out) as metrics:
        metrics.step(1, 2.0)
        metrics.report(1, validation_loss=2.0)
        metrics.print("done")
    assert out.getvalue() == ""
    assert not (tmp_path / "logs").exists()
    assert metrics.path == tmp_path / "logs" / "metrics.jsonl"


def test_every_step_and_report_is_a_json_line_and_a_second_run_appends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.LOG_DIR, str(tmp_path))
    monkeypatch.setenv(environment.QUIET, "1")
    out = io.StringIO()
    for first in (1, 6):
        with Metrics(Mesh(), stream=out) as metrics:
            for step in range(first, first + 5):
                metrics.step(step, torch.tensor(1.5, requires_grad=True), tokens=10, learning_rate=0.25)
            metrics.report(first + 4, validation_loss=float("inf"))
    assert out.getvalue() == ""
    read = records(tmp_path)
    assert [record["step"] for record in read] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]
    assert set(read[0]) == {"time", "step", "loss", "seconds", "waited_s", "tokens", "learning_rate"}
    assert (read[0]["loss"], read[0]["learning_rate"]) == (1.5, 0.25)
    assert read[5]["validation_loss"] == "inf"


def test_communication_is_what_the_process_waits_in_steps(tmp_path: Path) -> None:
    mesh = Mesh()
    with Metrics(mesh, log_dir=tmp_path, stream=io.StringIO()) as metrics:
        mesh.seconds_waited += 0.75
        metrics.step(1, 1.0)
        metrics.step(2, 1.0)
        mesh.seconds_waited += 4.0
        metrics.report(2, validation_loss=1.0)
        metrics.step(3, 1.0)
    waited = [record.get("waited_s") for record in records(tmp_path)]
    assert waited == [0.75, 0.0, None, 0.0]  # what an evaluation waits is no step's


def test_a_report_and_a_print_stand_on_lines_of_their_own() -> None:
    out = io.StringIO()
    with Metrics(Mesh(), stream=out) as metrics:
        metrics.step(299, 1.8)
        metrics.step(300, 1.75)
        metrics.report(300, validation_loss=1.81234, accuracy=0.5)
        metrics.print("[bold] def f(x): :smile:")
    lines = out.getvalue().splitlines()
    assert "step 300  validation loss 1.812  accuracy 0.5" in lines[2]
    assert lines[3] == "[bold] def f(x): :smile:"


def test_a_terminal_gets_one_live_line_and_keeps_the_last() -> None:
    out = Terminal()
    with Metrics(Mesh(), total_steps=50, stream=out) as metrics:
        for step in range(1, 51):
            metrics.step(step, 2.5, tokens=100)
        metrics.print("sample")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "step 50  loss 2.500" in text
    assert "sample" in text
    assert "dp0 |" not in text


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_step_costs_less_than_50_us(tmp_path: Path, stream: type[io.StringIO]) -> None:
    # The floor over rounds, as this machine may be busy; flushes, a few a second, are part of the longer rounds.
    with Metrics(Mesh(), total_steps=10_000, log_dir=tmp_path, stream=stream()) as metrics:
        rounds = []
        for start in range(0, 10_000, 500):
            began = time.perf_counter()
            for step in range(start, start + 500):
                metrics.step(step, 2.0, tokens=4096)
            rounds.append((time.perf_counter() - began) / 500)
    assert min(rounds) < 50e-6


def test_a_log_that_cannot_be_opened_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--log-dir"):
        Metrics(Mesh(), log_dir=tmp_path / "file")


def test_closing_twice_and_without_a_step_is_allowed(tmp_path: Path) -> None:
    metrics = Metrics(Mesh(), log_dir=tmp_path, stream=io.StringIO())
    metrics.close()
    metrics.close()
    assert records(tmp_path) == []
