"""Layout: one frozen value that says everything about an arrangement of workers, and the text it is written as.

    dpN tpN ppN[:SCHEDULE[:V]] cpN[:ring|ulysses] epN zero0..3[:cpu|:nvme=DIR][:groupN]
    fp32|bf16|fp16|fp8|fp64 recompute[:full|:selective|:budget=BYTES] microN exactN

The words stand in any order with blanks between them. `dp` fills what is left of the world: world = dp x tp x pp x cp; `ep` divides
dp x cp and does not multiply the world. Over ranks tp varies fastest, then cp, dp, pp, whatever the order of the text.
It does not know torch, processes or communicators, and a word that parses is not yet a word that runs: BUILT says what does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import product

from ringfold.collectives.errors import LayoutError, nearest
from ringfold.parallel.pipeline.schedules import least_micro
from ringfold.parallel.strategy import refusals

# The one list of what runs today. A layout that needs anything else is refused by `require_built`.
BUILT = frozenset(
    {"dp", "tp", "cp", "micro", "fp32", "bf16", "fp16", "fp64", "fp8", "recompute", "exact", "zero1", "zero2", "zero3", "zero group", "offload"}
)

AXES = ("pp", "dp", "cp", "tp")  # slowest to fastest over ranks
PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "fp64")
SCHEDULES = {"1f1b": 1, "gpipe": 1, "interleaved": 2, "zbh1": 1, "zbv": 2, "dualpipev": 2}  # the number of virtual stages each takes by default
CP_ALGORITHMS = ("ring", "ulysses")
RECOMPUTES = ("full", "selective")
GRAMMAR = (
    "dpN tpN ppN[:SCHEDULE[:V]] cpN[:ring|ulysses] epN zero0..3[:cpu|:nvme=DIR][:groupN] fp32|bf16|fp16|fp8|fp64 "
    "recompute[:full|:selective|:budget=BYTES] microN exactN"
)

_COUNTS = ("dp", "tp", "pp", "cp", "ep", "micro", "exact")
_SUFFIXES = {"TiB": 1 << 40, "GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}
_BUDGET = rf"budget=([0-9]{{1,18}})({'|'.join(_SUFFIXES)})?"
_MODEL_NAMES = {
    "attention heads": ("num_attention_heads", "num_heads", "n_heads", "n_head"),
    "key-value heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads"),
    "layers": ("num_hidden_layers", "num_layers", "n_layers", "n_layer"),
    "experts": ("num_experts", "num_local_experts", "n_experts"),
}


@dataclass(frozen=True)
class Layout:
    """An arrangement of workers; `dp=None` means what the other axes leave of the world.

    Raises:
        LayoutError: a value is out of its range; all such values are named at once.
    """

    dp: int | None = None
    tp: int = 1
    pp: int = 1
    schedule: str = "1f1b"
    virtual_stages: int = 1
    cp: int = 1
    cp_algorithm: str = "ring"
    ep: int = 1
    zero: int = 0
    offload: str | None = None  # "cpu" or "nvme=DIR"
    zero_group: int | None = None  # shard inside this many ranks, replicate between
    precision: str = "fp32"
    recompute: str | None = None  # "full", "selective" or "budget=BYTES"
    micro: int = 1
    exact: int | None = None

    def __post_init__(self) -> None:
        problems = list(self._out_of_range())
        if problems:
            raise LayoutError("\n".join(problems))

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Return the layout that `text` describes.

        Raises:
            LayoutError: every word that is unknown, malformed or said twice, with the word that was probably meant.
        """
        values: dict[str, object] = {}
        said: dict[str, str] = {}
        problems = []
        for word in text.split():
            try:
                subject, updates = _read_word(word)
            except LayoutError as problem:
                problems.append(f'"{word}": {problem}')
                continue
            if subject in said:
                problems.append(f'"{word}": {subject} was already given by "{said[subject]}"')
            said.setdefault(subject, word)
            values.update(updates)
        try:
            layout = cls(**values)  # type: ignore[arg-type]
        except LayoutError as problem:
            problems += str(problem).splitlines()
        if problems:
            raise LayoutError(_block(f'cannot read the layout "{text}"', problems))
        return layout

    def __str__(self) -> str:
        return " ".join(word for word, _ in self._words()) or self.precision

    def check(self, world_size: int, model: object = None) -> list[str]:
        """Return every violated constraint, each with its arithmetic and what would satisfy it; an empty list if there is none.

        `model` is anything that tells its sizes by the usual names (`num_attention_heads`, `n_layer`, ...): a module, its
        `config`, or a mapping. Sizes that it does not tell are not checked.
        """
        problems = [problem for problem in (self._world_problem(world_size),) if problem]
        dp = self.dp if self.dp is not None else max(1, world_size // (self.tp * self.pp * self.cp))
        return problems + list(self._axis_problems(dp)) + list(self._model_problems(model))

    def resolve(self, world_size: int, model: object = None) -> Layout:
        """Return this layout with `dp` filled in for `world_size` workers.

        Raises:
            LayoutError: everything that `check(world_size, model)` finds.
        """
        problems = self.check(world_size, model)
        if problems:
            raise LayoutError(problems[0] if len(problems) == 1 else _block(f'layout "{self}" does not fit', problems))
        return replace(self, dp=world_size // (self.tp * self.pp * self.cp))

    def unsupported(self) -> list[str]:
        """Return the words of this layout that parse but are not built yet."""
        return [word for word, needs in self._words() if not needs <= BUILT]

    def require_built(self) -> None:
        """Refuse a layout that asks for something this version does not have.

        Raises:
            LayoutError: lists all such words.
        """
        refused = self.unsupported()
        if refused:
            built = " ".join(f"{name}N" if name in _COUNTS else name for name in sorted(BUILT))
            verb = "is" if len(refused) == 1 else "are"
            raise LayoutError(f'layout "{self}": {", ".join(refused)} {verb} not built yet. This version has: {built}. Leave the rest out.')

    @property
    def sizes(self) -> dict[str, int]:
        """The number of ranks along each axis, slowest axis first; dp must be resolved.

        Raises:
            LayoutError: dp is still open.
        """
        if self.dp is None:
            raise LayoutError(f'layout "{self}" leaves dp open: call resolve(world_size) first')
        return {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp}

    @property
    def recompute_budget(self) -> int | None:
        """The bytes of `recompute:budget=BYTES`; None if there is no budget."""
        match = re.fullmatch(_BUDGET, self.recompute or "")
        return int(match[1]) * _SUFFIXES.get(match[2], 1) if match else None

    @property
    def world_size(self) -> int:
        """The number of workers, dp x tp x pp x cp; dp must be resolved."""
        return math.prod(self.sizes.values())

    def coordinate(self, rank: int) -> dict[str, int]:
        """Return where `rank` stands on each axis."""
        place = {}
        for axis, size in reversed(self.sizes.items()):
            rank, place[axis] = divmod(rank, size)
        return {axis: place[axis] for axis in AXES}

    def rank_at(self, coordinate: Mapping[str, int]) -> int:
        """Return the rank that stands at `coordinate`, the inverse of `coordinate(rank)`."""
        rank = 0
        for axis, size in self.sizes.items():
            rank = rank * size + coordinate[axis]
        return rank

    def _words(self) -> Iterator[tuple[str, frozenset[str]]]:
        """Yield each word of the text, and the features it needs (none for a word that asks for what is there anyway)."""

        def axis(name: str, size: int | None, option: str = "") -> Iterator[tuple[str, frozenset[str]]]:
            if size is not None and (size > 1 or option or name == "dp"):
                yield f"{name}{size}{option}", frozenset({name} if size > 1 or name == "dp" else ())

        yield from axis("dp", self.dp)
        yield from axis("tp", self.tp)
        schedule = ""
        if self.virtual_stages != SCHEDULES[self.schedule]:
            schedule = f":{self.schedule}:{self.virtual_stages}"
        elif self.schedule != "1f1b":
            schedule = f":{self.schedule}"
        yield from axis("pp", self.pp, schedule)
        yield from axis("cp", self.cp, "" if self.cp_algorithm == "ring" else f":{self.cp_algorithm}")
        yield from axis("ep", self.ep)
        if self.zero or self.offload or self.zero_group:
            options = [o for o in (self.offload, self.zero_group and f"group{self.zero_group}") if o]
            needs = {f"zero{self.zero}", *(["offload"] if self.offload else []), *(["zero group"] if self.zero_group else [])}
            yield ":".join([f"zero{self.zero}", *options]), frozenset(needs)
        if self.precision != "fp32":
            yield self.precision, frozenset({self.precision})
        if self.recompute:
            yield f"recompute:{self.recompute}", frozenset({"recompute"})
        if self.micro > 1:
            yield f"micro{self.micro}", frozenset({"micro"})
        if self.exact is not None:
            yield f"exact{self.exact}", frozenset({"exact"})

    def _out_of_range(self) -> Iterator[str]:
        for field in fields(self):
            value = getattr(self, field.name)
            counted = field.name in _COUNTS or field.name in ("virtual_stages", "zero_group")
            if counted and value is not None and (not isinstance(value, int) or value < 1):
                yield f"{field.name} is {value}: it must be at least 1"
        choices = {"zero": range(4), "schedule": SCHEDULES, "cp_algorithm": CP_ALGORITHMS, "precision": PRECISIONS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                yield f"{name} is {getattr(self, name)}: it must be one of {', '.join(map(str, allowed))}"
        if self.offload is not None and not re.fullmatch(r"cpu|nvme=[^\s:]+", self.offload):
            yield f'offload is {self.offload}: it must be cpu, or nvme=DIR with a DIR that holds neither a blank nor ":"'
        if self.recompute is not None:
            try:
                canonical = _recompute(self.recompute)
            except LayoutError as problem:
                yield f"recompute is {self.recompute}: {problem}"
            else:
                if canonical != self.recompute:
                    yield f"recompute is {self.recompute}: write it {canonical}"

    def _world_problem(self, world_size: int) -> str | None:
        others = {axis: size for axis, size in (("tp", self.tp), ("pp", self.pp), ("cp", self.cp)) if size > 1}
        taken = math.prod(others.values())
        if self.dp is not None:
            needed = self.dp * taken
            if needed == world_size:
                return None
            terms = [f"dp{self.dp}", *(f"{axis}{size}" for axis, size in others.items())]
            return (
                f"{' x '.join(terms)} needs {needed} worker{'s' * (needed > 1)}, world_size is {world_size}. "
                f'Try "{self._fit(world_size)}", or start with -n {needed}.'
            )
        if world_size >= taken and world_size % taken == 0:
            return None
        terms = [f"{axis}{size}" for axis, size in others.items()]
        return (
            f"{' x '.join(terms)} needs a multiple of {taken} workers, world_size is {world_size}. "
            f'Try "{self._fit(world_size)}", or start with -n {math.ceil(world_size / taken) * taken}.'
        )

    def _fit(self, world_size: int) -> str:
        """Return the axes nearest to these that fill `world_size`: as much tp, then cp, then pp as divides it."""

        def divisors(size: int) -> list[int]:
            return [d for d in range(size, 0, -1) if size % d == 0]

        candidates = [c for c in product(divisors(self.tp), divisors(self.cp), divisors(self.pp)) if world_size % math.prod(c) == 0]
        tp, cp, pp = max(candidates, key=lambda c: (math.prod(c), c))
        return str(Layout(dp=world_size // (tp * cp * pp), tp=tp, pp=pp, cp=cp))

    def _axis_problems(self, dp: int) -> Iterator[str]:
        yield from refusals({feature for _, needs in self._words() for feature in needs})
        replicas = dp * self.cp
        arithmetic = f"dp x cp = {dp} x {self.cp} = {replicas}"
        if replicas % self.ep:
            yield f"ep{self.ep} must divide {arithmetic}. Try ep{math.gcd(self.ep, replicas)}."
        if self.zero_group is not None and replicas % self.zero_group:
            yield f"zero group{self.zero_group} must divide {arithmetic}. Try group{math.gcd(self.zero_group, replicas)}."
        if self.zero == 0 and (self.offload or self.zero_group):
            yield 'zero0 shards nothing, so there is nothing to offload or to group. Try "zero1" or more, or leave the options out.'
        fixed = SCHEDULES[self.schedule]
        if self.schedule == "interleaved":
            if self.virtual_stages < 2:
                yield 'schedule interleaved with 1 virtual stage has nothing to interleave. Try "interleaved:2", or "1f1b".'
        elif self.virtual_stages != fixed:
            yield (
                f"schedule {self.schedule} has {fixed} virtual stage{'s' * (fixed > 1)} per rank, not {self.virtual_stages}. "
                f'Try "pp{self.pp}:{self.schedule}", or "pp{self.pp}:interleaved:{self.virtual_stages}".'
            )
        if self.pp > 1 and self.schedule == "interleaved" and self.micro % self.pp:
            wanted = math.ceil(self.micro / self.pp) * self.pp
            yield f"schedule interleaved needs a multiple of pp {self.pp} microbatches, micro is {self.micro}. Try micro{wanted}."
        least = least_micro(self.schedule, self.pp)
        if self.pp > 1 and self.micro < least and self.schedule != "interleaved":
            yield f"schedule {self.schedule} needs at least {least} microbatches for pp {self.pp}, micro is {self.micro}. Try micro{least}."
        if self.exact is not None:
            if dp & (dp - 1):
                yield f"exact{self.exact} sums over ranks in pairs, so dp must be a power of two, not {dp}. Try dp{1 << (dp.bit_length() - 1)}."
            elif self.exact % dp:
                widest = max(d for d in range(1, min(dp, self.exact) + 1) if self.exact % d == 0)
                yield f"exact{self.exact}: dp = {dp} does not divide its {self.exact} shards. Try dp{widest}, or exact{dp}."
            elif self.micro not in (1, self.exact // dp):
                yield (
                    f"exact{self.exact} runs {self.exact} / dp {dp} = {self.exact // dp} microbatches on each rank, not {self.micro}. "
                    f"Leave micro{self.micro} out."
                )

    def _model_problems(self, model: object) -> Iterator[str]:
        heads = model_size(model, "attention heads")  # key-value heads that ranks do not divide are whole on each
        if heads and heads % self.tp:
            yield f"tp{self.tp} must divide the model's {heads} attention heads. Try tp{math.gcd(self.tp, heads)}."
        elif heads and self.cp_algorithm == "ulysses" and (heads // self.tp) % self.cp:
            yield f"cp{self.cp}:ulysses must divide {heads} attention heads / tp {self.tp} = {heads // self.tp}. Try cp{self.cp}:ring."
        layers, stages = model_size(model, "layers"), self.pp * self.virtual_stages
        if layers and self.pp > 1 and stages > layers:
            arithmetic = f"pp x virtual stages = {self.pp} x {self.virtual_stages} = {stages}"
            yield f"{arithmetic} stages need as many layers, the model has {layers}. Try pp{max(1, layers // self.virtual_stages)}."
        experts = model_size(model, "experts")
        if experts and experts % self.ep:
            yield f"ep{self.ep} must divide the model's {experts} experts. Try ep{math.gcd(self.ep, experts)}."


def _block(head: str, problems: list[str]) -> str:
    return f"{head}: {problems[0]}" if len(problems) == 1 else "\n  ".join([f"{head}:", *problems])


def model_size(model: object, name: str) -> int | None:
    """Look up a size of the model under its usual names, in the model itself and in its `config`."""
    for holder in (model, getattr(model, "config", None)):
        for key in _MODEL_NAMES[name]:
            value = holder.get(key) if isinstance(holder, Mapping) else getattr(holder, key, None)
            if isinstance(value, int):
                return value
    return None


def _read_word(word: str) -> tuple[str, dict[str, object]]:
    """Return what the word is about, and the fields that it sets."""
    head, *options = word.split(":")
    if head in PRECISIONS:
        _at_most(options, 0)
        return "precision", {"precision": head}
    if head == "recompute":
        _at_most(options, 1)
        return "recompute", {"recompute": _recompute(options[0] if options else "full")}
    match = re.fullmatch(r"([a-z]+)([0-9]{1,9})", head)
    name, count = (match[1], int(match[2])) if match else (head, -1)
    if not match and name in (*_COUNTS, "zero"):
        raise LayoutError(f'it takes a number, for example "{name}2"')
    if name == "zero":
        return name, {"zero": count, **_read_zero_options(options)}
    if name == "pp":
        _at_most(options, 2)
        schedule = _one_of(options[0], SCHEDULES) if options else "1f1b"
        return name, {"pp": count, "schedule": schedule, "virtual_stages": _count(options[1]) if options[1:] else SCHEDULES[schedule]}
    if name == "cp":
        _at_most(options, 1)
        return name, {"cp": count, "cp_algorithm": _one_of(options[0], CP_ALGORITHMS) if options else "ring"}
    if name in _COUNTS:
        _at_most(options, 0)
        return name, {name: count}
    raise LayoutError(_unknown(head, options))


def _unknown(head: str, options: list[str]) -> str:
    digits = "".join(re.findall(r"[0-9]+", head)[-1:])
    choices = [f"{name}{digits or 2}" for name in _COUNTS] + [f"zero{stage}" for stage in range(4)] + [*PRECISIONS, "recompute"]
    meant = nearest(head, choices)
    return "unknown word" + (f', did you mean "{":".join([meant, *options])}"?' if meant else f"; the words are {GRAMMAR}")


def _read_zero_options(options: list[str]) -> dict[str, object]:
    values: dict[str, object] = {}
    for option in options:
        group = re.fullmatch(r"group([0-9]{1,9})", option)
        if group:
            field, value = "zero_group", int(group[1])
        elif option == "cpu" or option.startswith("nvme="):
            field, value = "offload", option  # type: ignore[assignment]
        else:
            field, value = "", _one_of(option, ("cpu", "nvme=DIR", "groupN"))  # type: ignore[assignment]
        if not field or field in values:
            raise LayoutError(f'option "{option}" does not belong here: zero takes [:cpu|:nvme=DIR][:groupN]')
        values[field] = value
    return values


def _one_of(option: str, choices: Mapping[str, int] | tuple[str, ...]) -> str:
    if option in choices:
        return option
    meant = nearest(option, choices)
    raise LayoutError(f'unknown option "{option}"' + (f', did you mean "{meant}"?' if meant else f"; it is one of {', '.join(choices)}"))


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise LayoutError(f'"{text}" is not a number')
    return int(text)


def _at_most(options: list[str], count: int) -> None:
    if len(options) > count:
        raise LayoutError(f'option "{options[count]}" does not belong here')


def _recompute(option: str) -> str:
    """Return the option in its canonical form: a budget with the largest suffix that divides it."""
    if option in RECOMPUTES:
        return option
    match = re.fullmatch(_BUDGET, option)
    if not match:
        raise LayoutError(f'unknown option "{option}"; it is one of full, selective, budget=BYTES (for example budget=2GiB)')
    nbytes = int(match[1]) * _SUFFIXES.get(match[2], 1)
    if nbytes < 1:
        raise LayoutError("a budget must be at least 1 byte")
    for suffix, size in _SUFFIXES.items():
        if nbytes % size == 0:
            return f"budget={nbytes // size}{suffix}"
    return f"budget={nbytes}"
