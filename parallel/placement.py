"""Placement: where the parts of one named tensor lie on the mesh.

For each axis a tensor is replicated (every rank holds the same), sharded along one dim (every rank holds a part), or partial (every
rank holds a term of a sum). A fused tensor is sharded piece by piece: with qkv of (6, 2, 2) rows over tp=2, rank 0 holds rows 0-2 of q,
row 0 of k and row 0 of v, and its local tensor is these five rows.

    a run of n over s ranks:  the first n % s ranks hold ceil(n / s), the others floor(n / s)

Several axes may shard one dim: the first axis listed cuts first, and each run that it leaves is cut again by the next.
A placement is a fact about one tensor; it moves no data between ranks. DTensor (torch.distributed.tensor) has the same three kinds,
but neither pieces nor names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from ringfold.collectives.errors import ConfigError

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Replicate:
    """Every rank of the axis holds the same values."""


@dataclass(frozen=True)
class Shard:
    """Every rank of the axis holds a part of `dim`; `pieces` are the lengths along it that are cut each for itself (none: one piece)."""

    dim: int
    pieces: tuple[int, ...] = ()


@dataclass(frozen=True)
class Partial:
    """The global values are the sum over the ranks of the axis."""


Kind = Replicate | Shard | Partial


@dataclass(frozen=True)
class Placement:
    """Where the tensor `name` of `shape` lies; an axis that `axes` leaves out replicates it.

    `sizes` in the methods is the number of ranks along each axis, `coordinate` the place of one rank on each: `layout.sizes` and
    `mesh.coordinate`.

    Raises:
        ConfigError: a shard names a dim that the shape lacks, or pieces that do not add up to it.
    """

    name: str
    shape: tuple[int, ...]
    axes: Mapping[str, Kind] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for axis, kind in self.axes.items():
            if not isinstance(kind, Shard):
                continue
            if not 0 <= kind.dim < len(self.shape):
                raise ConfigError(f"{self.name} has shape {self.shape}: axis {axis} cannot shard dim {kind.dim} of it")
            if kind.pieces and (sum(kind.pieces) != self.shape[kind.dim] or min(kind.pieces) < 0):
                raise ConfigError(
                    f"{self.name} has shape {self.shape}: axis {axis} cuts dim {kind.dim} into pieces {kind.pieces}, "
                    f"which add up to {sum(kind.pieces)} and not to {self.shape[kind.dim]}"
                )

    def __hash__(self) -> int:
        return hash((self.name, self.shape, tuple(self.axes.items())))

    def at(self, coordinate: Mapping[str, int], sizes: Mapping[str, int]) -> Local:
        """Return what the rank at `coordinate` holds, told by the axes that shard the tensor alone: copies are equal.

        Raises:
            ConfigError: as Local.
        """
        axes = [axis for axis, kind in self.axes.items() if isinstance(kind, Shard)]
        return Local(self, *({axis: of[axis] for axis in axes if axis in of} for of in (coordinate, sizes)))

    def local_shape(self, coordinate: Mapping[str, int], sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape of the local tensor at `coordinate`; a length may be 0."""
        return tuple(sum(stop - start for start, stop in runs) for runs in self._runs(coordinate, sizes))

    def blocks(self, coordinate: Mapping[str, int], sizes: Mapping[str, int]) -> Iterator[tuple[Slices, Slices]]:
        """Yield (slices of the global tensor, slices of the local one) for each block that the rank at `coordinate` holds."""
        pairs_of_dim = []
        for runs in self._runs(coordinate, sizes):
            pairs, position = [], 0
            for start, stop in runs:
                pairs.append((slice(start, stop), slice(position, position + stop - start)))
                position += stop - start
            pairs_of_dim.append(pairs)
        for pairs_of_block in product(*pairs_of_dim):
            yield tuple(pair[0] for pair in pairs_of_block), tuple(pair[1] for pair in pairs_of_block)

    def take(self, full: torch.Tensor, coordinate: Mapping[str, int], sizes: Mapping[str, int]) -> torch.Tensor:
        """Return a new tensor with what the rank at `coordinate` holds of `full`.

        Raises:
            ConfigError: `full` has another shape, or the tensor is partial along an axis (no one splits a sum into its terms).
        """
        self._require("full", full, self.shape)
        partial = [axis for axis, kind in self.axes.items() if isinstance(kind, Partial) and sizes[axis] > 1]
        if partial:
            raise ConfigError(f"{self.name} is partial along {', '.join(partial)}: its terms cannot be taken from the sum")
        local = full.new_empty(self.local_shape(coordinate, sizes))
        for of_full, of_local in self.blocks(coordinate, sizes):
            local[of_local] = full[of_full]
        return local

    def put(self, full: torch.Tensor, local: torch.Tensor, coordinate: Mapping[str, int], sizes: Mapping[str, int]) -> None:
        """Write the `local` tensor of the rank at `coordinate` to its place in `full`; add it there if it is a term of a sum.

        Starting from zeros and putting the local tensor of every rank that `is_first_copy` gives the global tensor.

        Raises:
            ConfigError: `full` or `local` has another shape.
        """
        self._require("full", full, self.shape)
        self._require("local", local, self.local_shape(coordinate, sizes))
        is_partial = any(isinstance(kind, Partial) for kind in self.axes.values())
        for of_full, of_local in self.blocks(coordinate, sizes):
            if is_partial:
                full[of_full] += local[of_local]
            else:
                full[of_full] = local[of_local]

    def is_first_copy(self, coordinate: Mapping[str, int]) -> bool:
        """Return whether this rank is the one of its copies that counts: for a norm, or for what is written to a checkpoint."""
        return all(place == 0 for axis, place in coordinate.items() if isinstance(self.axes.get(axis, Replicate()), Replicate))

    def to_json(self) -> str:
        """Return this placement as one line of JSON."""
        axes = {axis: _kind_to_json(kind) for axis, kind in self.axes.items()}
        return json.dumps({"name": self.name, "shape": list(self.shape), "axes": axes})

    @classmethod
    def from_json(cls, text: str) -> Placement:
        """Return the placement that `to_json` wrote.

        Raises:
            ConfigError: the text is not one.
        """
        try:
            value = json.loads(text)
            axes = {str(axis): _kind_from_json(kind) for axis, kind in value["axes"].items()}
            return cls(str(value["name"]), tuple(int(length) for length in value["shape"]), axes)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"not a placement ({error!r}): {text[:200]}") from error

    def _runs(self, coordinate: Mapping[str, int], sizes: Mapping[str, int]) -> list[list[tuple[int, int]]]:
        """Return, for each dim, the runs [start, stop) of global indices that are held, in local order."""
        held = [[(0, length)] for length in self.shape]
        for axis, kind in self.axes.items():
            if isinstance(kind, Shard):
                size, place = sizes[axis], coordinate[axis]
                runs = _split(held[kind.dim], kind.pieces or (self.shape[kind.dim],))
                held[kind.dim] = [_part(start, stop, size, place) for start, stop in runs]
        return held

    def _require(self, what: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise ConfigError(f"{self.name}: the {what} tensor has shape {tuple(tensor.shape)}, expected {shape}")


@dataclass(frozen=True)
class Local:
    """The local tensor at `coordinate` of `placement`, on a mesh of which the axes have `sizes`; `Placement.at` makes it.

    Raises:
        ConfigError: the placement shards an axis that has no such coordinate, or the tensor is partial (no term of a sum has its values).
    """

    placement: Placement
    coordinate: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for axis, kind in self.placement.axes.items():
            if isinstance(kind, Partial):
                raise ConfigError(f"{self.placement.name} is partial along {axis}: its values are known when its terms are summed")
            if isinstance(kind, Shard) and not 0 <= self.coordinate.get(axis, -1) < self.sizes.get(axis, 0):
                place, sizes = dict(self.coordinate), dict(self.sizes)
                raise ConfigError(f"axis {axis} shards {self.placement.name}, and a mesh of sizes {sizes} has no coordinate {place}")

    def __hash__(self) -> int:
        return hash((self.placement, tuple(self.coordinate.items()), tuple(self.sizes.items())))

    def __str__(self) -> str:
        place = " ".join(f"{axis}{place}" for axis, place in self.coordinate.items())
        return " ".join(filter(None, [self.placement.name, str(self.placement.shape), place and f"at {place}"]))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the local tensor; a length may be 0."""
        return self.placement.local_shape(self.coordinate, self.sizes)

    def blocks(self) -> Iterator[tuple[Slices, Slices]]:
        """Yield (slices of the global tensor, slices of the local one) for each block."""
        return self.placement.blocks(self.coordinate, self.sizes)

    def named(self, name: str) -> Local:
        """Return the same place of another tensor: one that has a value for each element of this one."""
        return replace(self, placement=replace(self.placement, name=name))

    def everywhere(self) -> Iterator[Local]:
        """Yield the local tensors that together are the global one, in the order of their coordinates."""
        for places in product(*(range(size) for size in self.sizes.values())):
            yield replace(self, coordinate=dict(zip(self.sizes, places, strict=True)))


def _split(runs: list[tuple[int, int]], pieces: tuple[int, ...]) -> list[tuple[int, int]]:
    """Cut the runs wherever a piece ends."""
    out, end = [], 0
    bounds = [end := end + length for length in pieces]
    for start, stop in runs:
        for bound in bounds:
            if start < bound < stop:
                out.append((start, bound))
                start = bound
        out.append((start, stop))
    return out


def _part(start: int, stop: int, size: int, place: int) -> tuple[int, int]:
    length, extra = divmod(stop - start, size)
    first = start + place * length + min(place, extra)
    return first, first + length + (place < extra)


def _kind_to_json(kind: Kind) -> dict[str, object]:
    match kind:
        case Shard(dim, pieces):
            return {"kind": "shard", "dim": dim, "pieces": list(pieces)}
        case Partial():
            return {"kind": "partial"}
        case _:
            return {"kind": "replicate"}


def _kind_from_json(value: Mapping[str, object]) -> Kind:
    match value:
        case {"kind": "shard", "dim": int(dim), "pieces": [*pieces]}:
            return Shard(dim, tuple(int(str(length)) for length in pieces))
        case {"kind": "partial"}:
            return Partial()
        case {"kind": "replicate"}:
            return Replicate()
    raise ValueError(f"unknown kind {value!r}")
