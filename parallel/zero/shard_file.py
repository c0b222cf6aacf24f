"""ShardFile: tensors that lie in a file, seen through a mapping, and moved to and from memory beside the computation.

    resting = file.new(numel, dtype)        a tensor like any other: pages come and go as the system likes
    file.fetch(resting, into).wait()        read it into memory, past the page cache where the file system allows (direct I/O)
    file.store(resting, values).wait()      write it

The file has no name from the beginning, so nothing of it is left however the process ends. Its space is taken when a tensor is made, not when
it is first written: a disk that is too small says so before training. One thread does all transfers in the order in which they were asked
for; while it does the caller computes. Memory of a GPU is reached through pinned memory, in the order of the caller's stream. The kernel keeps
mapping and direct transfers coherent, as long as nobody changes through one what is under way through the other.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from ringfold.collectives.errors import ConfigError

__all__ = ["BLOCK_NBYTES", "ShardFile", "Transfer"]

BLOCK_NBYTES = 4096  # what address, offset and length of a direct transfer are multiples of
BOUNCE_NBYTES = 4 << 20  # through which goes what is not
Move = Callable[[int, list[memoryview], int], int]  # os.preadv, os.pwritev
DEADLINE_S = 600.0  # for all transfers that are under way: a disk that is this slow has failed


class Transfer:
    """What is under way between a file and memory."""

    def __init__(self, future: Future[None], directory: Path) -> None:
        self._future = future
        self._directory = directory

    def wait(self) -> None:
        """Return when it is done.

        Raises:
            OSError: the disk failed, or has not answered for ten minutes.
        """
        try:
            self._future.result(DEADLINE_S)
        except TimeoutError as error:
            raise OSError(errno.ETIMEDOUT, f"offload: the disk of {self._directory} has not answered for {DEADLINE_S:g} s") from error


class ShardFile:
    """A file without a name in `directory`.

    Raises:
        ConfigError: the directory is not there, or nothing can be written in it.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._fd, self.is_direct = _open_nameless(self.directory)
        self._end = 0
        self._mapped: dict[int, tuple[int, mmap.mmap]] = {}  # by address of the storage, where it begins in the file
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ringfold-shard-file")
        self._bounce: mmap.mmap | None = None
        self._stream: torch.cuda.Stream | None = None
        self._pinned: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the disk that are taken."""
        return self._end

    def new(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor of zeros that lies in the file; it has an element at least.

        Raises:
            ConfigError: the disk has no room for it.
        """
        nbytes = -(-numel * dtype.itemsize // BLOCK_NBYTES) * BLOCK_NBYTES
        try:
            os.posix_fallocate(self._fd, self._end, nbytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            free = shutil.disk_usage(self.directory).free
            raise ConfigError(
                f"offload: {self.directory} has no room ({error.strerror}): {_gib(free)} are free, this rank has taken {_gib(self._end)} there and "
                f"needs {_gib(nbytes)} for its next shard alone. Take a folder on another disk, more ranks, or `:cpu`."
            ) from error
        mapping = mmap.mmap(self._fd, nbytes, offset=self._end)
        tensor = torch.frombuffer(mapping, dtype=dtype, count=numel)
        self._mapped[tensor.data_ptr()] = self._end, mapping
        self._end += nbytes
        return tensor

    def holds(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor is one that `new` made, or a view of one."""
        return tensor.untyped_storage().data_ptr() in self._mapped

    def fetch(self, resting: torch.Tensor, into: torch.Tensor) -> Transfer:
        """Begin to read a resting tensor, or a part of one that begins with a block, into contiguous memory as long."""
        return self._begin(os.preadv, resting, into, to_memory=True)

    def store(self, resting: torch.Tensor, values: torch.Tensor) -> Transfer:
        """Begin to write contiguous memory to a resting tensor, or a part of one that begins with a block, as long."""
        return self._begin(os.pwritev, resting, values, to_memory=False)

    def _begin(self, call: Move, resting: torch.Tensor, tensor: torch.Tensor, *, to_memory: bool) -> Transfer:
        offset = self._offset(resting)
        if not tensor.is_cuda:
            return Transfer(self._thread.submit(self._transfer, call, offset, tensor, to_memory=to_memory), self.directory)
        used_before = torch.cuda.current_stream(tensor.device).record_event()  # what is under way there may still use the memory
        return Transfer(self._thread.submit(self._transfer_pinned, call, offset, tensor, used_before, to_memory=to_memory), self.directory)

    def _offset(self, resting: torch.Tensor) -> int:
        return self._mapped[resting.untyped_storage().data_ptr()][0] + int(resting.storage_offset()) * resting.itemsize

    def forget_pages(self, resting: torch.Tensor) -> None:
        """Write what was changed through the mapping, and give its pages back to the system."""
        offset, mapping = self._mapped[resting.data_ptr()]
        mapping.flush()
        mapping.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self._fd, offset, len(mapping), os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """End the thread and give the space back; tensors stay readable as long as someone holds them."""
        self._thread.shutdown()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._mapped.clear()
        self._pinned = None

    def _transfer_pinned(self, call: Move, offset: int, tensor: torch.Tensor, used_before: torch.cuda.Event, *, to_memory: bool) -> None:
        if self._stream is None or self._pinned is None:
            self._stream = torch.cuda.Stream(tensor.device)
            self._pinned = torch.empty(BOUNCE_NBYTES, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(used_before)
            for number, part in enumerate(tensor.view(torch.uint8).split(BOUNCE_NBYTES)):
                pinned = self._pinned[: part.numel()]
                if not to_memory:
                    pinned.copy_(part)
                self._transfer(call, offset + number * BOUNCE_NBYTES, pinned, to_memory=to_memory)
                if to_memory:
                    part.copy_(pinned)  # waits: whoever sees the transfer done may use it on any stream

    def _transfer(self, call: Move, offset: int, tensor: torch.Tensor, *, to_memory: bool) -> None:
        address, left = tensor.data_ptr(), tensor.nbytes
        if not self.is_direct or address % BLOCK_NBYTES == 0:
            whole = left if not self.is_direct else left // BLOCK_NBYTES * BLOCK_NBYTES
            self._run(call, offset, _memory(address, whole))
            address, offset, left = address + whole, offset + whole, left - whole
        while left:  # the tail of a block, or all of what lies askew
            if self._bounce is None:
                self._bounce = mmap.mmap(-1, BOUNCE_NBYTES)
            part = min(left, BOUNCE_NBYTES)
            blocks = memoryview(self._bounce)[: -(-part // BLOCK_NBYTES) * BLOCK_NBYTES]
            if not to_memory:
                blocks[:part] = _memory(address, part)
            self._run(call, offset, blocks)
            if to_memory:
                _memory(address, part)[:] = blocks[:part]
            address, offset, left = address + part, offset + part, left - part

    def _run(self, call: Move, offset: int, memory: memoryview) -> None:
        done = 0
        while done < len(memory):
            moved = call(self._fd, [memory[done:]], offset + done)
            if moved <= 0:
                raise OSError(errno.EIO, f"{self.directory}: {call.__name__} moved nothing at {offset + done}")
            done += moved


def _memory(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def _open_nameless(directory: Path) -> tuple[int, bool]:
    """Open a file that is in no folder, for direct transfers where the file system has them; return whether it has."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        for direct in (os.O_DIRECT, 0):
            try:
                return os.open(directory, flags | os.O_TMPFILE | direct, 0o600), bool(direct)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EISDIR):
                    raise
        fd, path = tempfile.mkstemp(prefix="ringfold-", dir=directory)
        os.unlink(path)
        return fd, False
    except OSError as error:
        raise ConfigError(
            f"offload: no file can be made in {str(directory)!r} ({error.strerror}). It must be a folder on a local disk that may be written."
        ) from error


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**28 else f"{nbytes / 2**20:.1f} MiB"
