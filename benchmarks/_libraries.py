"""The libraries that can be measured, and the command that starts the ranks of each.

MPI libraries overwrite each other's files, so each peer has a virtual environment of its own, `.venv-peers/NAME`, made by `make peers`. Peers see
the ringfold and torch of the environment that measures.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import ringfold
import torch

__all__ = ["LIBRARIES", "Library", "is_installed", "launch"]

PEERS = Path(__file__).resolve().parents[1] / ".venv-peers"


@dataclass(frozen=True)
class Library:
    """`side` is module:Class in ringfold.benchmarks.sides; `launcher` is mpirun with its options, or nothing for `ringfold run`."""

    side: str
    launcher: tuple[str, ...] = ()
    spins_when_idle: bool = False  # its threads run even when nobody asks for anything: it is stopped while others are measured
    environment: dict[str, str] = field(default_factory=dict)


_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # in containers one often is
_OPEN_MPI = ("mpirun", "--oversubscribe")

LIBRARIES = {
    "ringfold": Library("ringfold:Ringfold"),
    "gloo": Library("gloo:Gloo"),
    "floor": Library("floor:Floor"),
    "openmpi": Library("mpi:Mpi", _OPEN_MPI, environment=_AS_ROOT),
    "mpich": Library("mpi:Mpi", ("mpirun",)),
    "oneccl": Library("oneccl:OneCcl", ("mpirun",), environment={"CCL_LOG_LEVEL": "error"}),
    "horovod": Library("horovod:Horovod", _OPEN_MPI, spins_when_idle=True, environment=_AS_ROOT),
}


def is_installed(name: str) -> bool:
    """Tell whether the library's ranks can be started: ours always can, a peer if `make peers` made it."""
    return not LIBRARIES[name].launcher or (PEERS / name / "ready").exists()


def launch(name: str, size: int, arguments: list[str], transport: str = "auto") -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment that start `size` ranks of a library, each running `_rank` with `arguments`."""
    library = LIBRARIES[name]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RINGFOLD_")}
    module = ["-m", "ringfold.benchmarks._rank", library.side, *arguments]
    if not library.launcher:
        return [sys.executable, "-m", "ringfold", "run", "-n", str(size), "--transport", transport, *module], environment
    venv = PEERS / name
    paths = dict.fromkeys(str(Path(package.__file__ or "").parents[1]) for package in (ringfold, torch))
    environment |= {
        "PATH": f"{venv / 'bin'}{os.pathsep}{environment.get('PATH', os.defpath)}",
        "PYTHONPATH": os.pathsep.join(paths),
        "LD_LIBRARY_PATH": str(venv / "lib"),
        "I_MPI_ROOT": str(venv),  # Intel MPI, which oneCCL uses, looks for its parts there
        "FI_PROVIDER_PATH": str(venv / "lib"),
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // size)),  # as `ringfold run` does
    }
    command = [str(venv / "bin" / library.launcher[0]), *library.launcher[1:], "-n", str(size), str(venv / "bin" / "python"), *module]
    return command, environment | library.environment
