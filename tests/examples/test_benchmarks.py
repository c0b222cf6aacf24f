"""Smoke runs of the benchmarks: they run, their tables hold what benchmarks/README.md demands, and a wrong answer is seen. No number is judged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner
from ringfold.benchmarks._deepspeed import STAGES
from ringfold.benchmarks._deepspeed import is_installed as is_deepspeed_installed
from ringfold.benchmarks._group import Group, GroupFailed, _sweep
from ringfold.benchmarks._libraries import LIBRARIES, Library, is_installed
from ringfold.benchmarks._operations import DTYPES, OPERATIONS, REDUCTIONS
from ringfold.benchmarks._rank import SLOT, Barrier, prepare, time_calls
from ringfold.benchmarks._sweep import footer, points
from ringfold.benchmarks.all_reduce import main as all_reduce
from ringfold.benchmarks.sides.gloo import Gloo
from ringfold.benchmarks.sides.ringfold import Ringfold
from ringfold.benchmarks.sides.side import Place

from tests.harness import run_ranks

COLUMNS = ["bytes", "count", "type", "op", "side", "time", "spread", "algbw", "busbw", "#wrong"]
PEERS = [name for name, library in LIBRARIES.items() if library.launcher]


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RINGFOLD_")}


def run_benchmark(name: str, *arguments: str, code: int = 0) -> str:
    """Run `ringfold bench` and return what it printed."""
    command = [sys.executable, "-m", "ringfold", "bench", name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=clean_environment(), check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_the_table_has_nccl_tests_columns_and_gloo_beside_it_and_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    path, plot_path = tmp_path / "result.json", tmp_path / "plot.png"
    arguments = ["--begin", "4", "--end", "1K", "--factor", "16", "--rounds", "3", "--json", str(path)]
    output = run_benchmark("all_reduce", "-n", "2", "--sides", "registered,unregistered,gloo", *arguments, "--plot", str(plot_path))
    header = next(line for line in output.splitlines() if "#wrong" in line)
    assert header.lstrip("#").split()[: len(COLUMNS)] == COLUMNS
    assert "# Out of bounds values : 0 OK" in output
    assert "# Avg bus bandwidth" in output
    result = json.loads(path.read_text())
    assert set(result["versions"]) == {"ringfold", "torch", "python", "gloo"}
    assert result["machine"]
    assert result["command"].endswith(" ".join(arguments[:6]) + f" --rounds 3 --json {path} --plot {plot_path}")
    rows = result["rows"]
    sides = ("registered", "unregistered", "gloo")
    assert [(row["bytes"], row["side"]) for row in rows] == [(n, side) for n in (4, 64, 1024) for side in sides]
    for row in rows:
        assert row["ranks"] == 2
        assert len(row["rounds_us"]) == 3
        assert min(row["rounds_us"]) <= row["time_us"] <= max(row["rounds_us"])
        assert row["algbw_GBps"] == pytest.approx(row["bytes"] / row["time_us"] / 1e3)
        assert row["wrong"] == 0
        gloo = next(other for other in rows if (other["bytes"], other["side"]) == (row["bytes"], "gloo"))
        assert row["times_gloo"] == pytest.approx(gloo["time_us"] / row["time_us"])
    assert plot_path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("ranks", ["1", pytest.param("2,3", marks=pytest.mark.slow)])
def test_a_sweep_goes_over_ranks_dtypes_and_algorithms(ranks: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    sweep = ["-n", ranks, "--begin", "6K", "--end", "6K", "--rounds", "1", "--sides", "registered,floor", "--dtype", "float32,int8"]
    done = CliRunner().invoke(all_reduce, [*sweep, "--algorithm", "auto,ring", "--json", str(path)])
    assert done.exit_code == 0, done.output
    rows = json.loads(path.read_text())["rows"]
    points = [(row["ranks"], row["type"], row["side"]) for row in rows]
    sides = ("registered", "registered ring", "floor")
    assert points == [(int(n), dtype, side) for n in ranks.split(",") for dtype in ("float32", "int8") for side in sides]
    for row in rows:
        assert row["busbw_GBps"] == pytest.approx(row["algbw_GBps"] * 2 * (row["ranks"] - 1) / row["ranks"])


@pytest.mark.parametrize("peer", PEERS)
def test_an_installed_peer_is_measured_beside_ringfold(peer: str, tmp_path: Path) -> None:
    if not is_installed(peer):
        pytest.skip(f"{peer} is not installed (make peers)")
    path = tmp_path / "result.json"
    run_benchmark("all_to_all", "--begin", "1K", "--end", "1K", "--rounds", "2", "--sides", f"registered,{peer}", "--json", str(path))
    assert [row["side"] for row in json.loads(path.read_text())["rows"]] == ["registered", peer]


def requests() -> list[dict[str, Any]]:
    """Return a request for every operation, dtype and reduction that has one, of 23 elements or 23 for each of 3 ranks."""
    found = []
    for operation in OPERATIONS:
        for dtype in DTYPES:
            for reduction in REDUCTIONS if OPERATIONS[operation].reduces else ["sum"]:
                nbytes = 23 * getattr(torch, dtype).itemsize * (3 if OPERATIONS[operation].splits else 1)
                (point,) = points(operation, 3, dtype, reduction, [nbytes])
                found.append({"operation": operation, "count": point.count, "dtype": dtype, "reduction": reduction})
    return found


def check_side(name: str, folder: Path) -> list[str]:
    """Measure everything on this rank, and return what was not right."""
    os.environ["RANK"] = os.environ["RINGFOLD_RANK"]
    place = Place(folder, 3, 1 << 20)
    side = Gloo(place) if name == "gloo" else Ringfold(place)
    barrier = Barrier(folder / "barrier", side.rank, 3)
    failures = []
    for request in requests():
        if name == "gloo" and request["dtype"] == "int16":
            continue  # gloo has no int16
        prepared = prepare(side, {**request, "device": "cpu", "memory": name, "algorithm": "auto"})
        if time_calls(prepared, barrier, 2)["wrong"]:
            failures.append(f"{request}: {prepared.output} is not {prepared.expected}")
    side.close()
    return failures


@pytest.mark.parametrize("side", ["registered", "unregistered", "gloo"])
def test_every_operation_dtype_and_reduction_checks_out(side: str, tmp_path: Path) -> None:
    (tmp_path / "barrier").write_bytes(bytes(3 * SLOT * 8))
    assert run_ranks(3, check_side, side, tmp_path, joined=False) == [[], [], []]


def count_wrong(folder: Path) -> int:
    """Measure an all_reduce that is wrong in one element."""
    side = Ringfold(Place(folder, 2, 1 << 20))
    prepared = prepare(
        side,
        {"operation": "all_reduce", "count": 5, "dtype": "float32", "reduction": "sum", "memory": "registered", "device": "cpu", "algorithm": "auto"},
    )
    right, output = prepared.call, prepared.output
    assert output is not None

    def wrong_in_one_place() -> None:
        right()
        output[-1] += 1

    prepared.call = wrong_in_one_place
    wrong: int = time_calls(prepared, Barrier(folder / "barrier", side.rank, 2), 3)["wrong"]
    side.close()
    return wrong


def test_a_wrong_element_is_counted_on_each_rank(tmp_path: Path) -> None:
    (tmp_path / "barrier").write_bytes(bytes(2 * SLOT * 8))
    assert run_ranks(2, count_wrong, tmp_path, joined=False) == [1, 1]


def test_the_footer_says_what_is_wrong_missing_and_failed() -> None:
    run = {"machine": "a machine", "versions": {"torch": "2"}, "threads_per_rank": 1, "command": "a command"}
    lines = footer([{"side": "registered", "busbw_GBps": 1.0, "wrong": 4}], ["mpich: gone\nits output"], ["horovod"], run).splitlines()
    assert "# Out of bounds values : 4 FAILED" in lines
    assert "# Not installed        : horovod (make peers)" in lines
    assert "# Failed               : mpich: gone" in lines


@pytest.mark.parametrize(
    "arguments",
    [
        ["--begin", "many"],
        ["--begin", "8", "--end", "4"],
        ["--op", "mean"],
        ["--op", "prod", "-n", "9"],
        ["-n", "0"],
        ["--sides", "nccl"],
        ["--dtype", "f"],
    ],
)
def test_a_bad_option_is_a_usage_error(arguments: list[str]) -> None:
    result = CliRunner().invoke(all_reduce, arguments)
    assert result.exit_code == 2
    assert "Error:" in result.output


def test_ranks_that_cannot_join_are_a_failure_with_their_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIBRARIES, "gloo", Library("nowhere:Nothing"))
    with pytest.raises(GroupFailed, match=r"(?s)^gloo: .*No module named 'ringfold.benchmarks.sides.nowhere'"):
        Group("gloo", 2, 1024, 30)


def test_a_rank_that_ends_is_a_failure_and_close_ends_the_others() -> None:
    with Group("ringfold", 2, 1024, 30) as group:
        ranks = [psutil.Process(pid) for pid in group.pids]
        ranks[1].kill()
        with pytest.raises(GroupFailed, match="ringfold: "):
            group.ask(
                {
                    "do": "prepare",
                    "case": "x",
                    "operation": "barrier",
                    "count": 1,
                    "dtype": "int8",
                    "reduction": "sum",
                    "memory": "",
                    "algorithm": "auto",
                    "device": "cpu",
                }
            )
    assert not psutil.wait_procs(ranks, timeout=10)[1]


@pytest.mark.parametrize("number", [signal.SIGKILL, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGINT))])
def test_nothing_outlives_the_driver(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "ringfold.benchmarks.barrier", "-n", "1", "--rounds", "1000000", "--sides", "registered,gloo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=clean_environment()) as driver:
        assert driver.stdout is not None
        driver.stdout.readline()  # printed before the groups start
        process = psutil.Process(driver.pid)
        while sum("ringfold.benchmarks._rank" in " ".join(cmdline(child)) for child in process.children(recursive=True)) < 2:
            assert driver.poll() is None
        children = process.children(recursive=True)
        driver.send_signal(number)
        assert driver.wait(60) != 0
    assert not psutil.wait_procs(children, timeout=30)[1]


def test_what_a_killed_driver_has_left_is_swept_by_the_next(tmp_path: Path) -> None:
    left, new = tmp_path / "ringfold-bench-left", tmp_path / "ringfold-bench-new"
    for folder in (left, new):
        folder.mkdir()
        (folder / "barrier").write_bytes(b"0")
    os.utime(left, (0, 0))
    _sweep(tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == [new.name]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize("sides", [["engine"], pytest.param(["data_parallel", "fsdp"], marks=pytest.mark.slow)])
def test_train_step_measures_all_sides_and_they_train_alike(sides: list[str], tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    arguments = ["--quick", "--shape", "2x8", "--shape", "1x5", "--sides", ",".join(sides), "--json", str(path)]
    output = run_benchmark("train_step", "-n", "2", *arguments)
    result = json.loads(path.read_text())
    assert result["command"].startswith("ringfold run -n 2 -m ringfold.benchmarks.train_step --quick")
    rows = result["rows"]
    measured = [side for side in ("data_parallel", "engine", "ddp", "fsdp", "alone") if side in (*sides, "ddp", "alone")]
    assert [(row["shape"], row["side"]) for row in rows] == [(shape, side) for shape in ("2x8", "1x5") for side in measured]
    for row in rows:
        assert len(row["windows"]) == 2
        assert row["cpu_s_per_step"] > 0
        if row["side"] != "alone":
            # AdamW divides by the root of tiny second moments, so rounding may move a step of 3e-4 by a part of itself, four times.
            assert row["difference_to_ddp"] < 4 * 3e-4 * 0.1
    assert sum("| " in line for line in output.splitlines()) >= 1 + len(rows)


@pytest.mark.slow
def test_deepspeed_trains_as_ddp_does_with_a_share_of_its_state_or_is_said_to_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    output = run_benchmark("train_step", "-n", "2", "--quick", "--shape", "2x8", "--sides", ",".join(STAGES), "--json", str(path))
    result = json.loads(path.read_text())
    rows = {row["side"]: row for row in result["rows"]}
    if not is_deepspeed_installed():
        assert list(rows) == ["ddp", "alone"]
        assert result["not_installed"] == list(STAGES)
        assert "not installed: deepspeed1 (make peers)" in output
        return
    assert list(rows) == ["ddp", *STAGES, "alone"]
    for side in STAGES:
        assert rows[side]["difference_to_ddp"] < 1e-6  # so little that gradients which were clipped, to which AdamW is almost blind, would show
        assert rows[side]["state_nbytes"] == pytest.approx(rows["ddp"]["state_nbytes"] / 2, rel=0.02)


@pytest.mark.slow
def test_scaling_compares_every_side_with_a_lone_rank(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    arguments = ["--quick", "--rows", "1", "--tokens", "8", "--kinds", "strong", "--sides", "data_parallel", "--json", str(path)]
    output = run_benchmark("scaling", "-n", "2", *arguments)
    rows = json.loads(path.read_text())["rows"]
    assert [(row["ranks"], row["rows_a_rank"], row["side"]) for row in rows] == [
        (n, 2 // n, side) for n in (1, 2) for side in ("data_parallel", "ddp", "alone")
    ]
    lone = next(row["samples_per_s"] for row in rows if (row["ranks"], row["side"]) == (1, "alone"))
    for row in rows:
        assert row["efficiency"] == pytest.approx(row["samples_per_s"] / (row["ranks"] * lone))
    assert "| strong | 2 | 1 | alone |" in output


def test_memory_counts_every_layout_in_a_job_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    output = run_benchmark("memory", "-n", "2", "--quick", "--layout", "zero0", "--layout", "bf16 zero3", "--json", str(path))
    rows = json.loads(path.read_text())["rows"]
    assert [row["layout"] for row in rows] == ["zero0", "bf16 zero3"]
    for row in rows:
        assert row["counted_nbytes"] == sum(row["counted"].values())
    assert rows[1]["counted"]["parameters"] < rows[0]["counted"]["parameters"] / 3
    assert sum(line.startswith("| ") for line in output.splitlines()) == 3


def test_offload_steps_beside_dd(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    output = run_benchmark("offload", "-n", "2", "--size", "tiny", "--rounds", "1", "--folder", str(tmp_path), "--json", str(path))
    result = json.loads(path.read_text())
    assert result["moved_nbytes"] >= 2 * 12 * result["parameters"]
    for side in ("ringfold", "dd, write then read", "dd, both at once"):
        assert len(result["seconds"][side]) == 1
        assert f"| {side} |" in output
    assert [name.name for name in tmp_path.iterdir()] == ["result.json"]


def test_tensor_parallel_is_measured_beside_dtensor(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    output = run_benchmark("tensor_parallel", "-n", "2", "--quick", "--dim", "16", "--layers", "1", "--json", str(path))
    rows = json.loads(path.read_text())["rows"]
    assert [row["side"] for row in rows] == ["engine", "dtensor", "alone"]
    assert all(row["samples_per_s"] > 0 and f"| {row['side']} |" in output for row in rows)


def test_offload_trains_beside_backward_and_after_it(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    output = run_benchmark("offload", "-n", "1", "--train-step", "--size", "tiny", "--rounds", "2", "--folder", str(tmp_path), "--json", str(path))
    seconds = json.loads(path.read_text())["seconds"]
    assert list(seconds) == ["beside backward", "after backward", "zero3, no offload"]
    for side, taken in seconds.items():
        assert len(taken) == 2
        assert f"| {side} |" in output
    assert [name.name for name in tmp_path.iterdir()] == ["result.json"]


def test_checkpoint_shows_what_a_save_holds_up_beside_torch(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    output = run_benchmark("checkpoint", "-n", "2", "--nbytes", "20M", "--rounds", "1", "--folder", str(tmp_path), "--json", str(path))
    rows = {row["side"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["ringfold sync", "ringfold async", "dcp sync", "dcp async"]
    for row in rows.values():
        assert 0 < row["blocked_s"] <= row["disk_s"]
        assert row["wrong"] == 0
        assert f"| {row['side']} |" in output
    assert [name.name for name in tmp_path.iterdir()] == ["result.json"]
