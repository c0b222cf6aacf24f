"""Putting tensors together: any ranges of any tensors of a checkpoint, from whatever parts they were saved in.

A part is read wholly, its hash checked, then what is wanted of it is copied; parts that touch nothing wanted are not read. So memory is
that of what is wanted and of one part. Tensors that axes of a mesh shard are put together wholly, then cut.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from ringfold.collectives.errors import ConfigError, Corrupt, Incomplete
from ringfold.runtime.checkpoint.manifest import Part, TensorEntry
from ringfold.runtime.checkpoint.tensor_file import read_each


class Range(NamedTuple):
    """Elements `start` to `stop` of a tensor flattened."""

    tensor: str
    start: int
    stop: int


def whole(name: str, entry: TensorEntry) -> Range:
    """Return the range that is all of a tensor."""
    return Range(name, 0, prod(entry.placement.shape))


def read_ranges(folder: Path, tensors: Mapping[str, TensorEntry], sizes: Mapping[str, int], ranges: Collection[Range]) -> dict[Range, torch.Tensor]:
    """Return the elements of each range in new memory on the CPU, 1-dimensional; `sizes` are the axes of the mesh that saved them.

    Raises:
        Incomplete: a file is missing, or parts of a tensor.
        Corrupt: bytes are not those that were written; every file and tensor concerned is named.
    """
    found: dict[Range, torch.Tensor] = {}
    plain = [one for one in ranges if not tensors[one.tensor].placement.axes]
    targets: dict[str, list[_Target]] = {}
    for one in plain:
        found[one] = torch.empty(one.stop - one.start, dtype=_dtype(tensors[one.tensor]), device="cpu")
        targets.setdefault(one.tensor, []).append(_Target(one.start, found[one], prod(tensors[one.tensor].placement.shape)))
    reading = [_Reading(name, part, wanted) for name, wanted in targets.items() for part in tensors[name].parts]
    sharded = {one.tensor: _Sharded(tensors[one.tensor], sizes) for one in ranges if tensors[one.tensor].placement.axes}
    for name, shards in sharded.items():
        reading += [_Reading(name, part, [shards.target(part)]) for part in tensors[name].parts]
    _read(folder, tensors, reading)
    fulls = {name: shards.full().reshape(-1) for name, shards in sharded.items()}
    for one in ranges:
        if one.tensor in fulls:
            found[one] = fulls[one.tensor][one.start : one.stop].clone()
    return found


class _Target:
    """Memory for the elements from `start` on of a flattened local tensor that has `length` in all; counts what was filled."""

    def __init__(self, start: int, values: torch.Tensor, length: int) -> None:
        self.start, self.values, self.length = start, values, length
        self.filled = 0

    def overlap(self, part: Part) -> tuple[int, int]:
        start, stop = part.range or (0, self.length)
        return max(start, self.start), min(stop, self.start + self.values.numel())

    def fill(self, part: Part, flat: torch.Tensor) -> None:
        first, last = self.overlap(part)
        begins = part.range[0] if part.range else 0
        if first < last:
            self.values[first - self.start : last - self.start] = flat[first - begins : last - begins]
            self.filled += last - first


class _Reading(NamedTuple):
    """A part to read, and where its elements go."""

    tensor: str
    part: Part
    targets: list[_Target]

    @property
    def is_needed(self) -> bool:
        # An empty tensor has a part of nothing, which is read all the same: its file may be damaged.
        return any(target.overlap(self.part)[0] < target.overlap(self.part)[1] or target.length == 0 for target in self.targets)


class _Sharded:
    """A tensor of which each coordinate of a mesh holds a local tensor."""

    def __init__(self, entry: TensorEntry, sizes: Mapping[str, int]) -> None:
        self._entry, self._sizes = entry, sizes
        self._locals: dict[tuple[tuple[str, int], ...], _Target] = {}

    def target(self, part: Part) -> _Target:
        place = tuple(sorted(part.coordinate.items()))
        if place not in self._locals:
            try:
                length = prod(self._entry.placement.local_shape(part.coordinate, self._sizes))
            except KeyError as error:
                raise Corrupt(f"a part of {self._entry.placement.name} lies on no coordinate of the mesh: {error}") from None
            self._locals[place] = _Target(0, torch.empty(length, dtype=_dtype(self._entry), device="cpu"), length)
        return self._locals[place]

    def full(self) -> torch.Tensor:
        placement = self._entry.placement
        full = torch.zeros(placement.shape, dtype=_dtype(self._entry), device="cpu")
        for place, target in self._locals.items():
            coordinate = dict(place)
            try:
                placement.put(full, target.values.view(placement.local_shape(coordinate, self._sizes)), coordinate, self._sizes)
            except (ConfigError, KeyError) as error:
                raise Corrupt(f"the parts of {placement.name} do not fit its placement: {error}") from None
        return full


def _read(folder: Path, tensors: Mapping[str, TensorEntry], reading: Collection[_Reading]) -> None:
    by_file: dict[str, dict[str, _Reading]] = {}
    for one in reading:
        if one.is_needed:
            by_file.setdefault(one.part.file, {})[one.part.key(one.tensor)] = one
    problems: list[Corrupt | Incomplete] = []
    for file, parts in by_file.items():
        try:
            for key, read in read_each(folder / file, {key: one.part.sha256 for key, one in parts.items()}):
                one = parts[key]
                _require_form(folder / file, one, read, tensors[one.tensor])
                for target in one.targets:
                    target.fill(one.part, read.reshape(-1))
        except (Corrupt, Incomplete) as error:
            problems.append(error)
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))
    for one in reading:
        if any(target.filled != target.values.numel() for target in one.targets):
            raise Incomplete(f"the parts of {one.tensor} in {folder} do not make up the whole of it.")


def _require_form(path: Path, one: _Reading, read: torch.Tensor, entry: TensorEntry) -> None:
    dtype = str(read.dtype).removeprefix("torch.")
    if dtype != entry.dtype:
        raise Corrupt(f"{path}: {one.tensor} is {dtype} in its file, and {entry.dtype} in the manifest.")
    length = one.part.range[1] - one.part.range[0] if one.part.range else one.targets[0].length
    if read.numel() != length:
        raise Corrupt(f"{path}: {one.tensor} has {read.numel()} elements in its file, and {length} in the manifest.")


def _dtype(entry: TensorEntry) -> torch.dtype:
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise Corrupt(f"{entry.placement.name} has the dtype {entry.dtype!r}, which torch does not know.")
    return dtype
