"""Rows of a nested batch: counting them, and cutting a contiguous range out of all of them at once.

A batch is a tensor, or tuples, lists, mappings and dataclasses of batches. Dim 0 of every tensor and array counts rows, and they
all count the same. A list or plain tuple that holds no tensor or array anywhere (file names, Python numbers) is a column with one
entry a row; 0-dim tensors, strings, numbers and None have no rows and pass unchanged.

    row_range(10, rank, 4): 0..3, 3..6, 6..8, 8..10      the first count % size ranks have one row more

It does not copy: what `take_rows` returns are views of the batch. A list of per-row tensors of differing shapes (a detection
collate) is structure, not rows: stack them, or shard the dataset, whose samples are cut before they are collated.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from ringfold.collectives.errors import ConfigError


def row_range(count: int, rank: int, size: int) -> tuple[int, int]:
    """Return (start, stop) of the rows that `rank` of `size` has among `count`: contiguous, in rank order, at most one row apart."""
    rows, longer = divmod(count, size)
    start = rank * rows + min(rank, longer)
    return start, start + rows + (rank < longer)


def row_ranges(count: int, rank: int, size: int, shards: int | None = None) -> list[tuple[int, int]]:
    """Return the ranges of rows that `rank` of `size` has among `count` if they are cut into `shards`, of which it takes every size-th.

    Without `shards` there are as many as ranks: one range. The ranges' lengths do not increase, and differ by one row at most, so cutting
    these rows again into as many parts gives the same shards.
    """
    return [row_range(count, shard, shards or size) for shard in range(rank, shards or size, size)]


def row_count(batch: Any) -> int:
    """Return the number of rows of a batch.

    Raises:
        ConfigError: parts of the batch disagree (all of them are listed), or nothing in it has rows.
    """
    counts = dict(_counts(batch, "batch"))
    if len(set(counts.values())) == 1:
        return next(iter(counts.values()))
    if not counts:
        raise ConfigError(f"a global batch of type {type(batch).__name__} has no rows: it holds no tensor with a dim 0 and no list")
    listed = "".join(f"\n  {path}: {count}" for path, count in counts.items())
    raise ConfigError(f"the parts of a global batch have different numbers of rows (dim 0):{listed}\n  Give every tensor one entry a row.")


def take_rows(batch: Any, start: int, stop: int) -> Any:
    """Return the same structure with rows start..stop of every tensor, array and column; tensors and arrays are views of the batch's."""

    def cut(part: Any) -> Any:
        return part[start:stop]

    return _map_rows(batch, cut)


def take_ranges(batch: Any, ranges: Sequence[tuple[int, int]]) -> Any:
    """Return the same structure with the rows of all ranges, one behind the other; views of the batch's if there is one range."""
    if len(ranges) == 1:
        return take_rows(batch, *ranges[0])

    def cut(part: Any) -> Any:
        parts = [part[start:stop] for start, stop in ranges]
        if isinstance(part, torch.Tensor):
            return torch.cat(parts)
        if isinstance(part, np.ndarray):
            return np.concatenate(parts)
        return type(part)(entry for rows in parts for entry in rows)

    return _map_rows(batch, cut)


def _has_rows(part: Any) -> bool:
    return isinstance(part, (torch.Tensor, np.ndarray)) and part.ndim > 0


def _is_column(part: Any) -> bool:
    return type(part) in (list, tuple) and len(part) > 0 and not _holds_tensor(part)


def _is_record(part: Any) -> bool:
    return dataclasses.is_dataclass(part) and not isinstance(part, type)


def _holds_tensor(part: Any) -> bool:
    if isinstance(part, (torch.Tensor, np.ndarray)):
        return True
    return any(_holds_tensor(child) for _, child in _children(part))


def _children(part: Any) -> Iterator[tuple[str, Any]]:
    """Yield (suffix of the path, child) of a structure; nothing for a leaf."""
    if isinstance(part, Mapping):
        yield from ((f"[{key!r}]", child) for key, child in part.items())
    elif isinstance(part, (tuple, list)):
        yield from ((f"[{index}]", child) for index, child in enumerate(part))
    elif _is_record(part):
        yield from ((f".{field.name}", getattr(part, field.name)) for field in dataclasses.fields(part))


def _counts(part: Any, path: str) -> Iterator[tuple[str, int]]:
    if _has_rows(part):
        yield path, part.shape[0]
    elif _is_column(part):
        yield path, len(part)
    else:
        for suffix, child in _children(part):
            yield from _counts(child, path + suffix)


def _map_rows(part: Any, cut: Callable[[Any], Any]) -> Any:
    if _has_rows(part) or _is_column(part):
        return cut(part)
    if isinstance(part, Mapping):
        items = {key: _map_rows(child, cut) for key, child in part.items()}
        if type(part) is dict or not isinstance(part, MutableMapping):
            return items
        clone = copy.copy(part)  # keeps what a subclass carries besides its items
        clone.update(items)
        return clone
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*(_map_rows(child, cut) for child in part))
    if isinstance(part, (tuple, list)):
        return type(part)(_map_rows(child, cut) for child in part)
    if _is_record(part):
        fields = [field.name for field in dataclasses.fields(part) if field.init]
        return dataclasses.replace(part, **{name: _map_rows(getattr(part, name), cut) for name in fields})
    return part
