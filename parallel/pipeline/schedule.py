"""Schedule: what each rank of a pipeline does, in order; data, which is proven before anything runs.

    F   forward of a microbatch through a stage
    I   the gradient of what the stage was given        what the stage before it waits for
    W   the gradient of the stage's parameters          which nobody waits for, and so fills the gaps
    B   both at once

A stage is on one rank; a rank may have several. Activations travel from a stage to the next, gradients back; who sends what to whom follows.
As text a step is `3F0`: stage 3, forward, microbatch 0. That is also how torch.distributed.pipelining writes schedules to CSV files.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ringfold.collectives.errors import ConfigError

__all__ = ["Schedule", "Step"]

KINDS = ("F", "I", "W", "B")


class Step(NamedTuple):
    """One thing that a rank does."""

    kind: str
    stage: int
    micro: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro}"

    @classmethod
    def parse(cls, text: str) -> Step:
        """Raises: ConfigError: it is none."""
        match = re.fullmatch(r"\s*(\d+)([FIWB])(\d+)\s*", text)
        if match is None:
            raise ConfigError(f"schedule: {text!r} is no step; write stage, kind ({', '.join(KINDS)}) and microbatch, as in 3F0")
        return cls(match[2], int(match[1]), int(match[3]))


@dataclass(frozen=True)
class Schedule:
    """The steps of every rank, for `micro` microbatches through `len(ranks)` stages; `ranks` says where each stage is."""

    name: str
    ranks: tuple[int, ...]
    micro: int
    steps: tuple[tuple[Step, ...], ...]

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.steps)

    def stages_of(self, rank: int) -> list[int]:
        """Return the stages that a rank has."""
        return [stage for stage, owner in enumerate(self.ranks) if owner == rank]

    def prove(self) -> None:
        """Check that every microbatch passes every stage once, in an order in which every rank can go on.

        Raises:
            ConfigError: it does not; everything that is wrong is said.
        """
        problems = [*self._counted_wrong()]
        if not problems:
            problems = [*self._stuck()]
        if problems:
            listed = "\n  ".join(problems[:20])
            raise ConfigError(f"schedule {self.name} of {self.size} ranks, {len(self.ranks)} stages and {self.micro} microbatches:\n  {listed}")

    def to_csv(self, path: Path) -> None:
        """Write a line for each rank."""
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([map(str, of_rank) for of_rank in self.steps])

    @classmethod
    def from_csv(cls, path: Path) -> Schedule:
        """Read a schedule; where stages are, and how many microbatches there are, follows from its steps.

        Raises:
            ConfigError: a cell is no step, or a stage is on several ranks.
        """
        with path.open(newline="") as file:
            steps = tuple(tuple(Step.parse(cell) for cell in line if cell.strip()) for line in csv.reader(file))
        return cls.of_steps(path.stem, steps)

    @classmethod
    def of_steps(cls, name: str, steps: Iterable[Iterable[Step]]) -> Schedule:
        """Return the schedule of these steps of each rank. Raises: ConfigError: a stage is on several ranks, or on none."""
        of_ranks = tuple(tuple(of_rank) for of_rank in steps)
        owners: dict[int, set[int]] = {}
        for rank, of_rank in enumerate(of_ranks):
            for step in of_rank:
                owners.setdefault(step.stage, set()).add(rank)
        count = max(owners, default=-1) + 1
        wrong = [f"stage {stage} is on ranks {sorted(owners.get(stage, ()))}" for stage in range(count) if len(owners.get(stage, ())) != 1]
        if wrong:
            raise ConfigError(f"schedule {name}: {'; '.join(wrong)}. Each stage is on one rank.")
        micro = max((step.micro for of_rank in of_ranks for step in of_rank), default=-1) + 1
        return cls(name, tuple(next(iter(owners[stage])) for stage in range(count)), micro, of_ranks)

    def needs(self, step: Step) -> Iterator[Step]:
        """Yield what has to be done before a step, wherever it is done: each is one of several that would do (I or B)."""
        if step.kind == "F" and step.stage:
            yield Step("F", step.stage - 1, step.micro)
        if step.kind in ("I", "B"):
            yield Step("F", step.stage, step.micro)
            if step.stage < len(self.ranks) - 1:
                yield Step("I", step.stage + 1, step.micro)
        if step.kind == "W":
            yield Step("I", step.stage, step.micro)

    def _counted_wrong(self) -> Iterator[str]:
        seen: dict[Step, int] = {}
        for rank, of_rank in enumerate(self.steps):
            for step in of_rank:
                if not 0 <= step.stage < len(self.ranks) or not 0 <= step.micro < self.micro:
                    yield f"rank {rank}: {step} is of no stage or microbatch"
                elif self.ranks[step.stage] != rank:
                    yield f"rank {rank}: {step}, but the stage is on rank {self.ranks[step.stage]}"
                seen[step] = seen.get(step, 0) + 1
        for stage in range(len(self.ranks)):
            for micro in range(self.micro):
                forward, inputs, weights, both = (seen.get(Step(kind, stage, micro), 0) for kind in KINDS)
                if forward != 1:
                    yield f"{Step('F', stage, micro)} is done {forward} times"
                if inputs + both != 1:
                    yield f"the gradient of what stage {stage} is given by microbatch {micro} is computed {inputs + both} times"
                if weights + both != 1:
                    yield f"the gradient of the parameters of stage {stage} by microbatch {micro} is computed {weights + both} times"

    def _stuck(self) -> Iterator[str]:
        done: set[Step] = set()
        place = [0] * self.size
        moved = True
        while moved:
            moved = False
            for rank, of_rank in enumerate(self.steps):
                while place[rank] < len(of_rank) and all(_is_in(need, done) for need in self.needs(of_rank[place[rank]])):
                    done.add(of_rank[place[rank]])
                    place[rank] += 1
                    moved = True
        for rank, of_rank in enumerate(self.steps):
            if place[rank] < len(of_rank):
                step = of_rank[place[rank]]
                missing = ", ".join(str(need) for need in self.needs(step) if not _is_in(need, done))
                yield f"rank {rank} cannot do {step}, its step {place[rank]}: {missing} comes too late"


def _is_in(step: Step, done: Iterable[Step] | set[Step]) -> bool:
    return step in done or (step.kind in ("I", "W") and step._replace(kind="B") in done)
