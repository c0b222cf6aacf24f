"""Sharding data: each rank gets its rows of every global batch, each sample exactly once an epoch.

    for x, y in rf.shard(loader, mesh["dp"]):                      # loader.batch_size is the GLOBAL batch size
    for x, y in rf.shard(dataset, mesh["dp"], batch_size=32, shuffle=True):
    for x, y in rf.shard(batches, mesh["dp"]):                     # any iterable of global batches, the same on every rank

With a map-style dataset (given itself or in a DataLoader) a rank loads only its own rows; the order of an epoch is a function
of (seed, epoch) alone, so ranks agree on it without a message. A global batch is cut as in rows.py: contiguous, near-even, in
rank order, so the ranks' rows side by side are the global batch whatever their number. The last batch of an epoch may be short;
a rank with no rows in it gets the batch's structure with zero rows.

The state is (epoch, global batches given out), which says nothing of ranks: it resumes at the exact next sample in any world
size. Iteration begins at the state: a pass left early is taken up where it stopped, and the end of an epoch moves the state to
(epoch + 1, 0). What a dataset draws at random while it loads (augmentation) is not part of the state.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from ringfold.collectives.errors import ConfigError, Incompatible
from ringfold.runtime.rows import row_count, row_ranges, take_ranges, take_rows
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler


class Axis(Protocol):
    """What sharding needs of a Communicator."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...


class Cut(NamedTuple):
    """Which rows of a global batch are this rank's: those of an axis, or every size-th of a fixed number of shards (exact mode)."""

    rank: int
    size: int
    shards: int | None = None

    def ranges(self, count: int) -> list[tuple[int, int]]:
        return row_ranges(count, self.rank, self.size, self.shards)


class Batches(Protocol):
    """A source of global batches, of which one rank takes its rows."""

    def identity(self) -> dict[str, int]:
        """Return what must be equal for a position in one source to mean the same in another."""

    def count(self) -> int:
        """Return the global batches of an epoch, or raise TypeError."""

    def read(self, epoch: int, first: int) -> Iterator[Any]:
        """Yield this rank's rows of the global batches `first`, `first` + 1, ... of an epoch."""


