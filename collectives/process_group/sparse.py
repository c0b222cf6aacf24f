"""The sum of sparse (COO) tensors: everybody gets everybody's entries, and adds them up.

cost for k entries of width w and d sparse dims on each of n ranks: n k (w + 8 d) bytes-worth of elements arrive at each rank
"""

from __future__ import annotations

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.collectives.work import Work
from torch import Tensor

__all__ = ["SparseSum"]


class SparseSum:
    """The all_reduce of one sparse tensor in flight: when `works` are complete, `finish` puts the sum in its place.

    Making one waits until the ranks have told each other how many entries they hold.

    Raises: ConfigError, if the ranks' tensors differ in shape or in their number of sparse dims.
    """

    def __init__(self, tensor: Tensor, communicator: Communicator) -> None:
        self._tensor = tensor
        mine = tensor.detach().coalesce()
        form = [mine.sparse_dim(), *mine.shape]
        told = torch.tensor([mine._nnz(), len(form), *form], device="cpu")
        forms = torch.empty(communicator.size, len(told), dtype=torch.int64, device="cpu")
        communicator.all_gather(forms, told)
        if any(other[1:] != told.tolist()[1:] for other in forms.tolist()):
            raise ConfigError(
                f"all_reduce of a sparse tensor on rank {communicator.rank} of axis {communicator.name}: ranks have "
                f"(sparse dims, shape) of {[tuple(other[2:]) for other in forms.tolist()]}, expected the same everywhere"
            )
        self._counts = forms[:, 0].tolist()
        values, indices = mine.values().contiguous(), mine.indices().t().contiguous()
        total = sum(self._counts)
        self._indices = torch.empty(total, indices.shape[1], dtype=torch.int64, device=indices.device)
        self._values = torch.empty(total, *values.shape[1:], dtype=values.dtype, device=values.device)
        self.works: list[Work] = []
        for gathered, own in ((self._indices, indices), (self._values, values)):
            width = own[0].numel() if len(own) else gathered[0].numel() if total else 0
            work = communicator.all_gather(gathered, own, counts=[count * width for count in self._counts], async_op=True)
            assert work is not None
            self.works.append(work)

    def finish(self) -> None:
        """Replace the tensor by the sum, its entries in order."""
        total = torch.sparse_coo_tensor(self._indices.t(), self._values, self._tensor.shape).coalesce()
        with torch.no_grad():  # detach() of a sparse tensor is another tensor, with entries of its own
            self._tensor.copy_(total)
