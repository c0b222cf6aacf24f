"""all_reduce: time, bandwidth and correctness over sizes, in nccl-tests' columns, with torch's gloo measured in the same run.

    ringfold run -n 2 -m ringfold.benchmarks.all_reduce --min-bytes 4 --max-bytes 64M

Algorithm bandwidth is bytes / time. Bus bandwidth is that times 2 (n - 1) / n, the share of a vector that has to cross each rank's link in any
all-reduce, so it compares with what the hardware can do whatever n is.

Every timed call starts from refilled buffers and a barrier; its time is that of the slowest rank. The libraries take turns within each round.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import ringfold as rf
import torch
import torch.distributed as dist
from ringfold.benchmarks._driver import Nbytes, Spread, describe_run, gloo, slowest, summed, write_json
from torch import Tensor

DTYPES = ("float32", "float64", "float16", "bfloat16", "int32", "int64", "uint8")
REDUCTIONS = ("sum", "avg", "min", "max", "prod")
ROUND_S = 0.05  # what one library may spend on one size in one round, apart from refilling
FEWEST_CALLS, MOST_CALLS = 3, 200


@dataclass
class Side:
    """One library and kind of memory; `call` reduces `tensor` in place."""

    name: str
    memory: Tensor
    call: Callable[[Tensor], Any]
    rounds_s: list[float] = field(default_factory=list)
    wrong: int = 0


def make_sides(comm: rf.Communicator, dtype: torch.dtype, op: str, max_count: int, names: list[str], algorithm: str | None) -> list[Side]:
    def ours(tensor: Tensor) -> None:
        comm.all_reduce(tensor, op, algorithm=algorithm)

    def theirs(tensor: Tensor) -> None:
        if op == "avg":  # gloo has none
            dist.all_reduce(tensor)
            tensor.div_(comm.size, rounding_mode=None if tensor.is_floating_point() else "trunc")
        else:
            dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}.get(op, dist.ReduceOp.PRODUCT))

    sides = []
    for name in names:
        memory = comm.empty(max_count, dtype=dtype) if name == "registered" else torch.empty(max_count, dtype=dtype)
        sides.append(Side(name, memory, theirs if name == "gloo" else ours))
    return sides


def values(comm: rf.Communicator, dtype: torch.dtype, op: str, count: int) -> tuple[Tensor, Tensor]:
    """Return this rank's vector and the result: ones and twos in random places, so that up to 8 ranks stay exact in every dtype and op."""
    pattern = torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(count))
    everyone = torch.stack([1 + (pattern + rank) % 2 for rank in range(min(comm.size, 2))])  # ranks of the same parity hold the same
    often = torch.tensor([(comm.size + 1) // 2, comm.size // 2][: everyone.shape[0]])[:, None]
    if op == "prod":
        result = (everyone**often).prod(0)
    elif op in ("min", "max"):
        result = everyone.amin(0) if op == "min" else everyone.amax(0)
    else:
        result = (everyone * often).sum(0)
        if op == "avg":
            result = result / comm.size if dtype.is_floating_point else result // comm.size
    return everyone[comm.rank % 2].to(dtype), result.to(dtype)


def time_calls(comm: rf.Communicator, side: Side, own: Tensor, calls: int) -> list[float]:
    tensor, seconds = side.memory[: own.numel()], []
    for _ in range(calls):
        tensor.copy_(own)
        comm.barrier()
        start = time.perf_counter()
        side.call(tensor)
        seconds.append(time.perf_counter() - start)
    return slowest(comm, seconds)


def measure(comm: rf.Communicator, sides: list[Side], dtype: torch.dtype, op: str, count: int, rounds: int) -> None:
    """Fill in `rounds_s` (the median call of each round) and `wrong` of each side."""
    own, expected = values(comm, dtype, op, count)
    calls = []
    for side in sides:
        warm = sorted(time_calls(comm, side, own, FEWEST_CALLS))[FEWEST_CALLS // 2]
        calls.append(max(FEWEST_CALLS, min(MOST_CALLS, int(ROUND_S / warm))))  # the same on all ranks: `warm` is the slowest's
        side.rounds_s, side.wrong = [], 0
    for number in range(rounds):
        for i in range(len(sides)):
            at = (i + number) % len(sides)
            seconds = time_calls(comm, sides[at], own, calls[at])
            sides[at].rounds_s.append(Spread.of(seconds).median)
            wrong = sides[at].memory[:count] != expected
            sides[at].wrong += int(summed(comm, float(wrong.sum())))


HEADER = f"""\
#{"bytes":>11} {"count":>11} {"type":>9} {"op":>5} {"memory":>13} {"time":>10} {"spread":>7} {"algbw":>8} {"busbw":>8} {"#wrong":>7} {"x gloo":>7}
#{"":>11} {"":>11} {"":>9} {"":>5} {"":>13} {"(us)":>10} {"(%)":>7} {"(GB/s)":>8} {"(GB/s)":>8}"""


def rows_of(sides: list[Side], nbytes: int, count: int, dtype: str, op: str, size: int) -> list[dict[str, Any]]:
    baseline = next((Spread.of(side.rounds_s).median for side in sides if side.name == "gloo"), None)
    rows = []
    for side in sides:
        spread = Spread.of(side.rounds_s)
        algbw = nbytes / spread.median / 1e9
        rows.append(
            {
                "bytes": nbytes,
                "count": count,
                "type": dtype,
                "op": op,
                "memory": side.name,
                "time_us": spread.median * 1e6,
                "spread_percent": spread.percent,
                "rounds_us": [seconds * 1e6 for seconds in side.rounds_s],
                "algbw_GBps": algbw,
                "busbw_GBps": algbw * 2 * (size - 1) / size,
                "wrong": side.wrong,
                "times_gloo": baseline / spread.median if baseline else None,
            }
        )
    return rows


def line_of(row: dict[str, Any]) -> str:
    ratio = f"{row['times_gloo']:7.2f}" if row["times_gloo"] else f"{'-':>7}"
    return (
        f" {row['bytes']:>11} {row['count']:>11} {row['type']:>9} {row['op']:>5} {row['memory']:>13} {row['time_us']:>10.1f} "
        f"{row['spread_percent']:>7.1f} {row['algbw_GBps']:>8.2f} {row['busbw_GBps']:>8.2f} {row['wrong']:>7} {ratio}"
    )


def footer(rows: list[dict[str, Any]], run: dict[str, Any]) -> str:
    wrong = sum(row["wrong"] for row in rows)
    lines = [f"# Out of bounds values : {wrong} {'OK' if wrong == 0 else 'FAILED'}"]
    for name in dict.fromkeys(row["memory"] for row in rows):
        busbw = [row["busbw_GBps"] for row in rows if row["memory"] == name]
        lines.append(f"# Avg bus bandwidth    : {sum(busbw) / len(busbw):.3f} GB/s {name}")
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines += [
        f"# {run['machine']}",
        f"# {versions}; {run['ranks']} ranks over {run['transport']}, {run['threads_per_rank']} thread(s) each",
        f"# {run['command']}",
    ]
    return "\n".join(lines)


@click.command()
@click.option("--min-bytes", type=Nbytes(), default="4", show_default=True)
@click.option("--max-bytes", type=Nbytes(), default="64M", show_default=True)
@click.option("--factor", type=click.IntRange(2), default=4, show_default=True, help="From one size to the next.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--op", type=click.Choice(REDUCTIONS), default="sum", show_default=True)
@click.option("--algorithm", type=click.Choice(["auto", "ring", "direct"]), default="auto", show_default=True)
@click.option("--registered/--unregistered", default=None, help="Only that kind of memory.  [default: both]")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write all rounds there.")
@click.option("--no-gloo", is_flag=True, help="Leave torch's gloo out.")
def main(
    min_bytes: int,
    max_bytes: int,
    factor: int,
    dtype: str,
    op: str,
    algorithm: str,
    registered: bool | None,
    rounds: int,
    json_path: Path | None,
    no_gloo: bool,
) -> None:
    """Measure all_reduce over sizes from --min-bytes to --max-bytes, on the ranks this was started on."""
    element: torch.dtype = getattr(torch, dtype)
    if not element.itemsize <= min_bytes <= max_bytes:
        raise click.UsageError(f"--min-bytes {min_bytes} --max-bytes {max_bytes}: expected {element.itemsize} (one {dtype}) <= min <= max")
    comm = rf.init().world
    if op == "prod" and comm.size > 8:
        raise click.UsageError(f"--op prod: the check is exact for up to 8 ranks, and there are {comm.size}")
    kinds = ["registered", "unregistered"] if registered is None else ["registered" if registered else "unregistered"]
    names = [*kinds, "gloo"] if not no_gloo else kinds
    sides = make_sides(comm, element, op, max_bytes // element.itemsize, names, None if algorithm == "auto" else algorithm)
    show = click.echo if comm.rank == 0 else lambda _: None
    show(f"# all_reduce, {comm.size} ranks, algorithm {algorithm}\n{HEADER}")
    rows: list[dict[str, Any]] = []
    gc.disable()
    with nullcontext() if no_gloo else gloo(comm):
        nbytes = min_bytes
        while nbytes <= max_bytes:
            count = nbytes // element.itemsize
            measure(comm, sides, element, op, count, rounds)
            rows += rows_of(sides, count * element.itemsize, count, dtype, op, comm.size)
            for row in rows[-len(sides) :]:
                show(line_of(row))
            nbytes *= factor
    run = describe_run(comm)
    show(footer(rows, run))
    if json_path is not None and comm.rank == 0:
        write_json(json_path, {"benchmark": "all_reduce", **run, "algorithm": algorithm, "rows": rows})
    rf.shutdown()
    if any(row["wrong"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
