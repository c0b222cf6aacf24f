"""Collectives of ranks that share one GPU, through memory on it that all of them have mapped.

NCCL refuses two ranks on one GPU; this is how code for several runs on one. A rank copies what it has into a slot of its window, the readers fold or
copy it from there; longer vectors go in pieces, through two slots in turn. Every rank folds for itself and in rank order, so all have the same bits,
and no rank waits for a second time: between processes that take turns on a GPU a wait costs more (0.15 ms) than folding what others fold too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from ringfold.collectives._native import Outcome
from ringfold.collectives.codes import FOLDING
from ringfold.collectives.cuda.stream_transport import Message, StreamTransport
from ringfold.collectives.cuda.window import SLOTS, Window
from ringfold.collectives.errors import CommunicationError
from ringfold.collectives.fold import fold_all
from ringfold.collectives.transport import Request
from torch import Tensor

if TYPE_CHECKING:
    from ringfold.collectives.communicator import Communicator

__all__ = ["SharedDeviceTransport"]

# A slot grows with the vectors it is used for, up to this.
LEAST_SLOT_NBYTES = 1 << 20
GREATEST_SLOT_NBYTES = 1 << 26
# Pieces of a slot begin at multiples of this, which every dtype divides.
ALIGN_NBYTES = 64


class SharedDeviceTransport(StreamTransport):
    """Carries out the operations of ranks that share `device`."""

    name = "shared_device"

    def __init__(self, communicator: Communicator, handle: object, fail: Callable[[Outcome], None], device: torch.device) -> None:
        super().__init__(communicator, handle, fail, device)
        self._window: Window | None = None
        self._turn = 0  # which slot the next operation begins with; the same on every rank
        self._spare = torch.cuda.Stream(device)  # never waits

    @classmethod
    def open(cls, communicator: Communicator, handle: object, fail: Callable[[Outcome], None], device: torch.device) -> SharedDeviceTransport | None:
        """Return the transport, or None on every rank if one of them cannot map the others' memory (another namespace, say)."""
        transport = cls(communicator, handle, fail, device)
        if transport._grow(LEAST_SLOT_NBYTES):
            return transport
        transport.close()
        return None

    # -- what the base asks for -------------------------------------------------------------------------------------------------------

    def why_not_native(self, request: Request) -> str | None:  # noqa: ARG002
        return None

    def prepare(self, request: Request) -> None:
        """Make the slots as long as the vector, up to a limit, if every rank knows its length."""
        assert self._window is not None
        if request.op == "all_to_all" and request.input_counts is not None:
            return
        nbytes = request.count * request.dtype.itemsize
        wanted = min(GREATEST_SLOT_NBYTES, 1 << max(0, nbytes - 1).bit_length())
        if wanted > self._window.slot_nbytes and not self._grow(wanted):
            raise CommunicationError(
                f"{request.op} on rank {self.rank} of axis {self._communicator.name}: "
                f"a rank has no GPU memory for a window with slots of {wanted} bytes"
            )

    def run_native(self, request: Request) -> None:
        me, root = self.rank, request.root
        everyone = range(self.size)
        readers = {root} if request.op == "reduce" else set(everyone)
        sources = [root] if request.op == "broadcast" else everyone
        if request.op in FOLDING:
            lengths = dict.fromkeys(sources, 0 if request.output is None else request.output.numel())
        elif request.op == "broadcast":
            lengths = {root: request.count}
        else:
            lengths = dict(enumerate(request.output_counts or [request.count // self.size] * self.size))
        if me not in readers:
            lengths = {}
        if request.op == "reduce_scatter":
            assert request.input is not None
            counts = request.input_counts or [request.count // self.size] * self.size
            strands = {rank: ([rank], piece) for rank, piece in enumerate(request.input.split(list(counts)))}
        else:
            strands = {0: (list(readers), request.input)} if me in sources and request.input is not None else {}
        self._pass(request.dtype, strands, lengths, len(strands) if request.op == "reduce_scatter" else 1, self._taker(request, lengths))

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        tensors = [tensor for _, tensor in (*sends, *receives)]
        if not tensors:
            self._turn = (self._turn + 1) % SLOTS
            return
        places = dict(receives)

        def take(arrived: Mapping[int, Tensor], begin: int) -> None:
            for source, piece in arrived.items():
                places[source][begin : begin + piece.numel()].copy_(piece)

        strands = {peer: ([peer], tensor) for peer, tensor in sends}
        self._pass(tensors[0].dtype, strands, {peer: tensor.numel() for peer, tensor in receives}, self.size, take)

    def release(self) -> None:
        if self._window is not None:
            with torch.cuda.device(self.device):
                self._window.release(self._spare)

    def drain(self) -> None:
        if self._window is not None:
            for slot in range(SLOTS):
                self._window.reserve(self.stream, slot)

    def free(self) -> None:
        window, self._window = self._window, None
        if window is not None:
            with torch.cuda.device(self.device):
                window.unmap()
                window.free()

    # -- through the window -----------------------------------------------------------------------------------------------------------

    def _taker(self, request: Request, lengths: Mapping[int, int]) -> Callable[[Mapping[int, Tensor], int], None]:
        """Return what is done with what has arrived from every source, `begin` elements into it."""
        output = request.output
        if request.op in FOLDING:
            divisor = self.size if request.reduction == "avg" else 1

            def fold(arrived: Mapping[int, Tensor], begin: int) -> None:
                assert output is not None
                parts = [arrived[rank] for rank in sorted(arrived)]
                fold_all(output[begin : begin + parts[0].numel()], parts, request.reduction, divisor)

            return fold
        offsets, end = {}, 0
        for source, length in lengths.items():
            offsets[source] = end
            end += length

        def copy(arrived: Mapping[int, Tensor], begin: int) -> None:
            assert output is not None
            for source, piece in arrived.items():
                if request.op == "broadcast" and source == self.rank:
                    continue
                at = offsets[source] + begin
                output[at : at + piece.numel()].copy_(piece)

        return copy

    def _pass(
        self,
        dtype: torch.dtype,
        strands: Mapping[int, tuple[Sequence[int], Tensor]],
        lengths: Mapping[int, int],
        places: int,
        take: Callable[[Mapping[int, Tensor], int], None],
    ) -> None:
        """Put on the stream: this rank's strands go to their readers, and `take` gets what comes from others.

        strands: by their place among the `places` of a slot, who reads it and what it is. lengths: elements that come from each rank; where a slot
        has several places, they are at the reader's. Both ends of a strand know its length, so they agree on how often it passes, whatever others do.
        """
        window, stream, me = self._window, self.stream, self.rank
        assert window is not None
        capacity = window.slot_nbytes // places // ALIGN_NBYTES * ALIGN_NBYTES // dtype.itemsize
        longest = max([*(tensor.numel() for _, tensor in strands.values()), *lengths.values()], default=0)
        mine = me * capacity if places > 1 else 0
        for number, begin in enumerate(range(0, longest, capacity)):
            slot = (self._turn + number) % SLOTS
            leaving = {place: strand for place, strand in strands.items() if strand[1].numel() > begin}
            if leaving:
                window.reserve(stream, slot)
                own = window.slot(me, slot, dtype)
                for place, (_, tensor) in leaving.items():
                    piece = tensor[begin : begin + capacity]
                    own[place * capacity :][: piece.numel()].copy_(piece)
                window.announce(stream, slot, {reader for readers, _ in leaving.values() for reader in readers} - {me})
            coming = {source: min(capacity, length - begin) for source, length in lengths.items() if length > begin}
            others = [source for source in coming if source != me]
            window.await_announced(stream, others)
            if coming:
                take({source: window.slot(source, slot, dtype)[mine:][:length] for source, length in coming.items()}, begin)
            window.acknowledge(stream, others)
        self._turn = (self._turn + 1) % SLOTS

    # -- the window's size ------------------------------------------------------------------------------------------------------------

    def _grow(self, slot_nbytes: int) -> bool:
        """Replace the window by one with longer slots; collective. False on every rank, and nothing has changed, if one of them cannot have it."""
        window, handle = None, None
        try:
            window = Window(self.rank, self.size, slot_nbytes, self.device)
            handle = window.handle
        except CommunicationError:
            pass  # all hear of it
        handles = self._communicator.all_gather_object(handle)
        is_connected = window is not None and None not in handles
        if window is not None and is_connected:
            try:
                window.connect(handles)
            except CommunicationError:
                is_connected = False
        if not all(self._communicator.all_gather_object(is_connected)):
            if window is not None:
                window.unmap()
                window.free()
            return False
        old, self._window = self._window, window
        if old is not None:
            for slot in range(SLOTS):
                old.reserve(self.stream, slot)
            self.stream.synchronize()
            old.unmap()
            self._communicator.barrier()  # nobody has anybody's old window mapped any more
            old.free()
        return True
