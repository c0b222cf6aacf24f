"""Smoke runs of the benchmarks: they run, their tables hold what benchmarks/README.md demands, and a wrong answer is seen. No number is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ringfold as rf
import torch
from click.testing import CliRunner

from tests.harness import run_ranks

COLUMNS = ["bytes", "count", "type", "op", "memory", "time", "spread", "algbw", "busbw", "#wrong"]


def run_benchmark(name: str, arguments: list[str], break_it: bool = False) -> tuple[int, str]:
    """Run a benchmark's command in this rank; return exit code and output."""
    if name == "all_reduce":
        from ringfold.benchmarks.all_reduce import main
    else:
        from ringfold.benchmarks.train_step import main
    if break_it:
        right = rf.Communicator.all_reduce

        def wrong_in_one_place(self: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            work = right(self, tensor, *args, **kwargs)
            if tensor.dtype == torch.float32:  # the values; the benchmark's own sums are float64
                tensor[-1] += 1
            return work

        rf.Communicator.all_reduce = wrong_in_one_place  # type: ignore[method-assign]
    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_all_reduce_table_has_nccl_tests_columns_and_gloo_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    arguments = ["--min-bytes", "4", "--max-bytes", "1K", "--factor", "16", "--rounds", "3", "--json", str(path)]
    (code, output), *others = run_ranks(3, run_benchmark, "all_reduce", arguments, joined=False)
    assert code == 0, output
    assert all(other == (0, "") for other in others), "only rank 0 prints"
    header = next(line for line in output.splitlines() if "#wrong" in line)
    assert header.lstrip("#").split()[: len(COLUMNS)] == COLUMNS
    assert "# Out of bounds values : 0 OK" in output
    assert "# Avg bus bandwidth" in output
    result = json.loads(path.read_text())
    assert result["ranks"] == 3
    assert set(result["versions"]) == {"ringfold", "torch", "python"}
    assert result["machine"]
    assert result["command"]
    rows = result["rows"]
    assert [(row["bytes"], row["memory"]) for row in rows] == [(n, m) for n in (4, 64, 1024) for m in ("registered", "unregistered", "gloo")]
    for row in rows:
        assert len(row["rounds_us"]) == 3
        assert min(row["rounds_us"]) <= row["time_us"] <= max(row["rounds_us"])
        assert row["algbw_GBps"] == pytest.approx(row["bytes"] / row["time_us"] / 1e3)
        assert row["busbw_GBps"] == pytest.approx(row["algbw_GBps"] * 4 / 3)
        assert row["wrong"] == 0


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int32", "int64", "uint8"])
def test_every_dtype_and_op_checks_out(dtype: str) -> None:
    for op in ("sum", "avg", "min", "max", "prod"):
        arguments = ["--min-bytes", "24", "--max-bytes", "24", "--rounds", "1", "--dtype", dtype, "--op", op, "--unregistered"]
        for code, output in run_ranks(2, run_benchmark, "all_reduce", arguments, joined=False):
            assert code == 0, output


@pytest.mark.parametrize("algorithm", ["ring", "direct"])
def test_one_algorithm_without_gloo(algorithm: str) -> None:
    arguments = ["--max-bytes", "64K", "--factor", "1024", "--rounds", "1", "--algorithm", algorithm, "--registered", "--no-gloo"]
    code, output = run_ranks(2, run_benchmark, "all_reduce", arguments, joined=False)[0]
    assert code == 0, output
    assert "gloo" not in output.split("\n", 3)[3].partition("# Out of bounds")[0]


def test_a_wrong_answer_is_counted_and_fails_the_run() -> None:
    arguments = ["--min-bytes", "64", "--max-bytes", "64", "--rounds", "2", "--no-gloo", "--registered"]
    for rank, (code, output) in enumerate(run_ranks(2, run_benchmark, "all_reduce", arguments, True, joined=False)):
        assert code == 1
        if rank == 0:
            assert "# Out of bounds values : 4 FAILED" in output  # one element, two ranks, two rounds


@pytest.mark.parametrize("arguments", [["--min-bytes", "many"], ["--min-bytes", "2"], ["--min-bytes", "8", "--max-bytes", "4"], ["--op", "mean"]])
def test_a_bad_option_is_a_usage_error(arguments: list[str]) -> None:
    code, output = run_benchmark("all_reduce", arguments)
    assert code == 2
    assert "Error:" in output


@pytest.mark.parametrize("form", ["both", "engine"])
def test_train_step_measures_all_sides_and_they_train_alike(form: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    arguments = ["--quick", "--shape", "2x8", "--shape", "1x5", "--form", form, "--json", str(path)]
    code, output = run_ranks(2, run_benchmark, "train_step", arguments, joined=False)[0]
    assert code == 0, output
    rows = json.loads(path.read_text())["rows"]
    sides = [*(["data_parallel", "engine"] if form == "both" else [form]), "ddp", "alone"]
    assert [(row["shape"], row["side"]) for row in rows] == [(shape, side) for shape in ("2x8", "1x5") for side in sides]
    for row in rows:
        assert len(row["windows"]) == 2
        assert row["cpu_s_per_step"] > 0
        if row["side"] != "alone":
            # AdamW divides by the root of tiny second moments, so rounding may move a step of 3e-4 by a part of itself, four times.
            assert row["difference_to_ddp"] < 4 * 3e-4 * 0.1
    assert sum(line.startswith("| ") for line in output.splitlines()) == 1 + len(rows)


def test_the_launcher_runs_a_benchmark() -> None:
    command = [sys.executable, "-m", "ringfold", "run", "-n", "2", "-m", "ringfold.benchmarks.all_reduce"]
    arguments = ["--max-bytes", "4", "--rounds", "1", "--no-gloo"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RINGFOLD_")}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, env=environ, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Out of bounds values : 0 OK" in done.stdout
    assert "ringfold run -n 2 -m ringfold.benchmarks.all_reduce --max-bytes 4" in done.stdout
