"""Putting tensors together: any ranges of any tensors of a checkpoint, from whatever parts they were saved in.

A part is read wholly, its hash checked, then what is wanted of it is copied to where it is wanted (boxes.py); parts that touch nothing wanted
are not read. So memory is that of what is wanted and of one part, however axes of a mesh sharded the tensor then, or do now.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from ringfold.collectives.errors import ConfigError, Corrupt, Incomplete
from ringfold.parallel.placement import Local
from ringfold.runtime.checkpoint.boxes import Box, boxes, overlaps
from ringfold.runtime.checkpoint.manifest import NAME, Part, TensorEntry
from ringfold.runtime.checkpoint.part import local_whole
from ringfold.runtime.checkpoint.tensor_file import read_each


class Range(NamedTuple):
    """Elements `start` to `stop` of a flattened local tensor: of what a rank now wants of the tensor, however it was placed when it was saved."""

    tensor: str
    local: Local
    start: int
    stop: int


def whole(name: str, entry: TensorEntry) -> Range:
    """Return the range that is all of a tensor."""
    return Range(name, local_whole(entry.placement.shape, name), 0, prod(entry.placement.shape))


def read_ranges(folder: Path, tensors: Mapping[str, TensorEntry], sizes: Mapping[str, int], ranges: Collection[Range]) -> dict[Range, torch.Tensor]:
    """Return the elements of each range in new memory on the CPU, 1-dimensional; `sizes` are the axes of the mesh that saved them.

    Raises:
        Incomplete: a file is missing, or parts of a tensor.
        Corrupt: bytes are not those that were written; every file and tensor concerned is named.
    """
    targets = {one: _Target(one, _dtype(tensors[one.tensor])) for one in ranges}
    of_tensor: dict[str, list[_Target]] = {}
    for one, target in targets.items():
        of_tensor.setdefault(one.tensor, []).append(target)
    reading = [_reading(folder, name, tensors[name], part, sizes, wanted) for name, wanted in of_tensor.items() for part in tensors[name].parts]
    _read(folder, tensors, [one for one in reading if one.is_needed])
    for one, target in targets.items():
        if target.filled != target.values.numel():
            raise Incomplete(f"the parts of {one.tensor} in {folder} do not make up the whole of it.")
    return {one: target.values for one, target in targets.items()}


class _Target:
    """Memory for a range; counts what was filled."""

    def __init__(self, one: Range, dtype: torch.dtype) -> None:
        self.values = torch.empty(one.stop - one.start, dtype=dtype, device="cpu")
        self.boxes = boxes(one.local, one.start, one.stop)
        self.filled = 0


@dataclass(frozen=True)
class _Reading:
    """A part to read, of `length` elements, and which of its boxes go where."""

    tensor: str
    part: Part
    length: int
    copies: list[tuple[_Target, Box, Box]]
    is_needed: bool

    def deliver(self, flat: torch.Tensor) -> None:
        for target, theirs, mine in self.copies:
            mine.view(target.values).copy_(theirs.view(flat))
            target.filled += mine.numel


def _reading(folder: Path, tensor: str, entry: TensorEntry, part: Part, sizes: Mapping[str, int], wanted: Collection[_Target]) -> _Reading:
    try:
        local = entry.placement.at(part.coordinate, sizes)
    except ConfigError as error:
        raise Corrupt(f"{folder / NAME}: the part of {tensor} in {part.file} lies on no coordinate of the mesh that saved it: {error}.") from None
    start, stop = part.range or (0, prod(local.shape))
    held = boxes(local, start, stop)
    copies = [(target, theirs, mine) for target in wanted for theirs, mine in overlaps(held, target.boxes)]
    # An empty tensor has a part of nothing, which is read all the same: its file may be damaged.
    return _Reading(tensor, part, stop - start, copies, bool(copies) or 0 in entry.placement.shape)


def _read(folder: Path, tensors: Mapping[str, TensorEntry], reading: Collection[_Reading]) -> None:
    by_file: dict[str, dict[str, _Reading]] = {}
    for one in reading:
        by_file.setdefault(one.part.file, {})[one.part.key(one.tensor)] = one
    problems: list[Corrupt | Incomplete] = []
    for file, parts in by_file.items():
        try:
            for key, read in read_each(folder / file, {key: one.part.sha256 for key, one in parts.items()}):
                _require_form(folder / file, parts[key], read, tensors[parts[key].tensor])
                parts[key].deliver(read.reshape(-1))
        except (Corrupt, Incomplete) as error:
            problems.append(error)
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))


def _require_form(path: Path, one: _Reading, read: torch.Tensor, entry: TensorEntry) -> None:
    dtype = str(read.dtype).removeprefix("torch.")
    if dtype != entry.dtype:
        raise Corrupt(f"{path}: {one.tensor} is {dtype} in its file, and {entry.dtype} in the manifest.")
    if read.numel() != one.length:
        raise Corrupt(f"{path}: {one.tensor} has {read.numel()} elements in its file, and {one.length} in the manifest.")


def _dtype(entry: TensorEntry) -> torch.dtype:
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise Corrupt(f"{entry.placement.name} has the dtype {entry.dtype!r}, which torch does not know.")
    return dtype
