"""Plots of results, from what --json writes. matplotlib is the extra `bench`; nothing else imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

__all__ = ["plot_scaling", "plot_sweep"]

# Sides of ringfold solid, other libraries dashed, the floor dotted: the same colours for all plots.
_COLOURS = {
    "registered": "#d62728",
    "unregistered": "#ff7f0e",
    "gloo": "#1f77b4",
    "openmpi": "#2ca02c",
    "mpich": "#9467bd",
    "oneccl": "#8c564b",
    "horovod": "#e377c2",
    "floor": "#333333",
}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise click.ClickException("--plot needs matplotlib: pip install 'ringfold[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_sweep(result: dict[str, Any], path: Path) -> None:
    """Draw time and bus bandwidth over sizes: a row of two panels for each number of ranks and dtype."""
    pyplot = _pyplot()
    rows = result["rows"]
    pairs = list(dict.fromkeys((row["ranks"], row["type"]) for row in rows))
    figure, axes = pyplot.subplots(len(pairs), 2, figsize=(13, 4.6 * len(pairs)), squeeze=False, layout="constrained")
    for (ranks, dtype), (left, right) in zip(pairs, axes, strict=True):
        mine = [row for row in rows if (row["ranks"], row["type"]) == (ranks, dtype)]
        for axis, key, label in ((left, "time_us", "time (us)"), (right, "busbw_GBps", "bus bandwidth (GB/s)")):
            for side in dict.fromkeys(row["side"] for row in mine):
                points = [(max(1, row["bytes"]), row[key]) for row in mine if row["side"] == side]
                base = side.split()[0]
                style = "-" if base in ("registered", "unregistered") else ":" if base == "floor" else "--"
                axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=side, color=_COLOURS.get(side))
            axis.set_xscale("log", base=2)
            axis.set_yscale("log" if key == "time_us" else "linear")
            axis.set_xlabel("bytes")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        left.set_title(f"{result['benchmark']}, {ranks} ranks, {dtype}: median of {result['rounds']} rounds")
        right.set_title(result["machine"], fontsize="small")
        left.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_scaling(result: dict[str, Any], path: Path) -> None:
    """Draw efficiency over ranks, weak and strong scaling side by side."""
    pyplot = _pyplot()
    kinds = list(dict.fromkeys(row["scaling"] for row in result["rows"]))
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(6.5 * len(kinds), 4.6), squeeze=False, layout="constrained")
    for kind, axis in zip(kinds, axes[0], strict=True):
        mine = [row for row in result["rows"] if row["scaling"] == kind]
        for side in dict.fromkeys(row["side"] for row in mine):
            points = [row for row in mine if row["side"] == side]
            ranks = [row["ranks"] for row in points]
            axis.plot(ranks, [row["efficiency"] for row in points], "--" if side == "alone" else "-", marker="o", label=side)
            axis.fill_between(ranks, [row["efficiency_low"] for row in points], [row["efficiency_high"] for row in points], alpha=0.15)
        axis.set_xlabel("ranks")
        axis.set_xticks(sorted({row["ranks"] for row in mine}))
        axis.set_ylabel("efficiency against one rank")
        axis.set_ylim(bottom=0)
        axis.set_title(f"{kind} scaling")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(result["machine"], fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
