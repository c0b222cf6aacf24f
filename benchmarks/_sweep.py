"""The driver of every operation's benchmark: a sweep in nccl-tests' columns, all sides in interleaved rounds of one run.

Each library has its own group of ranks (_group.py), also ringfold and gloo. While one group is measured, the others are blocked in a read.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from ringfold.benchmarks._driver import Counts, Names, Nbytes, Spread, describe_machine, write_json
from ringfold.benchmarks._group import Group, GroupFailed
from ringfold.benchmarks._libraries import LIBRARIES, is_installed
from ringfold.benchmarks._operations import DTYPES, MOST_RANKS_OF_PROD, OPERATIONS, REDUCTIONS
from ringfold.collectives.codes import ALGORITHMS

__all__ = ["command"]

ROUND_S = 0.05  # what one side may spend on one size in one round, apart from refilling
FEWEST_CALLS, MOST_CALLS = 3, 200
OURS = ("registered", "unregistered")
PEERS = tuple(name for name in LIBRARIES if name not in ("ringfold", "floor"))
SIDES = (*OURS, "floor", *PEERS)


@dataclass
class Side:
    """A kind of ringfold's memory with an algorithm and a transport, or another library."""

    name: str
    group: Group
    memory: str = ""
    algorithm: str = "auto"
    calls: int = 0
    rounds_s: list[float] = field(default_factory=list)
    wrong: int = 0


@dataclass(frozen=True)
class Point:
    """One size of one operation, dtype and reduction, on some ranks."""

    operation: str
    size: int
    count: int
    dtype: str
    reduction: str

    @property
    def nbytes(self) -> int:
        element: torch.dtype = getattr(torch, self.dtype)
        return self.count * element.itemsize if OPERATIONS[self.operation].moves else 0


class Sweep:
    """Groups of ranks of one size, their sides, and what has become of those that failed."""

    def __init__(self, size: int, max_nbytes: int, timeout_s: float, device: str) -> None:
        self.size, self.max_nbytes, self.timeout_s, self.device = size, max_nbytes, timeout_s, device
        self.sides: list[Side] = []
        self.failures: list[str] = []
        self.versions: dict[str, str] = {}
        self._closing = ExitStack()

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def add(self, library: str, transport: str = "auto") -> Group | None:
        """Start a group; one that does not start is a failure of the run, not the end of it."""
        try:
            group = self._closing.enter_context(Group(library, self.size, self.max_nbytes, self.timeout_s, transport))
        except GroupFailed as failure:
            self.failures.append(str(failure))
            return None
        self.versions[library] = group.version
        return group

    def measure(self, point: Point, rounds: int) -> list[Side]:
        """Return the sides that can do this, with their rounds."""
        # A group that fails takes its other sides along.
        measured = [side for side in list(self.sides) if side in self.sides and self._prepare(side, point)]
        for number in range(rounds):
            for i in range(len(measured)):
                side = measured[(i + number) % len(measured)]
                if side in self.sides:
                    self._round(side)
        for side in measured:
            if side in self.sides:
                self._ask(side, {"do": "forget", "case": side.name})
        return [side for side in measured if side in self.sides]

    def _prepare(self, side: Side, point: Point) -> bool:
        request: dict[str, Any] = {"do": "prepare", "case": side.name, "memory": side.memory, "algorithm": side.algorithm}
        request |= {"device": self.device, "operation": point.operation, "count": point.count, "dtype": point.dtype, "reduction": point.reduction}
        replies = self._ask(side, request)
        if replies is None or any("unsupported" in reply for reply in replies):
            return False
        side.calls, side.rounds_s, side.wrong = FEWEST_CALLS, [], 0
        self._round(side)
        if not side.rounds_s:
            return False
        side.calls = max(FEWEST_CALLS, min(MOST_CALLS, int(ROUND_S / side.rounds_s.pop())))
        return True

    def _round(self, side: Side) -> None:
        replies = self._ask(side, {"do": "round", "case": side.name, "calls": side.calls})
        if replies is not None:
            slowest = [max(times) for times in zip(*[reply["seconds"] for reply in replies], strict=True)]
            side.rounds_s.append(Spread.of(slowest).median)
            side.wrong += sum(reply["wrong"] for reply in replies)

    def _ask(self, side: Side, request: dict[str, Any]) -> list[dict[str, Any]] | None:
        """Return the replies, or None if the side's group has failed: then it and its sides are out."""
        try:
            return side.group.ask(request)
        except GroupFailed as failure:
            self.failures.append(str(failure))
            side.group.close()
            self.sides = [other for other in self.sides if other.group is not side.group]
            return None


