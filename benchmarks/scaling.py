"""Weak and strong scaling of a train step: efficiency over numbers of ranks, beside processes that do not communicate.

    ringfold bench scaling -n 1,2,4 --plot scaling.png
    ringfold bench scaling -n 2,4 --launcher "ringfold run -n {n} --hosts hosts.txt"

*Weak*: rows a rank stay the same. *Strong*: rows of all ranks together do. Efficiency is samples/s over n times the samples/s of one rank that
communicates with nobody, so the side `alone` shows what memory and cores shared by more processes cost by themselves, and its distance to the
others is the price of communication.

Each number of ranks is a job of train_step.py, which measures its sides in turns; the jobs take turns in rounds. All ranks of all jobs have the
same number of threads.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from ringfold.benchmarks._driver import Counts, Names, Spread, describe_machine, write_json
from ringfold.benchmarks._model import SIZES
from ringfold.benchmarks.train_step import DEFAULT_SIDES, SIDES

START_S = 120.0  # for a job to start and end, apart from its windows


def run_job(launcher: str, n: int, options: list[str], threads: int, limit_s: float) -> dict[str, float]:
    """Run train_step on `n` ranks and return the samples/s of each side."""
    command = [*shlex.split(launcher.replace("{n}", str(n))), "-m", "ringfold.benchmarks.train_step", *options]
    if command[0] == "ringfold":
        command[:1] = [sys.executable, "-m", "ringfold"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        with subprocess.Popen(
            [*command, "--json", str(path)],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as job:
            try:
                output = job.communicate(timeout=limit_s)[0]
            except BaseException:  # also Ctrl-C: `ringfold run` passes this on to its ranks
                job.terminate()
                raise
        if job.returncode != 0:
            raise click.ClickException(f"{shlex.join(command)} ended with exit code {job.returncode}:\n{output[-2000:]}")
        return {row["side"]: row["samples_per_s"] for row in json.loads(path.read_text())["rows"]}


def rows_of(scaling: str, per_rank: dict[int, int], rounds: list[dict[int, dict[str, float]]]) -> list[dict[str, Any]]:
    """Return a row for each number of ranks and side; each round is compared with the lone rank of the same round."""
    rows = []
    for n in per_rank:
        for side in rounds[0][n]:
            speed = Spread.of([one[n][side] for one in rounds])
            efficiency = Spread.of([one[n][side] / (n * one[1]["alone"]) for one in rounds])
            rows.append(
                {
                    "scaling": scaling,
                    "ranks": n,
                    "rows_a_rank": per_rank[n],
                    "side": side,
                    "samples_per_s": speed.median,
                    "rounds": [one[n][side] for one in rounds],
                    "efficiency": efficiency.median,
                    "efficiency_low": efficiency.low,
                    "efficiency_high": efficiency.high,
                    "share_of_alone": Spread.of([one[n][side] / one[n]["alone"] for one in rounds]).median,
                }
            )
    return rows


HEADER = """\
| scaling | ranks | rows a rank | side | samples/s | efficiency (lowest to highest) | of alone |
|---|---|---|---|---|---|---|"""


def line_of(row: dict[str, Any]) -> str:
    return (
        f"| {row['scaling']} | {row['ranks']} | {row['rows_a_rank']} | {row['side']} | {row['samples_per_s']:.2f} "
        f"| {row['efficiency']:.3f} ({row['efficiency_low']:.3f} to {row['efficiency_high']:.3f}) | {row['share_of_alone']:.3f} |"
    )


@click.command()
@click.option("-n", "--ranks", type=Counts(), default="2", show_default=True, help="Numbers of ranks, such as 2,4; 1 is always among them.")
@click.option("--rows", type=click.IntRange(1), default=4, show_default=True, help="Rows a rank; in strong scaling, at the most ranks.")
@click.option("--tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--kinds", type=Names(("weak", "strong")), default="weak,strong", show_default=True)
@click.option("--sides", "names", type=Names(SIDES), default=DEFAULT_SIDES, show_default=True, help="ddp and alone are always among them.")
@click.option("--size", type=click.Choice(list(SIZES)), default="10M", show_default=True, help="Parameters of the model.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--window-s", type=click.FloatRange(0, min_open=True), default=5.0, show_default=True, help="Seconds of a window of each side.")
@click.option("--launcher", default="ringfold run -n {n}", show_default=True, help="Starts a module on {n} ranks, also of several hosts.")
@click.option("--quick", is_flag=True, help="A smoke run: the tiny model, 1 round, windows of 0.1 s. Its numbers mean nothing.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write all rounds there.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path, dir_okay=False), help="Draw efficiency there (.png, .svg).")
def main(
    ranks: list[int],
    rows: int,
    tokens: int,
    kinds: list[str],
    names: list[str],
    size: str,
    rounds: int,
    window_s: float,
    launcher: str,
    quick: bool,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Measure how the speed of a train step grows with the number of ranks."""
    if quick:
        size, rounds, window_s = "tiny", 1, 0.1
    ranks = sorted({1, *ranks})
    most = max(ranks)
    if "strong" in kinds and (uneven := [n for n in ranks if rows * most % n]):
        raise click.UsageError(f"--rows {rows}: strong scaling has {rows * most} rows in all, which {uneven[0]} ranks cannot share evenly")
    threads = max(1, len(os.sched_getaffinity(0)) // most)
    machine = {**describe_machine(), "threads_per_rank": threads, "size": size, "tokens": tokens, "window_s": window_s, "launcher": launcher}
    found = []
    click.echo(HEADER)
    for kind in kinds:
        per_rank = {n: rows if kind == "weak" else rows * most // n for n in ranks}
        measured: list[dict[int, dict[str, float]]] = []
        for number in range(rounds):
            measured.append({})
            for i in range(len(ranks)):
                n = ranks[(i + number) % len(ranks)]
                shape = f"{per_rank[n]}x{tokens}"
                options = ["--shape", shape, "--sides", ",".join(names), "--size", size, "--pairs", "1", "--window-s", str(window_s)]
                measured[-1][n] = run_job(launcher, n, options, threads, START_S + 60 * window_s)
        for row in rows_of(kind, per_rank, measured):
            found.append(row)
            click.echo(line_of(row))
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    click.echo(f"\n{machine['machine']}; {versions}; {threads} thread(s) a rank; model {size}; {rounds} rounds of {window_s} s\n{machine['command']}")
    result = {"benchmark": "scaling", **machine, "rounds": rounds, "rows": found}
    if json_path is not None:
        write_json(json_path, result)
    if plot_path is not None:
        from ringfold.benchmarks._plot import plot_scaling

        plot_scaling(result, plot_path)


if __name__ == "__main__":
    main()
