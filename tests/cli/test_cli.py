"""The command line: help, usage errors, and that none of it needs torch."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from ringfold.collectives.errors import LaunchError
from ringfold.launch import cli, run

from tests.cli.launching import command

GOLDEN = Path(__file__).parent / "golden"


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.ringfold, arguments, prog_name="ringfold", catch_exceptions=False, terminal_width=80)
    return result.exit_code, result.output


@pytest.mark.parametrize("name", ["", "run", "bench", "doctor"])
def test_help_is_the_golden_text(name: str) -> None:
    code, output = invoke(*([name] if name else []), "--help")
    assert code == 0
    assert output == (GOLDEN / f"help{'_' if name else ''}{name}.txt").read_text()


@pytest.mark.quiet
def test_help_answers_in_under_300_ms() -> None:
    times = []
    for _ in range(5):  # the fastest: another process on the same core is not the command's fault
        start = time.perf_counter()
        subprocess.run(command("--help"), check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3


def test_no_module_of_launch_imports_torch_and_help_imports_neither_rich_nor_the_launcher() -> None:
    names = sorted(f"ringfold.launch.{file.stem}" for file in Path(cli.__file__).parent.glob("*.py"))
    code = f"""
import sys, importlib, contextlib, io
from click.testing import CliRunner
from ringfold.launch.cli import ringfold
assert CliRunner().invoke(ringfold, ["--help"]).exit_code == 0
print(sorted({{"torch", "rich", "ringfold.launch.run"}} & set(sys.modules)))
for name in {names}: importlib.import_module(name)
assert CliRunner().invoke(ringfold, ["doctor"]).exit_code == 0
assert CliRunner().invoke(ringfold, ["run", "--layout", "dp3 tq2", "x.py"]).exit_code == 2
print(sorted({{"torch"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.splitlines() == ["[]", "[]"]


def test_an_unknown_command_suggests_the_nearest() -> None:
    code, output = invoke("doctr")
    assert code == 2
    assert "did you mean doctor?" in output


def test_a_script_given_as_a_command_is_told_how_to_run_it() -> None:
    code, output = invoke("train.py")
    assert code == 2
    assert "ringfold run train.py" in output


def test_our_errors_are_one_block_and_show_a_traceback_only_with_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> int:
        raise LaunchError("rank 0 of 1 could not be started")

    monkeypatch.setattr(run, "run_job", refuse)
    assert invoke("run", __file__) == (2, "Error: rank 0 of 1 could not be started\n")
    with pytest.raises(LaunchError):
        invoke("--debug", "run", __file__)


def test_bench_lists_its_benchmarks_and_suggests_the_nearest() -> None:
    code, output = invoke("bench")
    assert code == 0
    for name in output.split():
        assert invoke("bench", name + "x") == (2, f"Error: no benchmark {name}x; did you mean {name}?\n")


def test_bench_becomes_the_module_with_all_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(cli.os, "execv", lambda *words: seen.append(words))
    assert invoke("bench", "all_reduce", "-n", "2,3", "--begin", "4")[0] == 0
    assert seen == [(sys.executable, [sys.executable, "-m", "ringfold.benchmarks.all_reduce", "-n", "2,3", "--begin", "4"])]


def test_verify_becomes_the_module_with_all_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(cli.os, "execv", lambda *words: seen.append(words))
    assert invoke("verify", "--layout", "dp2", "-h")[0] == 0
    assert seen == [(sys.executable, [sys.executable, "-m", "ringfold.runtime.verify", "--layout", "dp2", "-h"])]


def test_checkpoint_becomes_the_module_with_all_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(cli.os, "execv", lambda *words: seen.append(words))
    assert invoke("checkpoint", "export", "run", "--to", "x", "-h")[0] == 0
    assert seen == [(sys.executable, [sys.executable, "-m", "ringfold.runtime.checkpoint", "export", "run", "--to", "x", "-h"])]
