"""FlatParameters: parameters as views of buckets in registered memory, whole on every rank (stages 1 and 2).

Every rank's optimizer writes its own range; `publish` gathers the ranges of all, in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.bucket import Bucket
from ringfold.parallel.traffic import Traffic
from ringfold.parallel.zero.cuts import Cuts
from ringfold.parallel.zero.group import ShardGroup

__all__ = ["FlatParameters"]


class FlatParameters:
    """Move the parameters of `buckets` into flat memory, and add to `cuts` the pieces of this rank, as parameters that share it.

    The parameters keep their identity, names, shapes and strides.
    """

    def __init__(self, buckets: Sequence[Bucket], group: ShardGroup, cuts: Cuts) -> None:
        self._group = group
        self._flats: list[tuple[Bucket, torch.Tensor]] = []
        self._cuts = cuts
        for bucket in buckets:
            flat = group.whole.empty(bucket.numel, dtype=bucket.dtype, device=bucket.device).zero_()
            self._cuts.add(bucket, group.rank, flat[bucket.range(group.rank)])
            for slot in bucket.slots:
                values = slot.parameter.detach()
                slot.view(flat).copy_(values)
                self._cuts.fill(bucket, slot, values)
                slot.parameter.data = slot.view(flat)
            cuts.settle(bucket)
            self._flats.append((bucket, flat))

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes that this rank keeps of parameters, and of memory that they are gathered into."""
        return sum(flat.nbytes for _, flat in self._flats), 0

    def traffic(self, micro: int) -> list[Traffic]:  # noqa: ARG002  the other kind of parameters travels for each microbatch
        """Return what a step sends of parameters."""
        return [Traffic("parameters", "all_gather", len(self._flats), sum(flat.nbytes for _, flat in self._flats), self._group.size)]

    def publish(self) -> None:
        """Give every rank what the others' optimizers have written.

        Raises:
            ConfigError: parameters lie elsewhere than they were put; all of them are named.
        """
        moved = [
            slot.name
            for bucket, flat in self._flats
            for slot in bucket.slots
            if slot.numel and slot.parameter.data_ptr() != flat.data_ptr() + slot.start * flat.element_size()
        ]
        if moved:
            raise ConfigError(
                f"parameters have left the memory that ZeRO keeps them in: {', '.join(moved)}. Assigning to `.data`, or moving or converting the "
                "model, does that. Change them in place, or before the model is sharded."
            )
        comm = self._group.shard
        works = [comm.all_gather(flat, flat[bucket.range(comm.rank)], async_op=True) for bucket, flat in reversed(self._flats)]
        for work in works:
            if work is not None:
                work.wait()

    def close(self) -> None:
        """Give the parameters ordinary memory of their own."""
        for bucket, _ in self._flats:
            for slot in bucket.slots:
                slot.parameter.data = slot.parameter.detach().clone()
        self._flats.clear()
