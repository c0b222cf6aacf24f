"""Rest: where a rank's share of parameters and masters lies between its uses.

nothing       parameters in registered memory of the device, which other ranks read; masters on the device
cpu           both in host memory, pinned where there is a GPU; on a CPU that is where they are anyway
nvme=DIR      both in a file of this rank in DIR
"""

from __future__ import annotations

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.parallel.bucket import ALIGNMENT
from ringfold.parallel.zero.shard_file import BLOCK_NBYTES, ShardFile

__all__ = ["Rest"]


class Rest:
    """The resting place that an `offload` option of a layout names, None for none.

    Raises:
        ConfigError: no file can be made there.
    """

    def __init__(self, offload: str | None, device: torch.device) -> None:
        self.file = ShardFile(offload.removeprefix("nvme=")) if offload is not None and offload != "cpu" else None
        self.needs_masters = offload is not None and device.type != "cpu"  # what the host steps on is not what the device computes with
        self._reserved: torch.Tensor | None = None
        self.is_elsewhere = self.needs_masters or self.file is not None
        # So that pieces begin with a block in memory, and in the file, and are moved without a copy, whatever their dtype.
        self.alignment = ALIGNMENT if self.file is None else BLOCK_NBYTES // 2

    def reserve(self, comm: Communicator, nbytes: int, device: torch.device) -> None:
        """Take the registered memory for all that `new` will return at once: each allocation has to be rounded up to large pages."""
        if not self.is_elsewhere:
            self._reserved = comm.empty(nbytes, dtype=torch.uint8, device=device).zero_()

    def new(self, comm: Communicator, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return zeros for a rank's range of a bucket that other ranks gather."""
        if self.is_elsewhere:
            return self.new_master(numel, dtype, device)
        nbytes = numel * dtype.itemsize
        if self._reserved is None or len(self._reserved) < nbytes:
            return comm.empty(numel, dtype=dtype, device=device).zero_()
        found, self._reserved = self._reserved[:nbytes].view(dtype), self._reserved[nbytes:]
        return found

    def new_master(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return zeros that only this rank sees."""
        if self.file is not None:
            return self.file.new(numel, dtype)
        if self.is_elsewhere:
            return torch.zeros(numel, dtype=dtype, pin_memory=device.type == "cuda")
        return torch.zeros(numel, dtype=dtype, device=device)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor lies in the file."""
        return self.file is not None and self.file.holds(tensor)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
