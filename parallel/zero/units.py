"""Unit: the parameters of one block, of which each rank keeps its ranges, and which are gathered into memory that is lent to it.

    shards   | own range of each bucket |                       for good, in registered memory; offloaded in host memory or a file
    memory   | bucket | bucket |                                lent: whole parameters, while they are needed

Without memory a parameter is one NaN, expanded to its shape: whoever reads it gets NaN and not a stale value, and writing to it raises.
No two units begin with buckets of the same length, so a rank that gathers another unit than its peers is told so by the collective itself
(CollectiveMismatch), instead of training with another block's weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from ringfold.collectives.work import Work
from ringfold.parallel.bucket import Bucket, DtypeOf
from ringfold.parallel.zero.cuts import Cuts
from ringfold.parallel.zero.group import ShardGroup
from ringfold.parallel.zero.initial import Initial
from ringfold.parallel.zero.rest import Rest
from ringfold.parallel.zero.shard_file import Transfer
from torch import nn

__all__ = ["Unit"]

Named = Sequence[tuple[str, nn.Parameter]]


class Unit:
    """The parameters of `named`, in buckets of about `limit_nbytes` at most, trained and frozen apart; the first is as long as none of `others`.

    `fill` comes next: what this rank owns of them lies where `rest` says.
    """

    def __init__(
        self,
        name: str,
        named: Named,
        group: ShardGroup,
        others: Sequence[Bucket],
        limit_nbytes: int,
        dtype_of: DtypeOf,
        rest: Rest,
        device: torch.device,
    ) -> None:
        self.name = name
        self._group = group
        self._rest = rest
        kinds: dict[tuple[torch.dtype, torch.dtype, bool], list[tuple[str, nn.Parameter]]] = {}
        for pair in reversed(named):
            kinds.setdefault((dtype_of(*pair), pair[1].dtype, pair[1].requires_grad), []).append(pair)
        self.buckets: list[Bucket] = []
        for (dtype, _, _), members in kinds.items():
            for run in _equal_runs(members, dtype.itemsize, limit_nbytes):
                self.buckets.append(Bucket(run, group.size, () if self.buckets else others, dtype, rest.alignment, device))
        self.nbytes = sum(bucket.nbytes for bucket in self.buckets)
        self.memory: torch.Tensor | None = None  # bytes, in which this unit's parameters are, or are arriving
        self.is_shown = False
        self.may_change = False  # beside backward, from now on
        self.is_late = False  # whether what is in the memory was gathered after that, and may be new, or half so
        self._flats: list[torch.Tensor] = []  # the buckets in the memory
        self._views: list[torch.Tensor] = []  # the parameters in it
        self._seen: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}  # both, of memory that is lent again and again
        self._works: list[Work] = []
        self._transfers: list[Transfer] = []
        self._shards: list[torch.Tensor] = []
        self._absent: list[torch.Tensor] = []

    def fill(self, cuts: Cuts, initial: Initial) -> None:
        """Give the shards their first values, add them to `cuts`, and hide the parameters; collective."""
        for bucket in self.buckets:
            shard = self._rest.new(self._group.whole, bucket.numel // bucket.ranks, bucket.dtype, bucket.device)
            self._shards.append(shard)
            cuts.add(bucket, self._group.rank, shard)
            for slot in bucket.slots:
                cuts.fill(bucket, slot, initial.of(slot.parameter))
                self._absent.append(torch.full((), float("nan"), device=bucket.device).to(bucket.dtype).expand(slot.shape))
                initial.let_go(slot.parameter, self._absent[-1])
            cuts.settle(bucket)

    @property
    def shards_nbytes(self) -> int:
        """Bytes of memory that this rank's ranges take."""
        return 0 if self._rest.file is not None else sum(shard.nbytes for shard in self._shards)

    @property
    def trained(self) -> list[Bucket]:
        """The buckets that have gradients."""
        return [bucket for bucket in self.buckets if bucket.slots[0].parameter.requires_grad]

    @property
    def parameters(self) -> Iterator[nn.Parameter]:
        return (slot.parameter for bucket in self.buckets for slot in bucket.slots)

    def begin(self, memory: torch.Tensor, *, once: bool = False) -> None:
        """Start to gather the parameters of all ranks into `memory`, `nbytes` long or more, which is lent again later unless `once`."""
        self.memory, self.is_late = memory, self.may_change
        known = self._seen.get(memory.data_ptr())
        if known is None:
            flats = list(self._cut_memory(memory))
            known = flats, [slot.view(flat) for bucket, flat in zip(self.buckets, flats, strict=True) for slot in bucket.slots]
            if not once:
                self._seen[memory.data_ptr()] = known
        self._flats, self._views = known
        mine = [flat[bucket.range(self._group.rank)] for bucket, flat in zip(self.buckets, self._flats, strict=True)]
        file = self._rest.file
        if file is not None:
            self._transfers = [file.fetch(shard, part) for shard, part in zip(self._shards, mine, strict=True)]
            return
        if self._rest.is_elsewhere:
            for shard, part in zip(self._shards, mine, strict=True):
                part.copy_(shard, non_blocking=True)
            self._gather(mine)
        else:
            self._gather(self._shards)

    def show(self) -> None:
        """Wait for the parameters, and let them be seen."""
        if self.is_shown:
            return
        self._wait()
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.data = view
        self.is_shown = True

    def hide(self) -> None:
        """Let the parameters be seen no longer."""
        for parameter, absent in zip(self.parameters, self._absent, strict=True):
            parameter.data = absent
        self.is_shown = False

    def take_over(self) -> None:
        """Make what is in the memory, on this rank, the values of its shards."""
        for bucket, flat, shard in zip(self.buckets, self._flats, self._shards, strict=True):
            shard.copy_(flat[bucket.range(self._group.rank)])

    def give_back(self) -> torch.Tensor | None:
        """Return the memory, in which nothing is arriving any more."""
        self._wait()
        memory, self.memory, self._flats, self._views = self.memory, None, [], []
        return memory

    def moved(self) -> list[str]:
        """Return the names of parameters that are not where they were put."""
        expected = self._views if self.is_shown else self._absent
        slots = [slot for bucket in self.buckets for slot in bucket.slots]
        return [s.name for s, there in zip(slots, expected, strict=True) if s.numel and s.parameter.data_ptr() != there.data_ptr()]

    def _gather(self, shards: Sequence[torch.Tensor]) -> None:
        started = [self._group.shard.all_gather(flat, shard, async_op=True) for flat, shard in zip(self._flats, shards, strict=True)]
        self._works = [work for work in started if work is not None]

    def _wait(self) -> None:
        transfers, self._transfers = self._transfers, []
        for transfer in transfers:
            transfer.wait()
        if transfers:  # not sooner: all ranks have to begin their collectives in one order, and disks are not equally fast
            self._gather([flat[bucket.range(self._group.rank)] for bucket, flat in zip(self.buckets, self._flats, strict=True)])
        works, self._works = self._works, []
        for work in works:
            work.wait()

    def _cut_memory(self, memory: torch.Tensor) -> Iterator[torch.Tensor]:
        begin = 0
        for bucket in self.buckets:
            yield memory[begin : begin + bucket.nbytes].view(bucket.dtype)
            begin += bucket.nbytes


def _equal_runs(members: Named, itemsize: int, limit_nbytes: int) -> list[Named]:
    """Cut members into as few runs as the limit allows, of about one size: the largest sets how long the buffers of gradients are."""
    total = sum(parameter.numel() for _, parameter in members)
    count = max(1, math.ceil(total * itemsize / limit_nbytes))
    runs: list[list[tuple[str, nn.Parameter]]] = [[] for _ in range(count)]
    begin = 0
    for name, parameter in members:
        middle = begin + parameter.numel() / 2
        runs[min(count - 1, int(middle * count / max(1, total)))].append((name, parameter))
        begin += parameter.numel()
    return [run for run in runs if run]
