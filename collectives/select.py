"""Which algorithm runs an operation: the one for which the cost model predicts the least time, and the words that explain it.

All ranks of a communicator must choose the same schedule without talking, so a choice depends only on what they all know: the
operation, the number of ranks, the size of the vector and the transport. It does not depend on whether a vector is in registered memory:
the schedules that want it find that out together and have a fallback. Sizes are rounded up to a power of two first, so that few distinct
schedules are ever compiled.

The constants of the model are in cost.py, each algorithm's formula beside the algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ringfold.collectives.algorithms import BUILDERS, direct, direct_registered, ring
from ringfold.collectives.cost import LINKS, Cost, Link
from ringfold.collectives.errors import ConfigError, nearest

__all__ = ["Candidate", "Choice", "choose"]

# Segments are the unit of pipelining, and of how long one step can keep a core: large enough that a frame's overhead is a few
# percent, small enough that what was just received is still in the second-level cache when it is folded and sent on.
SEGMENT_NBYTES = 256 * 1024
MAX_SEGMENTS = 128

MIN_CLASS_NBYTES = 64


@dataclass(frozen=True, slots=True)
class Candidate:
    """One algorithm that could run the operation, and its predicted cost."""

    algorithm: str
    variant: str
    segments: int
    cost: Cost

    @property
    def name(self) -> str:
        return f"{self.algorithm} ({self.variant})"


@dataclass(frozen=True, slots=True)
class Choice:
    """What was picked for all sizes of one class, up to `nbytes`, and what was not; str() is the text of Communicator.explain."""

    op: str
    size: int
    nbytes: int
    link: Link
    picked: Candidate
    alternatives: tuple[Candidate, ...]
    why: str

    @property
    def algorithm(self) -> str:
        return self.picked.algorithm

    @property
    def variant(self) -> str:
        return self.picked.variant

    @property
    def segments(self) -> int:
        return self.picked.segments

    @property
    def cost(self) -> Cost:
        return self.picked.cost

    def __str__(self) -> str:
        what = self.op if self.op == "barrier" else f"{self.op} of up to {_nbytes_text(self.nbytes)}"
        lines = [
            f"{what} on {self.size} rank{'s' if self.size != 1 else ''} over {self.link.name}: {self.picked.name}",
            f"  predicted {_cost_text(self.picked)}",
            f"  because {self.why}",
        ]
        if self.alternatives:
            lines.append("  instead of")
            width = max(len(candidate.name) for candidate in self.alternatives)
            for candidate in self.alternatives:
                ratio = candidate.cost.seconds / self.cost.seconds if self.cost.seconds else 1.0
                lines.append(f"    {candidate.name:<{width}}  {_cost_text(candidate)}, {ratio:.3g} times the time")
        link = self.link
        lines.append(
            f"  model: alpha {_time_text(link.alpha_s)} a step, beta {1e-9 / link.beta_s_per_byte:.3g} GB/s sent,"
            f" gamma {1e-9 / link.gamma_s_per_byte:.3g} GB/s folded"
        )
        return "\n".join(lines)


def choose(op: str, size: int, nbytes: int, transport: str, algorithm: str | None = None) -> Choice:
    """Return the algorithm, variant and number of segments for an operation on a vector of `nbytes` (all ranks' chunks together).

    With `algorithm`, "ring" or "direct", only its variants are compared.

    Raises:
        ConfigError: the operation, the transport or the algorithm is unknown, or the operation has no such algorithm.
    """
    return _choose(op, size, size_class(nbytes), transport, algorithm)


def size_class(nbytes: int) -> int:
    """Return the largest size that shares its choice and its schedules with `nbytes`: the next power of two, at least one cache line."""
    return max(MIN_CLASS_NBYTES, 1 << (nbytes - 1).bit_length()) if nbytes > 0 else MIN_CLASS_NBYTES


@lru_cache(maxsize=1024)
def _choose(op: str, size: int, nbytes: int, transport: str, algorithm: str | None) -> Choice:
    known = {"operation": ({key[0] for key in BUILDERS}, op), "transport": (set(LINKS), transport)}
    if algorithm is not None:
        known["algorithm"] = ({key[1] for key in BUILDERS if key[0] == op} or {algorithm}, algorithm)
    problems = []
    for what, (names, asked) in known.items():
        if asked not in names:
            guess = nearest(asked, sorted(names))
            problems.append(f"unknown {what} {asked!r}" + (f", did you mean {guess!r}?" if guess else "") + f" Known: {', '.join(sorted(names))}.")
    if problems:
        raise ConfigError(f"{op} on {size} ranks over {transport}: " + " ".join(problems))
    link = LINKS[transport]
    candidates = [
        _candidate(op, name, variant, size, nbytes, link)
        for of_op, name, variant in BUILDERS
        if of_op == op and algorithm in (None, name) and (variant != "registered" or link.access_s_per_byte < float("inf"))
    ]
    picked = min(candidates, key=lambda candidate: candidate.cost.seconds)  # of equals the first, so the order of BUILDERS counts
    others = tuple(sorted((c for c in candidates if c is not picked), key=lambda candidate: candidate.cost.seconds))
    return Choice(op, size, nbytes, link, picked, others, _why(picked, others, size, algorithm))


def _candidate(op: str, algorithm: str, variant: str, size: int, nbytes: int, link: Link) -> Candidate:
    whole_vector = op in ("broadcast", "barrier") or variant == "one_shot"
    segments = _segments(nbytes if whole_vector else -(-nbytes // size)) if op not in ("barrier", "all_to_all") else 1
    if algorithm == "ring":
        cost = ring.cost(op, size, nbytes, segments, link)
    elif variant == "registered":
        cost = direct_registered.cost(op, size, nbytes, link)
    else:
        cost = direct.cost(op, variant, size, nbytes, segments, link)
    return Candidate(algorithm, variant, segments, cost)


def _segments(chunk_nbytes: int) -> int:
    """Return the power of two that cuts a chunk into segments of at most SEGMENT_NBYTES, or MAX_SEGMENTS."""
    wanted = -(-chunk_nbytes // SEGMENT_NBYTES)
    return min(MAX_SEGMENTS, 1 << max(0, wanted - 1).bit_length())


WHY = {
    "pipelined": "each link carries every byte as few times as possible, and no rank is sent to by more than one other",
    "registered": "the ranks work where the vectors lie, without staging copies; vectors outside registered memory use the fallback",
    "exchange": "it takes the fewest steps that wait for each other, and latency or the number of folds outweighs the crowd at each rank",
    "one_shot": "the vector is so small that a second step would cost more than sending it whole to everyone",
    "dissemination": "ceil(log2 n) steps are the fewest in which everyone can hear of everyone",
}


def _why(picked: Candidate, others: tuple[Candidate, ...], size: int, algorithm: str | None) -> str:
    if size == 1:
        return "one rank has nobody to talk to"
    reason = WHY[picked.variant]
    if algorithm is not None:
        return f"algorithm={algorithm!r} was asked for; {reason}"
    if not others:
        return reason
    if others[0].cost.seconds == picked.cost.seconds:
        return f"nothing is faster, and it comes before {others[0].name} in the list; {reason}"
    return f"it is predicted to be the fastest: {reason}"


def _cost_text(candidate: Candidate) -> str:
    cost = candidate.cost
    steps = f"{cost.steps} step{'s' if cost.steps != 1 else ''}"
    parts = f", {candidate.segments} segments a chunk" if candidate.segments > 1 else ""
    return f"{_time_text(cost.seconds)}: {steps}, {_nbytes_text(cost.wire_nbytes)} sent by a rank{parts}"


def _time_text(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _nbytes_text(nbytes: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.4g} {unit}"
    return f"{nbytes} B"
