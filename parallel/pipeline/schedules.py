"""The schedules that a layout can name, for p ranks and m microbatches.

    gpipe         all forwards, then all backwards                                     Huang et al., arXiv:1811.06965
    1f1b          one forward, one backward, as soon as there is one                   Narayanan et al., arXiv:1806.03377
    interleaved   the same with v stages a rank, p apart                               Narayanan et al., arXiv:2104.04473
    zbh1          1f1b's memory; gradients of weights fill its gaps                    Qi et al., arXiv:2401.10241
    zbv           two stages a rank in a V, so that the last one sits beside the first  Qi et al., arXiv:2405.15362
    dualpipev     the V with forwards and backwards in pairs, whose messages overlap   DeepSeek-V3, arXiv:2412.19437, cut in half

They are written down here as their authors draw them; what they cost is what the simulator says (simulation.py).
"""

from __future__ import annotations

from collections.abc import Callable

from ringfold.parallel.pipeline.schedule import Schedule, Step

__all__ = ["SCHEDULES", "least_micro", "make_schedule"]


def make_schedule(name: str, ranks: int, micro: int, virtual: int = 1) -> Schedule:
    """Return a schedule of a layout; `virtual`: stages a rank, for interleaved."""
    return SCHEDULES[name](ranks, micro, virtual)


def least_micro(name: str, ranks: int) -> int:
    """Return the least number of microbatches that a schedule is written for; interleaved wants a multiple of the ranks, too."""
    return {"dualpipev": 2 * ranks, "zbv": 1, "interleaved": ranks}.get(name, 1)


def _gpipe(p: int, m: int, _: int) -> Schedule:
    return _in_a_row("gpipe", [[*(Step("F", r, k) for k in range(m)), *(Step("B", r, k) for k in range(m))] for r in range(p)])


def _one_f_one_b(p: int, m: int, _: int) -> Schedule:
    steps = []
    for r in range(p):
        ahead = min(m, p - r)
        of_rank = [Step("F", r, k) for k in range(ahead)]
        for k in range(m):
            of_rank.append(Step("B", r, k))
            if ahead + k < m:
                of_rank.append(Step("F", r, ahead + k))
        steps.append(of_rank)
    return _in_a_row("1f1b", steps)


def _interleaved(p: int, m: int, v: int) -> Schedule:
    """Microbatches pass a rank's stages in groups of p; before its first backward a rank runs ahead by (v - 1) p + 2 (p - r - 1) + 1 forwards."""
    steps = []
    for r in range(p):
        groups = [range(first, min(m, first + p)) for first in range(0, m, p)]
        forwards = [Step("F", chunk * p + r, k) for group in groups for chunk in range(v) for k in group]
        backwards = [Step("B", chunk * p + r, k) for group in groups for chunk in reversed(range(v)) for k in group]
        ahead = min(m * v, (v - 1) * p + 2 * (p - r - 1) + 1)
        of_rank = forwards[:ahead]
        for k, backward in enumerate(backwards):
            of_rank.append(backward)
            of_rank += forwards[ahead + k : ahead + k + 1]
        steps.append(of_rank)
    return Schedule("interleaved", tuple(stage % p for stage in range(p * v)), m, tuple(map(tuple, steps)))


def _zb_h1(p: int, m: int, _: int) -> Schedule:
    """1f1b in which rank r puts gradients of weights off by r microbatches: with those that it has ahead that makes p on every rank."""
    steps = []
    for r in range(p):
        ahead = min(m, p - r)
        of_rank = [Step("F", r, k) for k in range(ahead)]
        for k in range(m):
            of_rank.append(Step("I", r, k))
            if k >= r:
                of_rank.append(Step("W", r, k - r))
            if ahead + k < m:
                of_rank.append(Step("F", r, ahead + k))
        of_rank += [Step("W", r, k) for k in range(max(0, m - r), m)]
        steps.append(of_rank)
    return _in_a_row("zbh1", steps)


