"""What `ringfold run` refuses, and how it reads its words."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from ringfold.collectives.errors import ConfigError
from ringfold.launch import cli, run
from ringfold.launch.options import MAX_RANKS, RunOptions, Target, check_options


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("raise SystemExit('must not be started')")
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[RunOptions]:
    seen: list[RunOptions] = []
    monkeypatch.setattr(run, "run_job", lambda options: seen.append(options) or 0)
    return seen


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.ringfold, ["run", *arguments], catch_exceptions=False)
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-n", "0", "train.py"], "-n 0: expected a whole number of ranks, at least 1"),
        (["-n", "two", "train.py"], "-n two: expected a whole number of ranks"),
        (["-n", "-1", "train.py"], "-n -1: expected"),
        (["-n", "1.5", "train.py"], "-n 1.5: expected"),
        (["-n", "٢", "train.py"], "expected a whole number"),
        (["-n", str(MAX_RANKS + 1), "train.py"], f"expected at most {MAX_RANKS} ranks"),
        (["trian.py"], "no such script: trian.py; did you mean train.py?"),
        (["nowhere/train.py"], "there is no folder nowhere"),
        (["."], "is a folder without __main__.py"),
        ([sys.executable], f"to run an executable write -- {sys.executable}"),
        (["-n", "2"], "nothing to run"),
        (["-m"], "nothing to run"),
        (["--"], "nothing to run"),
        (["-m", "no_such_module"], "there is no module no_such_module"),
        (["-m", "ringfold.lanch"], "there is no module lanch in ringfold; did you mean launch?"),
        (["-m", "ringfold.launch"], "is a package without __main__.py"),
        (["-m", "ringfold.launch.cli.x"], "ringfold.launch.cli is a module, not a package"),
        (["-m", "train.py"], "train is a module, not a package"),
        (["-m", "./train.py"], "expected the dotted name of a module"),
        (["--", "no-such-program"], "no executable no-such-program on PATH"),
        (["--", "train.py"], "to run the one in this folder write ./train.py"),
        (["--", "./train.py"], "./train.py is not executable"),
        (["--timeout", "soon", "train.py"], "--timeout soon: expected a number of seconds above 0"),
        (["--timeout", "nan", "train.py"], "--timeout nan: expected"),
        (["--timeout", "0", "train.py"], "--timeout 0: expected"),
        (["--transport", "smh", "train.py"], "--transport smh: expected one of auto, shm, tcp; did you mean shm?"),
        (["--interface", "eth-77", "train.py"], "--interface eth-77: this host ("),
        (["--interface", "203.0.113.0/24", "train.py"], "no address in such a network"),
        (["--omp-threads", "0", "train.py"], "--omp-threads 0: expected a whole number of threads"),
        (["--log-dir", "train.py/logs", "train.py"], "train.py is a file, expected a folder"),
        (["--report", "nowhere/report.json", "train.py"], "there is no folder"),
        (["--report", ".", "train.py"], "is a folder, expected the name of a file"),
        (["-n", "4", "--layout", "dp3", "train.py"], "--layout"),
        (["--layout", "dp1 tq2", "train.py"], 'did you mean "tp2"?'),
    ],
)
def test_bad_input_is_one_clear_error_with_exit_code_2_and_starts_nothing(
    folder: Path, started: list[RunOptions], arguments: list[str], expected: str
) -> None:
    code, output = invoke(*arguments)
    assert code == 2
    assert expected in output
    assert output.count("Error:") == 1
    assert "Traceback" not in output
    assert not started
    assert [entry.name for entry in folder.iterdir()] == ["train.py"]


@pytest.mark.usefixtures("folder")
def test_all_problems_are_told_at_once(started: list[RunOptions]) -> None:
    code, output = invoke("-n", "two", "--layout", "dp1 tq2", "--timeout", "x", "--transport", "mpi", "--omp-threads", "no", "trian.py")
    assert code == 2
    assert output.startswith("Error: 6 problems, nothing was started:\n")
    for part in ("-n two", '"tq2"', "--timeout x", "--transport mpi", "--omp-threads no", "did you mean train.py?"):
        assert part in output
    assert not started


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "target"),
    [
        (["train.py", "-n", "5", "--help"], Target("script", "train.py", ("-n", "5", "--help"))),
        (["-n2", "train.py", "--", "x"], Target("script", "train.py", ("--", "x"))),
        (["--timeout=3", "-n", "2", "-m", "json.tool", "-n", "7"], Target("module", "json.tool", ("-n", "7"))),
        (["-mjson.tool", "--sort-keys"], Target("module", "json.tool", ("--sort-keys",))),
        (["-n", "2", "--", "sh", "-c", "exit 3", "-m"], Target("executable", "sh", ("-c", "exit 3", "-m"))),
    ],
)
def test_everything_after_the_script_belongs_to_the_script(started: list[RunOptions], arguments: list[str], target: Target) -> None:
    assert invoke(*arguments) == (0, "")
    assert started[0].target == target


@pytest.mark.usefixtures("folder")
def test_values_reach_the_job(started: list[RunOptions], folder: Path) -> None:
    words = ["-n", "3", "--layout", "dp3", "--timeout", "2.5", "--transport", "tcp", "--log-dir", "a/b", "--report", "r", "--omp-threads", "2"]
    assert invoke(*words, "train.py") == (0, "")
    assert started == [RunOptions(Target("script", "train.py"), 3, "dp3", 2.5, "tcp", None, folder / "a/b", folder / "r", 2)]


def test_an_unknown_option_before_the_script_is_refused_with_the_nearest(started: list[RunOptions]) -> None:
    code, output = invoke("--layot", "dp2", __file__)
    assert code == 2
    assert "--layout" in output
    assert not started


@pytest.mark.usefixtures("folder")
def test_looking_for_a_module_imports_no_package_on_the_way(folder: Path) -> None:
    package = folder / "loud"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "trainer.py").write_text("")
    assert check_options(Target("module", "loud.trainer")).world_size == 1
    with pytest.raises(ConfigError, match="did you mean trainer"):
        check_options(Target("module", "loud.trainr"))
    assert "loud" not in sys.modules
