"""A schedule as a picture: a line for each rank, time to the right; as text, or with matplotlib."""

from __future__ import annotations

import math
from pathlib import Path

from ringfold.parallel.pipeline.simulation import Simulation

__all__ = ["draw_png", "draw_text"]

COLOURS = {"F": "#4c78a8", "I": "#f58518", "W": "#54a24b", "B": "#e45756"}


def draw_text(simulation: Simulation, unit: float = 1.0) -> str:
    """Return a line for each rank, a cell of one width for each `unit` of time: kind and microbatch, with a mark for stages after the first.

    The 1f1b of two ranks, whose backward takes two units:

        rank 0  F0 F1 .. .. B0 B0 F2 B1 B1 ...
    """
    schedule = simulation.schedule
    width = 1 + len(str(schedule.micro - 1)) + (len(schedule.ranks) > schedule.size)
    lines = []
    for rank, of_rank in enumerate(simulation.times):
        stages = schedule.stages_of(rank)
        cells = ["." * width] * math.ceil(simulation.makespan / unit - 1e-9)
        for step, (start, end) in of_rank.items():
            mark = "'" * stages.index(step.stage) if len(stages) <= 2 else "abcdefgh"[stages.index(step.stage) % 8]
            for cell in range(round(start / unit), max(round(start / unit) + 1, round(end / unit))):
                cells[cell] = f"{step.kind}{step.micro}{mark}".ljust(width)
        lines.append(f"rank {rank}  {' '.join(cells)}".rstrip())
    bubble = f"{simulation.bubble:.1%} of the time of the longest rank is idle"
    return "\n".join([*lines, f"{bubble}; ranks hold at most {', '.join(map(str, simulation.peaks))} activations"])


def draw_png(simulation: Simulation, path: Path) -> None:
    """Draw the same with matplotlib, which the extra `bench` has. Raises: ImportError: it is not there."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    schedule = simulation.schedule
    figure = Figure(figsize=(min(24.0, 2.0 + 0.28 * simulation.makespan), 0.6 + 0.5 * schedule.size))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for rank, of_rank in enumerate(simulation.times):
        stages = schedule.stages_of(rank)
        for step, (start, end) in of_rank.items():
            faded = 1.0 - 0.45 * stages.index(step.stage) / max(1, len(stages) - 1)
            axes.barh(rank, end - start, left=start, color=COLOURS[step.kind], alpha=faded, edgecolor="white")
            axes.text((start + end) / 2, rank, str(step.micro), ha="center", va="center", fontsize=7, color="white")
    axes.set_yticks(range(schedule.size), [f"rank {rank}" for rank in range(schedule.size)])
    axes.invert_yaxis()
    axes.set_title(f"{schedule.name}: {simulation.bubble:.1%} idle; blue forward, orange gradients of inputs, green of weights, red both", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
