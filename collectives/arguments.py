"""What is checked about an operation's arguments before anything is sent: ranks, and the elements of whole vectors and of their pieces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ringfold.collectives.errors import CommunicationError, ConfigError
from ringfold.collectives.session import Session

__all__ = ["Arguments"]


class Arguments:
    """The part of a Communicator that knows its ranks, and what fits them."""

    def __init__(self, session: Session, members: tuple[int, ...], name: str) -> None:
        self.session = session
        self.members = members
        self.name = name
        self.rank = members.index(session.rank)
        self.size = len(members)
        self._closed = False

    def _where(self, op: str) -> str:
        return f"{op} on rank {self.rank} of axis {self.name}"

    def _check_peer(self, op: str, peer: int) -> None:
        if not 0 <= peer < self.size:
            raise ConfigError(f"{self._where(op)}: rank {peer} is not among its {self.size} ranks (0 to {self.size - 1})")

    def _check_one_each(self, op: str, values: Sequence[object] | None) -> None:
        if values is None or len(values) != self.size:
            raise ConfigError(f"{self._where(op)}: {0 if values is None else len(values)} values, expected one for each of {self.size} ranks")

    def _at_root(self, op: str, what: str, tensor: torch.Tensor | None, root: int) -> torch.Tensor | None:
        """Return the tensor that only the root has, and None elsewhere."""
        if self.rank != root:
            return None
        if tensor is None:
            raise ConfigError(f"{self._where(op)}: {what} is None, expected a tensor with the pieces of all ranks, since this is rank {root}")
        return tensor

    def _whole(self, piece: int, counts: Sequence[int] | None) -> int:
        return piece * self.size if counts is None else sum(counts)

    def _check_pieces(self, op: str, whole: int, piece: int, counts: Sequence[int] | None) -> None:
        if counts is None:
            if whole != piece * self.size:
                raise ConfigError(
                    f"{self._where(op)}: the whole has {whole} elements and this rank's piece {piece}; "
                    f"expected {piece} x {self.size} = {piece * self.size}, or counts=[elements of each rank's piece]"
                )
        elif len(counts) != self.size or sum(counts) != whole or counts[self.rank] != piece or min(counts) < 0:
            raise ConfigError(
                f"{self._where(op)}: counts {list(counts)} must be {self.size} numbers that add up to {whole}, "
                f"the elements of the whole, with {piece}, this rank's piece, at place {self.rank}"
            )

    def _check_counts(self, op: str, whole: int, counts: Sequence[int]) -> None:
        if len(counts) != self.size or sum(counts) != whole or min(counts) < 0:
            raise ConfigError(
                f"{self._where(op)}: counts {list(counts)} must be {self.size} numbers that add up to {whole}, the elements of their tensor"
            )

    def _require_open(self, op: str) -> None:
        if self._closed or self.session.closed:
            raise CommunicationError(f"{self._where(op)}: the communicator is closed; rf.init() joins the job again")
