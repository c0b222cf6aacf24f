"""What every benchmark shares: the machine's description, torch's gloo on the same ranks, times that count the slowest rank, spread, JSON.

The rules that a result keeps are in README.md beside this file. Nothing here measures anything.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import ringfold
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

if TYPE_CHECKING:
    from ringfold import Communicator

__all__ = ["Counts", "Names", "Nbytes", "Spread", "describe_machine", "describe_run", "gloo", "run_on_ranks", "slowest", "summed", "write_json"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Spread:
    """The median of a few measurements and how far they lie from it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    @property
    def percent(self) -> float:
        """Half the distance from lowest to highest, in percent of the median."""
        return 50 * (self.high - self.low) / self.median if self.median else 0.0


class Nbytes(click.ParamType[int]):
    """A size in bytes: 4, 64K, 16M or 1GiB (always powers of 1024)."""

    name = "nbytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)\s*([KMG]?)(?:i?B)?", value, re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is no size: write 4, 64K, 16M or 1G", param, ctx)
        return int(match[1]) * _UNITS[match[2].upper()]


class Names(click.ParamType[list[str]]):
    """Words with commas between them, out of a fixed set."""

    name = "names"

    def __init__(self, known: tuple[str, ...]) -> None:
        self.known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        if isinstance(value, list):
            return value
        words = [word.strip() for word in value.split(",") if word.strip()]
        for word in words:
            if word not in self.known:
                self.fail(f"{word!r} is none of {', '.join(self.known)}", param, ctx)
        return words


class Counts(click.ParamType[list[int]]):
    """Numbers of ranks with commas between them."""

    name = "counts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        words = value.split(",")
        if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
            self.fail(f"{value!r}: write a number of ranks, or several as 2,4", param, ctx)
        return [int(word) for word in words]


@contextmanager
def gloo(comm: Communicator) -> Iterator[None]:
    """Hold torch's default process group over gloo on the same ranks, through a store on loopback at a free port."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one host: else gloo resolves the host's name, which may lead anywhere
    server = TCPStore("127.0.0.1", 0, comm.size, is_master=True, wait_for_workers=False) if comm.rank == 0 else None
    port = comm.broadcast_object(server.port if server is not None else None)
    store = server or TCPStore("127.0.0.1", port, comm.size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    try:
        yield
        comm.barrier()  # the store's server ends with rank 0, so rank 0 must not be the first to go
    finally:
        dist.destroy_process_group()


def run_on_ranks(module: str, n: int) -> NoReturn:
    """Become `ringfold run` of this module on `n` ranks, with all its own options but `-n`."""
    options = sys.argv[1:]
    at = next(i for i, word in enumerate(options) if word.startswith("-n"))
    del options[at : at + (2 if options[at] == "-n" else 1)]
    os.execv(sys.executable, [sys.executable, "-m", "ringfold", "run", "-n", str(n), "-m", module, *options])


def slowest(comm: Communicator, seconds: Sequence[float]) -> list[float]:
    """Return the elementwise maximum over ranks: an operation has ended when it has ended everywhere."""
    times = torch.tensor(seconds, dtype=torch.float64)
    comm.all_reduce(times, "max")
    return list(times.tolist())


def summed(comm: Communicator, value: float) -> float:
    """Return the sum over ranks."""
    total = torch.tensor([value], dtype=torch.float64)
    comm.all_reduce(total)
    return float(total.item())


def describe_machine() -> dict[str, Any]:
    """Say on which machine, with which versions, and by which command."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores, {_memory_gib()} GiB, {_gpus()}Linux {platform.release()}",
        "versions": {"ringfold": ringfold.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def describe_run(comm: Communicator) -> dict[str, Any]:
    """Say the same of the ranks of one job, which run a module."""
    return {
        **describe_machine(),
        "ranks": comm.size,
        "transport": comm.transport,
        "threads_per_rank": torch.get_num_threads(),
        "command": f"ringfold run -n {comm.size} {shlex.join(sys.orig_argv[1:])}",
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpus() -> str:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return "".join(f"{names.count(name)} x {name}, " for name in dict.fromkeys(names))


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
