"""Cuts: this rank's pieces of a model as the parameters of an optimizer, and where their values are computed with.

same dtype     the optimizer's parameter is the piece's own memory: its step is seen there
bf16 or fp16   the optimizer's parameter is a master copy in the precision that the model was built in, cut from the values before they
               were rounded; `write_back` rounds it into the piece's memory after a step
"""

from __future__ import annotations

import torch
from ringfold.parallel.bucket import Bucket, Piece
from torch import nn

__all__ = ["Cut", "Cuts"]

Cut = tuple[Piece, nn.Parameter]  # a piece, and the parameter that the optimizer has for it


class Cuts:
    """What one rank owns, bucket by bucket."""

    def __init__(self) -> None:
        self.of: dict[Bucket, list[Cut]] = {}
        self._masters: list[torch.Tensor] = []
        self._homes: list[torch.Tensor] = []

    def add(self, bucket: Bucket, rank: int, range_of_rank: torch.Tensor) -> None:
        """Cut a bucket whose parameters still have their first values; `range_of_rank` holds what the rank owns, in the bucket's dtype."""
        begin = bucket.range(rank).start
        cuts: list[Cut] = []
        for piece in bucket.pieces(rank):
            original = piece.slot.parameter
            home = range_of_rank[piece.slot.start + piece.start - begin :][: piece.numel]
            values = home
            if original.dtype != bucket.dtype:
                values = original.detach().reshape(-1)[piece.start : piece.stop].clone()
                self._masters.append(values)
                self._homes.append(home)
            cuts.append((piece, nn.Parameter(values, requires_grad=original.requires_grad)))
        self.of[bucket] = cuts

    @property
    def have_masters(self) -> bool:
        """Whether any piece is computed with in another precision than it is trained in."""
        return bool(self._masters)

    @property
    def masters_nbytes(self) -> int:
        return sum(master.nbytes for master in self._masters)

    def write_back(self) -> None:
        """Round the masters into the memory that is computed with."""
        if self._masters:
            torch._foreach_copy_(self._homes, self._masters)

    def clear(self) -> None:
        self.of.clear()
        self._masters.clear()
        self._homes.clear()
