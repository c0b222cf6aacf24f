"""Memory on a GPU that all ranks which share it have mapped: each rank's window, and the words by which their streams wait for one another.

A rank puts what it has for others into a slot of its own window, announces it to each reader, and may use the slot again when they have
acknowledged. Announcements and acknowledgements are counters, one of each for every ordered pair of ranks, in the window of whoever waits for them:

    | announced by rank 0, 1, ... | acknowledged by rank 0, 1, ... | slot 0 | slot 1 |

Streams write and wait for them, so no CPU waits, and a wait can be ended from the host (`release`) when a peer is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from ringfold.collectives.cuda import driver

__all__ = ["SLOTS", "Window"]

SLOTS = 2
# The words come first; slots begin at a multiple of this.
WORDS_NBYTES = 64 * 1024
WORD_NBYTES = 4
# Far ahead of any counter that a stream waits for, and yet not so far that it counts as behind: words wrap at 2^32.
RELEASED = 1 << 30


class Window:
    """This rank's window, of `SLOTS` slots, and its view of the others' once `connect` has been told where they are."""

    def __init__(self, rank: int, size: int, slot_nbytes: int, device: torch.device) -> None:
        self.slot_nbytes = slot_nbytes
        self._rank = rank
        self._size = size
        self._device = device
        self._nbytes = WORDS_NBYTES + SLOTS * slot_nbytes
        self._own = driver.allocate(self._nbytes)
        driver.view(self._own, WORDS_NBYTES, device).zero_()
        driver.write(torch.cuda.current_stream(device), self._own, 0)  # so that a device that cannot do it says so now
        torch.cuda.synchronize(device)
        self._bases: list[int] = []
        self._memory: list[torch.Tensor] = []
        self._announced = [0] * size  # by this rank to each
        self._seen = [0] * size  # by this rank, of each one's announcements
        self._readers: list[dict[int, int]] = [{} for _ in range(SLOTS)]  # of each slot: which acknowledgement of whom frees it

    @property
    def handle(self) -> bytes:
        """What the others need to map this window."""
        return driver.export_handle(self._own)

    def connect(self, handles: Sequence[bytes]) -> None:
        """Map the windows of all ranks."""
        for rank, handle in enumerate(handles):
            self._bases.append(self._own if rank == self._rank else driver.open_handle(handle))
        self._memory = [driver.view(base, self._nbytes, self._device) for base in self._bases]

    def slot(self, rank: int, number: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a slot of a rank's window."""
        begin = WORDS_NBYTES + number * self.slot_nbytes
        return self._memory[rank][begin : begin + self.slot_nbytes].view(dtype)

    def reserve(self, stream: torch.cuda.Stream, number: int) -> None:
        """Have the stream wait until nobody reads this rank's slot any more."""
        for reader, count in self._readers[number].items():
            driver.wait_at_least(stream, self._acknowledged_by(reader, self._rank), count)
        self._readers[number] = {}

    def announce(self, stream: torch.cuda.Stream, number: int, readers: Iterable[int]) -> None:
        """Have the stream say that this rank's slot is filled for these."""
        for reader in readers:
            self._announced[reader] += 1
            self._readers[number][reader] = self._announced[reader]
            driver.write(stream, self._announced_by(self._rank, reader), self._announced[reader])

    def await_announced(self, stream: torch.cuda.Stream, sources: Iterable[int]) -> None:
        """Have the stream wait for the next announcement of each of these."""
        for source in sources:
            self._seen[source] += 1
            driver.wait_at_least(stream, self._announced_by(source, self._rank), self._seen[source])

    def acknowledge(self, stream: torch.cuda.Stream, sources: Iterable[int]) -> None:
        """Have the stream say that this rank has read what these announced last."""
        for source in sources:
            driver.write(stream, self._acknowledged_by(self._rank, source), self._seen[source])

    def release(self, stream: torch.cuda.Stream) -> None:
        """End every wait of this rank's streams; nothing that they have read since means anything. `stream`: one that does not wait."""
        for rank in range(self._size):
            driver.write(stream, self._announced_by(rank, self._rank), self._seen[rank] + RELEASED)
            driver.write(stream, self._acknowledged_by(rank, self._rank), self._announced[rank] + RELEASED)

    def unmap(self) -> None:
        """Unmap the others' windows; nothing on any stream uses them any more."""
        self._memory = []
        for rank, base in enumerate(self._bases):
            if rank != self._rank:
                driver.close_handle(base)
        self._bases = []

    def free(self) -> None:
        """Free this rank's window, which nobody reads any more."""
        driver.free(self._own)

    def _announced_by(self, source: int, reader: int) -> int:
        return self._bases[reader] + WORD_NBYTES * source

    def _acknowledged_by(self, reader: int, source: int) -> int:
        return self._bases[source] + WORD_NBYTES * (self._size + reader)
