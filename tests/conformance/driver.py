"""Run tests of the suite that the torch wheel brings for its own process groups, on a backend that it does not know (test_torch_suite.py runs this).

    python -m tests.conformance.driver GATE REPORT NAME...      world of 3; writes {name: [status, why]} as JSON to REPORT

The suite reads the backend's name from BACKEND when it is imported, and skips what that backend cannot. So it is told GATE ("gloo" opens the tests on
CPU, "mpi" those of all_to_all), and only the one call that makes its process group is given our name instead.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import unittest
from pathlib import Path
from types import TracebackType
from typing import Any

WORLD_SIZE = 3
TIMEOUT_S = 60
Problem = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]


class Report(unittest.TestResult):
    """Status and reason of each test, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: dict[str, tuple[str, str]] = {}

    def _note(self, test: Any, status: str, why: str = "") -> None:
        self.outcomes[test._testMethodName] = (status, why)

    def addSuccess(self, test: unittest.TestCase) -> None:
        self._note(test, "passed")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self._note(test, "skipped", reason)

    def addError(self, test: unittest.TestCase, err: Problem) -> None:
        self._note(test, "failed", self._exc_info_to_string(err, test))  # type: ignore[attr-defined]

    addFailure = addError


def suite(gate: str, folder: str) -> Any:
    """Import torch's suite as if for the backend `gate`, and return its test case, whose groups are ours."""
    for name in ("barrier", "init_dir"):
        Path(folder, name).mkdir()
    os.environ |= {
        "BACKEND": gate,
        "WORLD_SIZE": str(WORLD_SIZE),
        "TEMP_DIR": folder,
        "INIT_METHOD": f"file://{folder}/init_dir/shared_init_file",
        "DISTRIBUTED_TESTS_DEFAULT_TIMEOUT": str(TIMEOUT_S),
        "CUDA_VISIBLE_DEVICES": "",
    }
    import torch
    import torch.distributed as dist
    from ringfold.collectives.process_group import BACKEND

    torch.set_num_threads(1)
    make_group = dist.init_process_group

    def make_ours(*args: Any, backend: str | None = None, **options: Any) -> None:
        make_group(*args, backend=BACKEND if backend == gate else backend, **options)

    dist.init_process_group = make_ours
    from torch.testing._internal.distributed import distributed_test

    class TorchSuite(distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase):  # type: ignore[misc]
        def setUp(self) -> None:
            super().setUp()
            self._start_processes(torch.multiprocessing.get_context("fork").Process)

    return TorchSuite


def main(gate: str, report: str, names: list[str]) -> None:
    results = Report()
    with tempfile.TemporaryDirectory() as folder:
        case = suite(gate, folder)
        for name in names:
            began = time.monotonic()
            unittest.TestSuite([case(name)]).run(results)
            print(f"{results.outcomes[name][0]:8s}{time.monotonic() - began:6.1f} s  {name}", flush=True)
    Path(report).write_text(json.dumps(results.outcomes))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