def _zb_v(p: int, m: int, _: int) -> Schedule:
    """Rank r has stages r and 2p - 1 - r, here called 0 and 1."""
    steps = []
    for r in range(p):
        of_rank = _Chunks((r, 2 * p - 1 - r), m)
        of_rank.do(2 * (p - r) - 1, "F0")
        of_rank.do(r, "F1", "F0")
        of_rank.do(p - r, "F1", "I1", "W1")
        while of_rank.has("F0") or of_rank.has("F1"):
            of_rank.do(1, "F0", "I0", "W0", "F1", "I1", "W1")
        of_rank.do(r, "I0", "I1")
        of_rank.do(p - r, "I0", "W0")
        of_rank.do(m, "W1")
        of_rank.do(m, "W0")
        steps.append(tuple(of_rank.steps))
    return Schedule("zbv", (*range(p), *reversed(range(p))), m, tuple(steps))


class _Chunks:
    """The steps of a rank with two stages, written as kind and chunk: each word does the next microbatch of its kind, as long as there is one."""

    def __init__(self, stages: tuple[int, int], micro: int) -> None:
        self.steps: list[Step] = []
        self._stages = stages
        self._micro = micro
        self._counts: dict[str, int] = {}

    def has(self, word: str) -> bool:
        return self._next(word) < self._micro

    def do(self, times: int, *words: str) -> None:
        for _ in range(times):
            for word in words:
                if self.is_ready(word):
                    self.steps.append(Step(word[0], self._stages[int(word[1])], self._next(word)))
                    self._counts[word] = self._counts.get(word, 0) + 1

    def _next(self, word: str) -> int:
        """A whole backward is one of inputs as well, and one of weights."""
        kind, chunk = word[0], word[1]
        also = {"I": "B", "W": "B"}.get(kind)
        mine = self._counts.get(word, 0) + (self._counts.get(f"{also}{chunk}", 0) if also else 0)
        return mine + (self._counts.get(f"I{chunk}", 0) if kind == "B" else 0)

    def is_ready(self, word: str) -> bool:
        kind, chunk = word[0], word[1]
        if kind == "W":
            return self._next(word) < self._next(f"I{chunk}")
        return self._next(word) < (self._micro if kind == "F" else self._next(f"F{chunk}"))


def _dual_pipe_v(p: int, m: int, _: int) -> Schedule:
    """Rank r has stages r and 2p - 1 - r, here called 0 and 1; m is at least 2p."""
    steps = []
    for r in range(p):
        of_rank = _Chunks((r, 2 * p - 1 - r), m)
        of_rank.do(2 * (p - r - 1), "F0")
        of_rank.do(r + 1, "F0", "F1")
        of_rank.do(p - r - 1, "I1", "W1", "F1")
        of_rank.do(m - 2 * p + r + 1, "F0", "B1", "F1", "B0")
        of_rank.do(p - r - 1, "B1", "F1", "B0")
        for k in range(r + 1):  # gradients of weights are put off from the middle on
            of_rank.do(1, "I1" if 2 * k >= r + 1 else "B1", "I0" if 2 * k + 1 >= r + 1 else "B0")
        for _ in range(p - r - 1):
            of_rank.do(1, "W1" if of_rank.is_ready("W1") else "W0", "I0")
        of_rank.do(m, "W1")
        of_rank.do(m, "W0")
        steps.append(tuple(of_rank.steps))
    return Schedule("dualpipev", (*range(p), *reversed(range(p))), m, tuple(steps))


def _in_a_row(name: str, steps: list[list[Step]]) -> Schedule:
    micro = max(step.micro for step in steps[0]) + 1
    return Schedule(name, tuple(range(len(steps))), micro, tuple(map(tuple, steps)))


SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": _gpipe,
    "1f1b": _one_f_one_b,
    "interleaved": _interleaved,
    "zbh1": _zb_h1,
    "zbv": _zb_v,
    "dualpipev": _dual_pipe_v,
}
