"""Fixtures of the whole suite: the fork server's life, the leak check, and what a `gpu` test needs."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: ranks share few cores, and a fold's threads would only wait

import pytest

from tests.harness.forkserver import close_server, server
from tests.harness.leaks import no_leaks

# Ranks that are made to fail write down their last operations; not among the user's files.
FLIGHTS = os.environ["RINGFOLD_FLIGHT_DIR"] = tempfile.mkdtemp(prefix="ringfold-flights-")

# A suite started by nohup, or in the background of a script, inherits ignored signals, and so would the launchers that it starts and interrupts.
for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL), (signal.SIGQUIT, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> Iterator[None]:
    """End the server (started by the first `run_ranks`) with the session."""
    yield
    close_server()


def pytest_unconfigure() -> None:
    shutil.rmtree(FLIGHTS, ignore_errors=True)


@pytest.fixture
def leaks() -> Iterator[None]:
    """Fail the test if it leaves descriptors, threads, mapped files, children or names in shared memory behind."""
    server()
    with no_leaks():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if any("gpu" in item.keywords for item in items):
        import torch

        if not torch.cuda.is_available():
            reason = pytest.mark.skip(reason="torch.cuda.is_available() is False: no CUDA device, or a build of torch for CPU")
            for item in items:
                if "gpu" in item.keywords:
                    item.add_marker(reason)
