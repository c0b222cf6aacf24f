"""What a schedule costs: when each step runs, how long ranks are idle, and how many activations they hold at most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ringfold.parallel.pipeline.schedule import Schedule, Step

__all__ = ["Costs", "Simulation", "simulate"]


@dataclass(frozen=True)
class Costs:
    """The time of one microbatch in one stage: forward, and the gradients of inputs and of weights. `message`: on its way between ranks."""

    forward: float = 1.0
    inputs: float = 1.0
    weights: float = 1.0
    message: float = 0.0

    def of(self, step: Step) -> float:
        return {"F": self.forward, "I": self.inputs, "W": self.weights, "B": self.inputs + self.weights}[step.kind]


@dataclass(frozen=True)
class Simulation:
    """When each step of each rank begins and ends; `peaks` are the most activations, in microbatches of a stage, that each rank holds."""

    schedule: Schedule
    times: tuple[Mapping[Step, tuple[float, float]], ...]
    peaks: tuple[int, ...]
    ideal: float

    @property
    def spans(self) -> list[float]:
        """From a rank's first step to the end of its last."""
        return [max(end for _, end in of_rank.values()) - min(start for start, _ in of_rank.values()) for of_rank in self.times]

    @property
    def makespan(self) -> float:
        """From the first step of any rank to the end of the last."""
        return max(end for of_rank in self.times for _, end in of_rank.values())

    @property
    def bubble(self) -> float:
        """The time for which the rank that takes longest is idle, over the time for which it works."""
        return max(self.spans) / self.ideal - 1.0


def simulate(schedule: Schedule, costs: Costs | Callable[[Step], float] | None = None, message: float = 0.0) -> Simulation:
    """Run a schedule that is proven, every rank in its own order; `costs` may differ by step."""
    if costs is None or isinstance(costs, Costs):
        given = costs or Costs()
        cost: Callable[[Step], float] = given.of
        message = given.message or message
    else:
        cost = costs
    ends: dict[Step, float] = {}
    times: list[dict[Step, tuple[float, float]]] = [{} for _ in schedule.steps]
    place, now = [0] * schedule.size, [0.0] * schedule.size
    moved = True
    while moved:
        moved = False
        for rank, of_rank in enumerate(schedule.steps):
            while place[rank] < len(of_rank):
                step = of_rank[place[rank]]
                ready = [_end(need, ends) for need in schedule.needs(step)]
                if any(end is None for end in ready):
                    break
                arrivals = [
                    end + (message if schedule.ranks[need.stage] != rank else 0.0)
                    for need, end in zip(schedule.needs(step), ready, strict=True)
                    if end is not None
                ]
                start = max([now[rank], *arrivals])
                now[rank] = ends[step] = start + cost(step)
                times[rank][step] = (start, now[rank])
                place[rank] += 1
                moved = True
    ideal = max(sum(cost(step) for step in of_rank) for of_rank in schedule.steps)
    return Simulation(schedule, tuple(times), tuple(_peak(of_rank) for of_rank in schedule.steps), ideal)


def _end(step: Step, ends: Mapping[Step, float]) -> float | None:
    found = ends.get(step)
    return ends.get(step._replace(kind="B")) if found is None and step.kind in ("I", "W") else found


def _peak(steps: tuple[Step, ...]) -> int:
    """Return the most microbatches whose activations are held: from a forward to the gradient of the weights."""
    held = most = 0
    for step in steps:
        held += (step.kind == "F") - (step.kind in ("W", "B"))
        most = max(most, held)
    return most
