"""The plan of a save: which rank writes which range of which tensor, worked out alike by all ranks from what each of them holds.

    catalogue of a rank   {section: tree, {tensor: dtype, placement and coordinate, start, stop}}
    1  ranks compare digests of their catalogues, and exchange only the sections that differ
    2  pieces that several ranks hold are written once; if one is more than a rank's share, several ranks write a range of it each
    3  the largest first, each goes to the rank among its holders that has least to write

Ranks that nearly tie are taken in order, so a small checkpoint is one file. The plan covers every tensor, at each coordinate of its
placement, or is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

from ringfold.collectives.errors import CheckpointError
from ringfold.parallel.placement import Local, Placement
from ringfold.runtime.checkpoint.agreement import Ranks
from ringfold.runtime.checkpoint.manifest import part_key
from ringfold.runtime.checkpoint.part import TensorPart, local_whole
from ringfold.runtime.checkpoint.tree import Leaf, merge

SLACK_NBYTES = 1 << 20  # A rank may have so much more to write than the least loaded one: below that another file costs more than it saves.


class Held(NamedTuple):
    """What a rank holds of a tensor: elements `start` to `stop` of its local tensor flattened."""

    dtype: str
    element_nbytes: int
    local: Local
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        return (self.start, self.stop) == (0, prod(self.local.shape))

    @property
    def form(self) -> tuple[str, Placement, Mapping[str, int]]:
        """What all ranks say alike of the tensor."""
        return self.dtype, self.local.placement, self.local.sizes

    def __str__(self) -> str:
        placement, sizes = self.local.placement, self.local.sizes
        divided = f" divided as {dict(placement.axes)} over {dict(sizes)}" if sizes else ""
        return f"{self.dtype} {list(placement.shape)}{divided}"


class Written(NamedTuple):
    """A range that `rank` writes; `key` is its name in the file."""

    rank: int
    section: str
    tensor: str
    coordinate: Mapping[str, int]
    start: int
    stop: int
    key: str
    nbytes: int


@dataclass(frozen=True)
class Catalogue:
    """One section of one rank's state: the encoded tree, and what it holds of each tensor."""

    tree: Any
    tensors: Mapping[str, Held]

    @classmethod
    def of(cls, leaves: Mapping[str, Leaf], tree: Any) -> Catalogue:
        """Return the catalogue of what `encode` returned."""
        return cls(tree, {name: _held(name, leaf) for name, leaf in leaves.items()})

    def digest(self) -> str:
        """Return a text that two catalogues share only if they are equal."""
        return hashlib.sha256(json.dumps([self.tree, self.tensors], default=repr).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """Everything that will be in the checkpoint, and who writes it; `sizes` are the axes that divide any of its tensors."""

    trees: dict[str, Any]
    tensors: dict[str, dict[str, Held]]
    sizes: dict[str, int]
    written: list[Written]
    files: dict[tuple[str, int], str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(one.nbytes for one in self.written)


def make_plan(comm: Ranks | None, mine: Mapping[str, Catalogue], mergers: Mapping[str, Callable[[Sequence[Any]], Any]]) -> Plan:
    """Return the plan for the catalogues of all ranks; collective. `mergers` unite the trees of a section where `merge` is not enough.

    Raises:
        CheckpointError: on every rank; ranks hold different tensors by one name, or their pieces overlap or do not cover a tensor.
    """
    sections = _exchanged(comm, mine)
    size = 1 if comm is None else comm.size
    trees, tensors, pieces = {}, {}, []
    for name, catalogues in sections.items():
        held_by = _by_tensor(name, catalogues)
        trees[name] = mergers.get(name, merge)([c.tree for c in catalogues if c.tree is not None] or [None])
        tensors[name] = {tensor: next(iter(of)) for tensor, of in held_by.items()}
        pieces += [(name, tensor, held, ranks) for tensor, of in held_by.items() for held, ranks in of.items()]
    written = _assigned(pieces, size)
    return Plan(trees, tensors, _sizes(tensors), written, _file_names(written))


def _held(name: str, leaf: Leaf) -> Held:
    if isinstance(leaf, TensorPart):
        values, local, start, stop = leaf.values, leaf.local.named(name), leaf.start, leaf.stop
    else:
        values, local, start, stop = leaf, local_whole(tuple(leaf.shape), name), 0, leaf.numel()
    return Held(str(values.dtype).removeprefix("torch."), values.element_size(), local, start, stop)


def _sizes(tensors: Mapping[str, Mapping[str, Held]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for section, of_name in tensors.items():
        for name, held in of_name.items():
            for axis, size in held.local.sizes.items():
                if found.setdefault(axis, size) != size:
                    raise CheckpointError(f"{section}: {name} is divided over {size} ranks of {axis}, and others over {found[axis]}; save one mesh's")
    return found


def _exchanged(comm: Ranks | None, mine: Mapping[str, Catalogue]) -> dict[str, list[Catalogue]]:
    if comm is None or comm.size == 1:
        return {name: [catalogue] for name, catalogue in mine.items()}
    digests = comm.all_gather_object({name: catalogue.digest() for name, catalogue in mine.items()})
    differing = [name for name in mine if any(of_rank[name] != digests[0][name] for of_rank in digests)]
    everyone = comm.all_gather_object([[mine[name].tree, dict(mine[name].tensors)] for name in differing]) if differing else []
    return {
        name: [Catalogue(*of_rank[differing.index(name)]) for of_rank in everyone] if name in differing else [catalogue] * comm.size
        for name, catalogue in mine.items()
    }


def _by_tensor(section: str, catalogues: Sequence[Catalogue]) -> dict[str, dict[Held, list[int]]]:
    """Return {tensor: {piece: the ranks that hold it}}, pieces of each coordinate in order; refuse what is not exactly one tensor."""
    found: dict[str, dict[Held, list[int]]] = {}
    for rank, catalogue in enumerate(catalogues):
        for name, held in catalogue.tensors.items():
            of_tensor = found.setdefault(name, {})
            first = next(iter(of_tensor), held)
            if held.form != first.form:
                raise CheckpointError(f"{section}: {name} is {held} on rank {rank}, and {first} on rank {of_tensor[first][0]}")
            of_tensor.setdefault(held, []).append(rank)
    for name, of_tensor in found.items():
        found[name] = {}
        for local in next(iter(of_tensor)).local.everywhere():
            found[name] |= _in_order(section, local, {held: ranks for held, ranks in of_tensor.items() if held.local == local})
    return found


def _in_order(section: str, local: Local, of_local: Mapping[Held, list[int]]) -> dict[Held, list[int]]:
    """Return the pieces of one local tensor in order; refuse what is not exactly that."""
    pieces = sorted(of_local, key=lambda one: (one.start, one.stop))
    found = {one: of_local[one] for one in pieces if one.start < one.stop or 0 in local.placement.shape}
    length, reached, what = prod(local.shape), 0, str(local) if local.coordinate else local.placement.name
    for one, ranks in found.items():
        if one.start != reached:
            wrong = "nobody holds" if one.start > reached else "several ranks hold different pieces with"
            begin, end = sorted((one.start, reached))
            raise CheckpointError(f"{section}: {wrong} elements {begin} to {end} of {what}, seen on rank {ranks[0]}")
        reached = one.stop
    if reached != length:
        raise CheckpointError(f"{section}: nobody holds elements {reached} to {length} of {what}")
    return found


def _assigned(pieces: Sequence[tuple[str, str, Held, list[int]]], size: int) -> list[Written]:
    total = sum((held.stop - held.start) * held.element_nbytes for _, _, held, _ in pieces)
    share = max(-(-total // size), SLACK_NBYTES)
    ranges = []
    for section, tensor, held, ranks in pieces:
        cuts = min(len(ranks), -(-(held.stop - held.start) * held.element_nbytes // share)) or 1
        bounds = [held.start + (held.stop - held.start) * cut // cuts for cut in range(cuts + 1)]
        is_whole = held.is_whole and cuts == 1
        ranges += [(section, tensor, held, start, stop, is_whole, ranks) for start, stop in pairwise(bounds)]
    # What has one holder leaves no choice, so it comes first.
    ranges.sort(key=lambda one: (len(one[-1]) > 1, -(one[4] - one[3]) * one[2].element_nbytes))
    load, written = [0] * size, []
    for section, tensor, held, start, stop, is_whole, ranks in ranges:
        least = min(load[rank] for rank in ranks)
        rank = next(rank for rank in ranks if load[rank] <= least + SLACK_NBYTES)
        nbytes = (stop - start) * held.element_nbytes
        load[rank] += nbytes
        key = part_key(tensor, None if is_whole else (start, stop))
        written.append(Written(rank, section, tensor, held.local.coordinate, start, stop, key, nbytes))
    if len({(one.section, one.key) for one in written}) < len({(one.section, one.key, one.tensor) for one in written}):
        raise CheckpointError("the state holds tensors that are named like ranges of others, such as w[0:4]; give them other names")
    return written


def _file_names(written: Sequence[Written]) -> dict[tuple[str, int], str]:
    """Return the file of each (section, rank) that writes one, numbered as is usual if there are several."""
    names = {}
    for section in dict.fromkeys(one.section for one in written):
        ranks = sorted({one.rank for one in written if one.section == section})
        for place, rank in enumerate(ranks, 1):
            names[section, rank] = f"{section}-{place:05}-of-{len(ranks):05}.safetensors" if len(ranks) > 1 else f"{section}.safetensors"
    return names
