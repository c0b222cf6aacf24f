"""Cuts: this rank's pieces of a model as the parameters of an optimizer, and where their values are computed with.

same dtype     the optimizer's parameter is the piece's own memory: its step is seen there
bf16 or fp16   the optimizer's parameter is a master copy in the precision that the model was built in, cut from the values before they
               were rounded; `write_back` rounds it into the piece's memory after a step
offloaded      on a GPU the same: masters lie in host memory; with a file they lie there
"""

from __future__ import annotations

import torch
from ringfold.parallel.bucket import Bucket, Piece, Slot
from ringfold.parallel.zero.rest import Rest
from torch import nn

__all__ = ["Cut", "Cuts"]

Cut = tuple[Piece, nn.Parameter]  # a piece, and the parameter that the optimizer has for it


class Cuts:
    """What one rank owns, bucket by bucket; masters lie where `rest` says."""

    def __init__(self, rest: Rest) -> None:
        self.of: dict[Bucket, list[Cut]] = {}
        self.homes: dict[Bucket, torch.Tensor] = {}  # this rank's range, as it is computed with
        self.masters: dict[Bucket, torch.Tensor] = {}  # the same range, where the optimizer has another copy of it
        self._rest = rest
        self._begins: dict[Bucket, int] = {}  # of this rank's range

    def add(self, bucket: Bucket, rank: int, home: torch.Tensor) -> None:
        """Cut a bucket, whose values `fill` then gives; `home` holds what the rank owns, in the bucket's dtype."""
        trained = home
        original = bucket.slots[0].parameter
        if original.dtype != bucket.dtype or self._rest.needs_masters:
            trained = self.masters[bucket] = self._rest.new_master(home.numel(), original.dtype, bucket.device)
        self.homes[bucket] = home
        self._begins[bucket] = bucket.range(rank).start
        self.of[bucket] = [
            (piece, nn.Parameter(trained[self.start(bucket, piece) :][: piece.numel], requires_grad=original.requires_grad))
            for piece in bucket.pieces(rank)
        ]

    def start(self, bucket: Bucket, piece: Piece) -> int:
        """Return where a piece begins in this rank's range."""
        return piece.slot.start + piece.start - self._begins[bucket]

    def fill(self, bucket: Bucket, slot: Slot, values: torch.Tensor) -> None:
        """Give this rank's piece of a parameter, if it has any, its values; `values` are the whole parameter's, before they are rounded."""
        for piece, mine in self.of[bucket]:
            if piece.slot is slot:
                part = values.reshape(-1)[piece.start : piece.stop]
                mine.detach().copy_(part)
                if bucket in self.masters:
                    self.homes[bucket][self.start(bucket, piece) :][: piece.numel].copy_(part)

    def settle(self, bucket: Bucket) -> None:
        """Take no more memory for a bucket than `rest` says, once it is filled."""
        file = self._rest.file
        for vector in (self.homes[bucket], self.masters.get(bucket)):
            if file is not None and vector is not None and file.holds(vector):
                file.forget_pages(vector)

    @property
    def have_masters(self) -> bool:
        """Whether what is trained is not what is computed with, on this rank or another."""
        return bool(self.masters)

    @property
    def masters_nbytes(self) -> int:
        """Bytes of masters in memory."""
        return sum(master.nbytes for master in self.masters.values() if not self._rest.holds(master))

    def write_back(self) -> None:
        """Round the masters into the memory that is computed with."""
        for bucket, master in self.masters.items():
            self.homes[bucket].copy_(master, non_blocking=True)

    def clear(self) -> None:
        self.of.clear()
        self.masters.clear()
        self.homes.clear()