class ShardedData:
    """One rank's rows of a sequence of global batches; what `rf.shard` returns.

    `epoch` and `batches` (global batches of this epoch already given out; the loop body's own batch is among them) are the state.
    """

    def __init__(self, source: Batches) -> None:
        self.epoch = 0
        self.batches = 0
        self._source = source

    def __iter__(self) -> Iterator[Any]:
        for batch in self._source.read(self.epoch, self.batches):
            self.batches += 1
            yield batch
        self.epoch += 1
        self.batches = 0

    def __len__(self) -> int:
        """Return the global batches of a whole epoch (not of what is left of it); TypeError if the source does not know."""
        return self._source.count()

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch` at its first batch."""
        self.epoch, self.batches = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Return the position, equal on all ranks and meaningful in any world size, as plain integers."""
        return {"epoch": self.epoch, "batches": self.batches, **self._source.identity()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at a position; the next pass begins with its next sample.

        Raises:
            Incompatible: the position is of other data: another batch size, seed or number of samples.
        """
        here = self._source.identity()
        differences = [f"{name}: {state.get(name)} in the checkpoint, {here[name]} here" for name in here if state.get(name) != here[name]]
        if differences:
            raise Incompatible(
                "the saved position belongs to other data:\n  "
                + "\n  ".join(differences)
                + "\n  Give the same data to go on, or start an epoch of the new data with set_epoch()."
            )
        self.epoch, self.batches = state["epoch"], state["batches"]


def shard(
    source: Any,
    comm: Axis,
    *,
    batch_size: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    drop_last: bool = False,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 0,
    shards: int | None = None,
) -> ShardedData:
    """Give each rank of `comm` its rows of every global batch of `source`.

    `source` is a map-style dataset with `batch_size` (global; the only form that takes the further keywords), a DataLoader over a
    map-style dataset (its dataset, order, collate_fn and workers are taken over, and its batch_size is the global one), or an
    iterable of global batches that all ranks see alike (its `set_epoch` is called, if it has one). What is random is seeded by
    (`seed`, epoch), and in workers by the rank, too. `shards`: cut every batch into so many, of which rank r of n takes r, r + n, ...
    (exact mode; Engine gives it), instead of one for each rank.

    Raises:
        ConfigError: the source is none of these, or the keywords do not go with it.
    """
    if hasattr(comm, "layout"):
        raise ConfigError('rf.shard got a whole mesh, whose ranks do not all read different rows: give it the axis, mesh["dp"]')
    if not hasattr(comm, "rank") or not hasattr(comm, "size"):
        raise ConfigError(f'rf.shard needs a Communicator such as mesh["dp"] as its second argument, not {type(comm).__name__}')
    cut = Cut(comm.rank, comm.size, shards)
    if batch_size is not None:
        if isinstance(source, (DataLoader, IterableDataset)) or not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
            raise ConfigError(
                f"batch_size={batch_size} goes with a map-style dataset (with __len__ and __getitem__), not with {type(source).__name__}: "
                "a DataLoader brings its own, and an iterable must yield global batches already"
            )
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1 (it is the global one), not {batch_size}")
        sampler: Sampler[int] = RandomSampler(source) if shuffle else SequentialSampler(source)
        loader = DataLoader(source, batch_size, sampler=sampler, drop_last=drop_last, collate_fn=collate_fn, num_workers=num_workers)
        return ShardedData(_LoadedRows(loader, cut, seed))
    given = {"shuffle": shuffle, "drop_last": drop_last, "collate_fn": collate_fn, "num_workers": num_workers}
    if any(given.values()):
        names = ", ".join(name for name, value in given.items() if value)
        raise ConfigError(f"{names} goes with a map-style dataset and batch_size=, not with {type(source).__name__}, which has its own")
    if isinstance(source, DataLoader) and not isinstance(source.dataset, IterableDataset) and source.batch_sampler is not None:
        return ShardedData(_LoadedRows(source, cut, seed))
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        raise ConfigError(f"rf.shard of a dataset ({type(source).__name__}) needs batch_size=, the global one")
    if not isinstance(source, Iterable):
        raise ConfigError(f"rf.shard needs an iterable of global batches, a dataset with batch_size= or a DataLoader, not {type(source).__name__}")
    return ShardedData(_CutRows(source, cut))


class _CutRows:
    """Rows cut out of an iterable of global batches that every rank goes through."""

    def __init__(self, source: Iterable[Any], cut: Cut) -> None:
        self._source = source
        self._cut = cut
        self._once = iter(source) is source
        self._drawn = 0  # from a source that can be passed over only once

    def identity(self) -> dict[str, int]:
        return {}

    def count(self) -> int:
        return len(self._source)  # type: ignore[arg-type]

    def read(self, epoch: int, first: int) -> Iterator[Any]:
        if self._once and (epoch > 0 or first < self._drawn):
            raise ConfigError(
                f"{type(self._source).__name__} is an iterator and was used up to batch {self._drawn} of epoch 0; epoch {epoch} from "
                f"batch {first} needs a source that can be iterated again: a list, a DataLoader, or a class with __iter__"
            )
        if hasattr(self._source, "set_epoch"):
            self._source.set_epoch(epoch)
        for index, batch in enumerate(self._source, self._drawn):
            if self._once:
                self._drawn += 1
            if index >= first:
                yield take_ranges(batch, self._cut.ranges(row_count(batch)))


class _LoadedRows:
    """Rows of a map-style dataset, of which this rank loads only its own."""

    def __init__(self, loader: DataLoader[Any], cut: Cut, seed: int) -> None:
        self._cut = cut
        self._seed = seed
        self._size = loader.batch_size
        self._drop_last = loader.drop_last
        # A batch_sampler of the user's own leaves the loader no batch_size, and says itself which samples make a batch.
        self._sampler: Any = loader.batch_sampler if loader.batch_size is None else loader.sampler
        inner = getattr(self._sampler, "sampler", self._sampler)
        if isinstance(inner, DistributedSampler):
            raise ConfigError("the DataLoader has a DistributedSampler, so it is sharded already: give it shuffle=True or a plain sampler instead")
        self._samples = len(loader.dataset)  # type: ignore[arg-type]
        self._mine = _IndexBatches()
        self._loader: DataLoader[Any] = DataLoader(
            loader.dataset,
            batch_sampler=self._mine,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator(),
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    def identity(self) -> dict[str, int]:
        return {"seed": self._seed, "samples": self._samples, "batch_size": self._size or 0}

    def count(self) -> int:
        samples = len(self._sampler)
        if self._size is None:
            return samples
        return samples // self._size if self._drop_last else -(-samples // self._size)

    def read(self, epoch: int, first: int) -> Iterator[Any]:
        batches = self._global_batches(epoch)[first:]
        mine = [[index for start, stop in self._cut.ranges(len(batch)) for index in batch[start:stop]] for batch in batches]
        # One sample tells the structure, dtypes and shapes of a batch that has no rows for this rank.
        self._mine.batches = [rows or batch[:1] for rows, batch in zip(mine, batches, strict=True)]
        self._loader.generator.manual_seed(_mix(self._seed, epoch, self._cut.rank))  # type: ignore[union-attr]
        for indices, rows in zip(mine, self._loader, strict=True):
            yield rows if indices else take_rows(rows, 0, 0)

    def _global_batches(self, epoch: int) -> Sequence[Sequence[int]]:
        """Return the indices of every global batch of an epoch: the same on all ranks."""
        order = _draw(self._sampler, _mix(self._seed, epoch), epoch)
        if self._size is None:
            return order
        return [order[start : start + self._size] for start in range(0, self.count() * self._size, self._size)]


class _IndexBatches(Sampler[list[int]]):
    """The batch sampler of a rank's loader, refilled every epoch so that persistent workers can stay."""

    def __init__(self) -> None:
        self.batches: list[Sequence[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(batch) for batch in self.batches])

    def __len__(self) -> int:
        return len(self.batches)


def _mix(*numbers: int) -> int:
    """Return 63 bits that differ for any other numbers, so that (seed 0, epoch 1) is not (seed 1, epoch 0)."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1


def _draw(sampler: Any, seed: int, epoch: int) -> Sequence[Any]:
    """Return all that a sampler yields in one pass, drawn with every generator it may use seeded; they are put back afterwards."""
    if type(sampler) is SequentialSampler:
        return range(len(sampler))
    samplers = [sampler] + ([sampler.sampler] if isinstance(sampler, BatchSampler) else [])
    own = [(part, part.generator) for part in samplers if hasattr(part, "generator")]
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators, too
        random.seed(seed)
        np.random.seed(seed % 2**32)
        for part in samplers:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        for part, _ in own:
            part.generator = torch.Generator().manual_seed(seed)
        return list(sampler)
    finally:
        for part, generator in own:
            part.generator = generator
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
