"""Which algorithm runs an operation: the one for which the cost model predicts the least time, and the words that explain it.

All ranks of a communicator must choose the same schedule without talking, so a choice depends only on what they all know: the
operation, the size of the vector, and the topology (which ranks share a host, the links, whether ranks can read each other's memory). It does not
depend on whether a vector is in registered memory: the schedules that want it find that out together and have a fallback. Sizes are rounded
up to a power of two first, so that few distinct schedules are ever compiled.

The constants of the model are in cost.py, each algorithm's formula beside the algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ringfold.collectives.algorithms import BUILDERS, direct_registered, predict
from ringfold.collectives.codes import FOLDING
from ringfold.collectives.cost import SHM, Cost, Link, Topology
from ringfold.collectives.errors import ConfigError, nearest

__all__ = ["Candidate", "Choice", "choose"]

# Segments are the unit of pipelining, and of how long one step can keep a core: large enough that a frame's overhead is a few
# percent, small enough that what was just received is still in the second-level cache when it is folded and sent on.
SEGMENT_NBYTES = 256 * 1024
# Where a pipeline must fill first, along a chain or down a tree, smaller segments may pay.
MIN_SEGMENT_NBYTES = 16 * 1024
MAX_SEGMENTS = 128

MIN_CLASS_NBYTES = 64
# The class of an operation whose ranks know different sizes (an all_to_all of uneven pieces): large enough to be worth working in place.
UNKNOWN_NBYTES = 1024 * 1024


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
    nbytes: int  # -1: unknown
    topology: Topology
    picked: Candidate
    alternatives: tuple[Candidate, ...]
    why: str
    fallback: str  # what a registered schedule does with vectors that are not: "exchange" or "remote"

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
        known = "uneven pieces" if self.nbytes < 0 else f"up to {_nbytes_text(self.nbytes)}"
        what = self.op if self.op == "barrier" else f"{self.op} of {known}"
        lines = [f"{what} on {self.topology}: {self.picked.name}", f"  predicted {_cost_text(self.picked)}", f"  because {self.why}"]
        if self.variant == "registered":
            lines.append(f"  vectors outside registered memory: {FALLBACK_TEXT[self.fallback]}")
        if self.alternatives:
            lines.append("  instead of")
            width = max(len(candidate.name) for candidate in self.alternatives)
            for candidate in self.alternatives:
                ratio = candidate.cost.seconds / self.cost.seconds if self.cost.seconds else 1.0
                lines.append(f"    {candidate.name:<{width}}  {_cost_text(candidate)}, {ratio:.3g} times the time")
        links = (self.topology.near, self.topology.far) if self.topology.is_hierarchical else (self.topology.link,)
        lines.extend(f"  model{' of ' + link.name if len(links) > 1 else ''}: {_link_text(link)}" for link in links)
        return "\n".join(lines)


def choose(op: str, nbytes: int, topology: Topology, algorithm: str | None = None) -> Choice:
    """Return the algorithm, variant, number of segments and fallback for an operation on a vector of `nbytes` (all ranks' chunks together).

    nbytes: -1 where ranks know different sizes. With `algorithm`, only its variants are compared.

    Raises:
        ConfigError: the operation or the algorithm is unknown, or the operation has no such algorithm here.
    """
    return _choose(op, size_class(nbytes) if nbytes >= 0 else -1, topology, algorithm)


def size_class(nbytes: int) -> int:
    """Return the largest size that shares its choice and its schedules with `nbytes`: the next power of two, at least one cache line."""
    return max(MIN_CLASS_NBYTES, 1 << (nbytes - 1).bit_length()) if nbytes > 0 else MIN_CLASS_NBYTES


@lru_cache(maxsize=1024)
def _choose(op: str, nbytes: int, topology: Topology, algorithm: str | None) -> Choice:
    known = {"operation": ({key[0] for key in BUILDERS}, op)}
    if algorithm is not None:
        known["algorithm"] = ({key[1] for key in BUILDERS if key[0] == op} or {algorithm}, algorithm)
    problems = []
    for what, (names, asked) in known.items():
        if asked not in names:
            guess = nearest(asked, sorted(names))
            problems.append(f"unknown {what} {asked!r}" + (f", did you mean {guess!r}?" if guess else "") + f" Known: {', '.join(sorted(names))}.")
    if algorithm == "hierarchical" and not topology.is_hierarchical:
        problems.append("hierarchical needs several hosts, and several ranks on one of them.")
    if problems:
        raise ConfigError(f"{op} on {topology}: " + " ".join(problems))
    of = UNKNOWN_NBYTES if nbytes < 0 else nbytes
    candidates = [
        _candidate(op, name, variant, topology, of)
        for of_op, name, variant in BUILDERS
        if of_op == op
        and algorithm in (None, name)
        and (variant != "registered" or topology.n_hosts == 1)
        and (name != "hierarchical" or topology.is_hierarchical)
    ]
    picked = min(candidates, key=lambda candidate: candidate.cost.seconds)  # of equals the first, so the order of BUILDERS counts
    others = tuple(sorted((c for c in candidates if c is not picked), key=lambda candidate: candidate.cost.seconds))
    fallback = _fallback(op, topology, of, picked)
    return Choice(op, nbytes, topology, picked, others, _why(picked, others, topology.size, algorithm), fallback)


def _candidate(op: str, algorithm: str, variant: str, topology: Topology, nbytes: int) -> Candidate:
    chunk_nbytes = -(-nbytes // _chunks(op, algorithm, variant, topology))
    segments = _segments(chunk_nbytes, SEGMENT_NBYTES) if op not in ("barrier", "all_to_all") else 1
    counts = [segments]
    if (op in ("broadcast", "reduce") and algorithm in ("ring", "hierarchical")) or variant == "double":
        while segments < _segments(chunk_nbytes, MIN_SEGMENT_NBYTES):
            segments *= 2
            counts.append(segments)
    tried = [Candidate(algorithm, variant, count, predict(op, algorithm, variant, topology, nbytes, count)) for count in counts]
    return min(tried, key=lambda candidate: candidate.cost.seconds)


def _chunks(op: str, algorithm: str, variant: str, topology: Topology) -> int:
    """Return into how many chunks an algorithm cuts a vector."""
    if variant == "double":
        return 2
    if algorithm == "hierarchical" and op in ("all_reduce", "broadcast", "reduce"):
        slices = min(topology.hosts.count(host) for host in set(topology.hosts))
        return slices * topology.n_hosts if op == "all_reduce" else slices
    whole = op in ("broadcast", "barrier") or variant in ("one_shot", "whole", "binomial") or (op == "reduce" and algorithm == "ring")
    return 1 if whole else topology.size


def _segments(chunk_nbytes: int, segment_nbytes: int) -> int:
    """Return the power of two that cuts a chunk into segments of at most `segment_nbytes`, or MAX_SEGMENTS."""
    wanted = -(-chunk_nbytes // segment_nbytes)
    return min(MAX_SEGMENTS, 1 << max(0, wanted - 1).bit_length())


def _fallback(op: str, topology: Topology, nbytes: int, picked: Candidate) -> str:
    """Return which fallback of a registered schedule is predicted to be faster.

    Of folds of three ranks and more by constants: in half precision the two round at different places, and no result may depend on a measurement.
    """
    if picked.variant != "registered" or not topology.remote_reads or topology.size == 1:
        return "exchange"
    if op in FOLDING and topology.size > 2 and topology.near.name == SHM.name:
        topology = replace(topology, near=replace(topology.near, read_s_per_byte=SHM.read_s_per_byte))
    exchange = ("ring", "pipelined") if op == "broadcast" else ("direct", "exchange")  # the schedules that direct_registered.py falls back to
    through = predict(op, *exchange, topology, nbytes, picked.segments).seconds
    return "remote" if direct_registered.remote_seconds(op, topology, nbytes, picked.segments) < through else "exchange"


FALLBACK_TEXT = {"exchange": "sent through the transport", "remote": "read where they lie"}
WHY = {
    "pipelined": "each link carries every byte as few times as possible, and no rank is sent to by more than one other",
    "registered": "the ranks work where the vectors lie, without staging copies",
    "exchange": "the fewest steps wait for each other, and latency or the number of folds outweighs the crowd at each rank",
    "one_shot": "the vector is so small that a second step would cost more than sending it whole to everyone",
    "dissemination": "ceil(log2 n) steps are the fewest in which everyone can hear of everyone",
    "chunks": "it takes ceil(log2 n) steps where a ring takes n - 1, with the same bytes",
    "whole": "the vector is so small that log2 n steps with all of it cost less than more steps with parts of it",
    "binomial": "every rank that has the vector helps to pass it on, and it is too small to be worth cutting",
    "double": "a tree's steps grow with log2 n only, and two of them keep both directions of every link busy",
    "sliced": "what is done on the hosts crosses no network, and every byte that crosses does so once for all ranks of a host",
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
        return f"nothing is faster, and it comes before {others[0].name} in the list"
    return f"it is predicted to be the fastest: {reason}"


def _cost_text(candidate: Candidate) -> str:
    cost = candidate.cost
    steps = f"{cost.steps} step{'s' if cost.steps != 1 else ''}"
    parts = f", {candidate.segments} segments a chunk" if candidate.segments > 1 else ""
    return f"{_time_text(cost.seconds)}: {steps}, {_nbytes_text(cost.wire_nbytes)} sent by a rank{parts}"


def _link_text(link: Link) -> str:
    rates = f"beta {1e-9 / link.beta_s_per_byte:.3g} GB/s sent, gamma {1e-9 / link.gamma_s_per_byte:.3g} GB/s folded"
    return f"alpha {_time_text(link.alpha_s)} a step, {rates}"


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
