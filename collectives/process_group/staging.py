"""Lists of tensors, as torch passes them, as the one vector that a communicator takes.

A list whose tensors lie in a row in one memory (the slices of a larger tensor, as torch's own collectives of objects make them) is that memory.
Any other is copied to or from registered memory, which peers on this host read where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from ringfold.collectives import registered
from ringfold.collectives.operand import DTYPES
from torch import Tensor

__all__ = ["copy_out", "counts_of", "row", "stage"]


def counts_of(tensors: Sequence[Tensor]) -> list[int] | None:
    """Return the elements of each tensor; None if all have the same number."""
    counts = [tensor.numel() for tensor in tensors]
    return counts if any(count != counts[0] for count in counts) else None


def row(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the memory of tensors that lie in a row, as a vector; None if they do not."""
    nonempty = [tensor for tensor in tensors if tensor.numel()]
    if not nonempty:
        return tensors[0].detach().view(-1)
    first = nonempty[0]
    memory, address = first.untyped_storage().data_ptr(), first.data_ptr()
    for tensor in nonempty:
        if tensor.data_ptr() != address or not tensor.is_contiguous() or tensor.untyped_storage().data_ptr() != memory:
            return None
        address += tensor.nbytes
    return first.detach().as_strided((sum(tensor.numel() for tensor in nonempty),), (1,))


def stage(tensors: Sequence[Tensor], *, filled: bool) -> Tensor:
    """Return memory for the elements of all tensors, one after another; `filled` with them."""
    count, dtype, device = sum(tensor.numel() for tensor in tensors), tensors[0].dtype, tensors[0].device
    staged = registered.empty((count,), dtype, device) if dtype in DTYPES else torch.empty(count, dtype=dtype, device=device)
    if filled:
        for tensor, piece in zip(tensors, _pieces(staged, tensors), strict=True):
            piece.copy_(tensor.detach())
    return staged


def copy_out(staged: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy what was staged to where it belongs."""
    for tensor, piece in zip(tensors, _pieces(staged, tensors), strict=True):
        tensor.detach().copy_(piece)


def _pieces(staged: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    counts = [tensor.numel() for tensor in tensors]
    return [staged[end - count : end].view(tensor.shape) for tensor, count, end in zip(tensors, counts, accumulate(counts), strict=True)]