_COLUMNS = ("bytes", "count", "type", "op", "side", "time", "spread", "algbw", "busbw", "#wrong", "x gloo", "x best")
_UNITS = ("", "", "", "", "", "(us)", "(%)", "(GB/s)", "(GB/s)", "", "", "")
_WIDTHS = (11, 11, 9, 5, 24, 10, 7, 8, 8, 9, 7, 7)
HEADER = "\n".join("#" + " ".join(f"{word:>{width}}" for word, width in zip(words, _WIDTHS, strict=True)).rstrip() for words in (_COLUMNS, _UNITS))


def rows_of(point: Point, sides: list[Side]) -> list[dict[str, Any]]:
    operation = OPERATIONS[point.operation]
    medians = {side.name: Spread.of(side.rounds_s).median for side in sides}
    best = min((median for name, median in medians.items() if name in PEERS), default=None)
    rows = []
    for side in sides:
        spread = Spread.of(side.rounds_s)
        algbw = point.nbytes / spread.median / 1e9
        rows.append(
            {
                "ranks": point.size,
                "bytes": point.nbytes,
                "count": point.count if operation.moves else 0,
                "type": point.dtype if operation.moves else "none",
                "op": point.reduction if operation.reduces else "none",
                "side": side.name,
                "time_us": spread.median * 1e6,
                "spread_percent": spread.percent,
                "rounds_us": [seconds * 1e6 for seconds in side.rounds_s],
                "calls": side.calls,
                "algbw_GBps": algbw,
                "busbw_GBps": algbw * operation.bus_factor(point.size),
                "wrong": side.wrong,
                "times_gloo": medians["gloo"] / spread.median if "gloo" in medians else None,
                "times_best_peer": best / spread.median if best is not None else None,
            }
        )
    return rows


def line_of(row: dict[str, Any]) -> str:
    times = (f"{row[key]:.2f}" if row[key] else "-" for key in ("times_gloo", "times_best_peer"))
    rates = (f"{row['time_us']:.1f}", f"{row['spread_percent']:.1f}", f"{row['algbw_GBps']:.2f}", f"{row['busbw_GBps']:.2f}")
    cells = (row["bytes"], row["count"], row["type"], row["op"], row["side"], *rates, row["wrong"], *times)
    return " " + " ".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


def footer(rows: list[dict[str, Any]], failures: list[str], missing: list[str], run: dict[str, Any]) -> str:
    wrong = sum(row["wrong"] for row in rows)
    lines = [f"# Out of bounds values : {wrong} {'OK' if wrong == 0 else 'FAILED'}"]
    for name in dict.fromkeys(row["side"] for row in rows):
        busbw = [row["busbw_GBps"] for row in rows if row["side"] == name]
        lines.append(f"# Avg bus bandwidth    : {sum(busbw) / len(busbw):.3f} GB/s {name}")
    lines += [f"# Not installed        : {name} (make peers)" for name in missing]
    for failure in failures:
        lines.append("# Failed               : " + failure.replace("\n", "\n#   "))
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return "\n".join([*lines, f"# {run['machine']}", f"# {versions}; {run['threads_per_rank']} thread(s) a rank", f"# {run['command']}"])


def start_sides(sweep: Sweep, names: list[str], algorithms: list[str], transports: list[str]) -> None:
    """Start the groups that `names` needs; sides of ringfold come in every algorithm and transport."""
    for transport in transports if set(names) & set(OURS) else []:
        group = sweep.add("ringfold", transport)
        for memory in (name for name in OURS if name in names and group is not None):
            for algorithm in algorithms:
                label = " ".join([memory, *(word for word in (algorithm, transport) if word != "auto")])
                sweep.sides.append(Side(label, group, memory, algorithm))  # type: ignore[arg-type]
    for name in (name for name in SIDES if name in names and name not in OURS):
        group = sweep.add(name)
        if group is not None:
            sweep.sides.append(Side(name, group))


def sizes(begin: int, end: int, factor: int) -> list[int]:
    found = [begin]
    while found[-1] * factor <= end:
        found.append(found[-1] * factor)
    return found


