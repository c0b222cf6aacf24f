"""torch's own tests of process groups, with 3 ranks over our backend: what gloo passes, and all_to_all, which gloo has in part only.

gloo_passes.txt: the 90 of torch 2.13's 285 that gloo passes on a machine without GPUs; it skips the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# They ask whether the backend is called gloo, or call monitored_barrier, which torch refuses to every other.
OF_GLOO_ALONE = {
    "test_get_backend",
    "test_monitored_barrier_gloo",
    "test_monitored_barrier_gloo_rank_0_timeout",
    "test_monitored_barrier_gloo_subgroup",
}
PASSED_BY_GLOO = sorted(set((Path(__file__).parent / "gloo_passes.txt").read_text().split()) - OF_GLOO_ALONE)
ALL_TO_ALL = [
    f"test_all_to_all{form}"
    for form in (
        *("", "_complex", "_full_group", "_group"),
        *(f"_single_{split}_split{case}" for split in ("equal", "unequal") for case in ("", "_complex", "_full_group", "_group")),
    )
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run_suite(gate: str, names: list[str], transport: str, folder: Path) -> dict[str, tuple[str, str]]:
    """Run the tests in a process of their own: what the suite does to torch cannot be undone."""
    report = folder / f"{gate}-{transport}.json"
    environ = {**os.environ, "RINGFOLD_TRANSPORT": transport, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.conformance.driver", gate, str(report), *names]
    with (folder / "output.txt").open("w+") as output:
        status = subprocess.run(command, cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT, timeout=580).returncode
        output.seek(0)
        assert status == 0, output.read()[-4000:]
    outcomes: dict[str, tuple[str, str]] = json.loads(report.read_text())
    return outcomes


@pytest.fixture(scope="module", params=["shm", "tcp"])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("suite")
    return run_suite("gloo", PASSED_BY_GLOO, request.param, folder) | run_suite("mpi", ALL_TO_ALL, request.param, folder)


@pytest.mark.parametrize("name", [*PASSED_BY_GLOO, *ALL_TO_ALL])
def test_torchs_own_test_passes(outcomes: dict[str, tuple[str, str]], name: str) -> None:
    status, why = outcomes[name]
    assert status == "passed", why
