"""The fold that no all_reduce can beat on one machine: each rank reads its share of everybody's memory and writes the sum to everybody's.

Nothing is communicated or waited for. The memory is shared and in huge pages where the kernel gives them, as ringfold's registered memory is.
Parts are small enough to stay in a core's cache between the sum and the copies, so memory is read once and written once.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import torch
from ringfold.benchmarks.sides.side import Call, Place, Side, Unsupported
from torch import Tensor

__all__ = ["Floor"]

HUGE_PAGE = 2 << 20
PART_NBYTES = 256 << 10
PROT_NONE, MAP_FIXED, MAP_NORESERVE = 0, 0x10, 0x4000
MADV_HUGEPAGE, MADV_POPULATE_WRITE, MADV_COLLAPSE = 14, 23, 25

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _map(fd: int, nbytes: int) -> int:
    """Map a file at a boundary of huge pages, in a range reserved with room to align in."""
    reserved = _libc.mmap(None, nbytes + HUGE_PAGE, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    aligned = -(-reserved // HUGE_PAGE) * HUGE_PAGE
    address: int = _libc.mmap(aligned, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED, fd, 0)
    if address != aligned:
        raise OSError(ctypes.get_errno(), f"floor: {nbytes} bytes of shared memory cannot be mapped")
    return address


class Floor(Side):
    def __init__(self, place: Place) -> None:
        self.rank, self.size = int(os.environ["RANK"]), place.size
        part = -(-place.max_nbytes // HUGE_PAGE) * HUGE_PAGE
        fd = os.open(place.folder / "floor", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, part * self.size)
        address = _map(fd, part * self.size)
        os.close(fd)
        own = address + self.rank * part
        _libc.madvise(own, part, MADV_HUGEPAGE)
        for at in range(own, own + part, HUGE_PAGE):
            _libc.madvise(at, 1, MADV_POPULATE_WRITE)
        _libc.madvise(own, part, MADV_COLLAPSE)  # bound by no setting of the kernel; where it is missing, pages stay small
        _libc.madvise(own, part, MADV_POPULATE_WRITE)
        self.memory = [torch.frombuffer((ctypes.c_char * part).from_address(address + rank * part), dtype=torch.uint8) for rank in range(self.size)]

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        return self.memory[self.rank][: count * dtype.itemsize].view(dtype)

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def all_reduce(self, tensor: Tensor, reduction: str) -> Call:
        if reduction != "sum":
            raise Unsupported(f"the floor has sums only, not {reduction}")
        shares = [memory[: tensor.nbytes].view(tensor.dtype).tensor_split(self.size)[self.rank] for memory in self.memory]
        parts = list(zip(*[share.split(PART_NBYTES // tensor.itemsize) for share in shares], strict=True))

        def call() -> None:
            for first, *others in parts:
                for other in others:
                    torch.add(first, other, out=first)
                for other in others:
                    other.copy_(first)

        return call