def points(operation: str, size: int, dtype: str, reduction: str, nbytes: list[int]) -> list[Point]:
    """Return the points of a sweep: counts are multiples of the number of ranks, and at least that, where the vector is split."""
    if not OPERATIONS[operation].moves:
        return [Point(operation, size, size, dtype, reduction)]
    element: torch.dtype = getattr(torch, dtype)
    unit = size if OPERATIONS[operation].splits else 1
    return [Point(operation, size, max(1, n // element.itemsize // unit) * unit, dtype, reduction) for n in nbytes]


def default_sides(operation: str, reduction: str) -> tuple[list[str], list[str]]:
    """Return what can be measured, and the peers that are not installed."""
    names = [name for name in SIDES if name in OURS or is_installed(name)]
    if operation != "all_reduce" or reduction != "sum":
        names.remove("floor")
    return names, [name for name in PEERS if not is_installed(name)]


def _end(number: int, _: object) -> None:
    sys.exit(128 + number)  # unwinds, so every group is ended


def command(operation: str) -> click.Command:
    """Return the command that measures `operation`."""

    def run(
        ranks: list[int],
        begin: int,
        end: int,
        factor: int,
        dtypes: list[str],
        reduction: str,
        algorithms: list[str],
        transports: list[str],
        names: list[str] | None,
        rounds: int,
        timeout_s: float,
        device: str,
        json_path: Path | None,
        plot_path: Path | None,
    ) -> None:
        if not begin <= end:
            raise click.UsageError(f"--begin {begin} --end {end}: expected begin <= end")
        if reduction == "prod" and max(ranks) > MOST_RANKS_OF_PROD:
            raise click.UsageError(f"--op prod: the check is exact for up to {MOST_RANKS_OF_PROD} ranks, and there are {max(ranks)}")
        if device == "cuda" and not torch.cuda.is_available():
            raise click.UsageError(f"--device cuda: torch {torch.__version__} finds no CUDA device; `ringfold doctor` says what is there")
        chosen, missing = default_sides(operation, reduction) if device == "cpu" else (["unregistered", "gloo"], [])
        if names is not None:
            chosen, missing = [name for name in names if name not in missing], [name for name in names if name in missing]
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _end)
        rows: list[dict[str, Any]] = []
        failures: list[str] = []
        machine = describe_machine()
        for size in ranks:
            click.echo(f"# {operation}, {size} ranks\n{HEADER}")
            with Sweep(size, max(end, 64) * 2, timeout_s, device) as sweep:
                start_sides(sweep, chosen, algorithms, transports)
                for dtype in dtypes if OPERATIONS[operation].moves else dtypes[:1]:
                    for point in points(operation, size, dtype, reduction, sizes(begin, end, factor)):
                        new = rows_of(point, sweep.measure(point, rounds))
                        rows += new
                        for row in new:
                            click.echo(line_of(row))
                failures += sweep.failures
                machine["versions"] |= sweep.versions
                machine["threads_per_rank"] = next((side.group.threads for side in sweep.sides), None)
        click.echo(footer(rows, failures, missing, machine))
        result = {"benchmark": operation, **machine, "rounds": rounds, "failures": failures, "not_installed": missing, "rows": rows}
        if json_path is not None:
            write_json(json_path, result)
        if plot_path is not None:
            from ringfold.benchmarks._plot import plot_sweep

            plot_sweep(result, plot_path)
        if failures or any(row["wrong"] for row in rows):
            raise SystemExit(1)

    options: list[Callable[[Any], Any]] = [
        click.option("-n", "--ranks", type=Counts(), default="2", show_default=True, help="Numbers of ranks, such as 2,4."),
        click.option("--begin", type=Nbytes(), default="4", show_default=True, help="Smallest size."),
        click.option("--end", type=Nbytes(), default="64M", show_default=True, help="Largest size."),
        click.option("--factor", type=click.IntRange(2), default=4, show_default=True, help="From one size to the next."),
        click.option("--dtype", "dtypes", type=Names(DTYPES), default="float32", show_default=True, help="One, or several as float32,int8."),
        click.option("--op", "reduction", type=click.Choice(REDUCTIONS), default="sum", show_default=True),
        click.option("--algorithm", "algorithms", type=Names(("auto", *ALGORITHMS)), default="auto", show_default=True, help="ringfold's."),
        click.option("--transport", "transports", type=Names(("auto", "shm", "tcp")), default="auto", show_default=True, help="ringfold's."),
        click.option("--sides", "names", type=Names(SIDES), help=f"Out of {', '.join(SIDES)}.  [default: what is installed]"),
        click.option("--rounds", type=click.IntRange(1), default=5, show_default=True),
        click.option("--timeout", "timeout_s", type=click.FloatRange(1), default=60.0, show_default=True, help="Seconds for a round of a side."),
        click.option("--device", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True, help="Where the tensors are."),
        click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write all rounds there."),
        click.option("--plot", "plot_path", type=click.Path(path_type=Path, dir_okay=False), help="Draw time and bus bandwidth there (.png, .svg)."),
    ]
    for option in reversed(options):
        run = option(run)
    return click.command(name=operation, help=f"Measure {operation} over sizes, ringfold beside what else is installed.")(run)
