"""Start ranks with a real mpirun: which MPI libraries there are, and what became of each rank.

A rank is `python -m tests.mpi.rank MODULE FUNCTION ARGUMENTS FOLDER`; it joins the job as a script would and leaves its answer, or its error, as
FOLDER/RANK.json. Open MPI 5 and MPICH are PyPI's, each in an environment of its own (`make mpi`); Open MPI 4 is Debian's.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEBIAN = "/usr/bin/mpirun.openmpi"
NAMES = ("openmpi", "mpich", "debian")


def libraries(*quick: str) -> pytest.MarkDecorator:
    """Return the mark that runs a test with each library, all but those named in the full suite only: a job takes seconds to start."""
    return pytest.mark.parametrize("mpi", [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in NAMES], indirect=True)


@dataclass(frozen=True)
class Mpi:
    """An MPI library: its mpirun, with what it needs here, and a Python that finds it."""

    name: str
    mpirun: tuple[str, ...]
    python: str
    env: Mapping[str, str]
    keeps_survivors: tuple[str, ...]  # options with which the death of one rank does not end the others at once


# Without a terminal, as root perhaps, with more ranks than cores, and with no other host to look for.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_ALLOW_RUN_AS_ROOT": "1",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


def find(name: str) -> Mpi | str:
    """Return the library of that name, or why it cannot be used."""
    if name == "debian":
        if shutil.which(DEBIAN) is None:
            return f"{DEBIAN} is not installed: apt-get install openmpi-bin"
        env = OPEN_MPI | {"MPI4PY_LIBMPI": "libmpi.so.40"}
        return Mpi(name, (DEBIAN, "--oversubscribe"), sys.executable, env, ("--enable-recovery",))
    folder = ROOT / ".venv-mpi" / name
    if not (folder / "bin" / "mpirun").exists():
        return f"{folder} is not there: make mpi"
    mpirun, python = str(folder / "bin" / "mpirun"), str(folder / "bin" / "python")
    if name == "openmpi":
        return Mpi(name, (mpirun, "--oversubscribe"), python, OPEN_MPI, ("--enable-recovery",))
    return Mpi(name, (mpirun,), python, {}, ())


@dataclass
class Finished:
    """What a job left: each rank's answer (None: it left none), mpirun's exit status, output and how long it took."""

    answers: list[Any]
    status: int
    output: str
    seconds: float


def mpirun(
    mpi: Mpi,
    size: int,
    function: Callable[..., Any],
    *args: Any,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 100.0,
    options: tuple[str, ...] = (),
) -> Finished:
    """Run `function(*args)`, of the top of a test module, on `size` ranks and wait for them."""
    drop = ("RINGFOLD_", "OMPI_", "PMI", "PRTE_", "SLURM_")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
    environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RINGFOLD_TRANSPORT": "mpi", "RINGFOLD_TIMEOUT_S": "60", **mpi.env, **(env or {})}
    with tempfile.TemporaryDirectory(prefix="ringfold-mpi-") as folder:
        environ["RINGFOLD_FLIGHT_DIR"] = folder
        program = [mpi.python, "-m", "tests.mpi.rank", function.__module__, function.__qualname__, json.dumps(args), folder]
        command = [*mpi.mpirun, *options, "-n", str(size), *program]
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"{' '.join(command)} did not end within {timeout_s} s:\n{output}") from None
        seconds = time.monotonic() - began
        files = [Path(folder, f"{rank}.json") for rank in range(size)]
        answers = [json.loads(file.read_text()) if file.exists() else None for file in files]
        return Finished(answers, process.returncode, output, seconds)
