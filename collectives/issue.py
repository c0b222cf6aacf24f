"""How a communicator's operations are issued: arguments checked, tensors made fit, a schedule chosen and compiled once, the core called.

The way of a small operation is short, since it is run a hundred thousand times a second: a plan is looked up by what the caller gave, and one call
of the core does the rest. Whatever is special about tensors goes through operand.py and comes back here.
"""

from __future__ import annotations

import struct
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from ringfold.collectives import registered, select
from ringfold.collectives._native import Outcome, core, failure
from ringfold.collectives.algorithms import build
from ringfold.collectives.arguments import Arguments
from ringfold.collectives.codes import FOLDING, OPERATIONS
from ringfold.collectives.cost import Topology
from ringfold.collectives.errors import CollectiveMismatch, CollectiveTimeout, ConfigError, PeerLost
from ringfold.collectives.operand import DTYPES, prepare, reduction_code, require_arithmetic
from ringfold.collectives.order import OrderCheck, describe
from ringfold.collectives.session import Session
from ringfold.collectives.transport import Request, Transport
from ringfold.collectives.work import Work, Works

if TYPE_CHECKING:
    from ringfold.collectives.cuda.stream_transport import StreamTransport
    from ringfold.collectives.mpi import MpiTransport

__all__ = ["Issuer"]

# Compiled plans kept by a communicator; a training step issues a few dozen different ones.
PLANS = 4096
# Tensors of a group that are smaller are packed into one; larger ones gain nothing by it.
PACKED_NBYTES = 1024 * 1024
# Operations whose methods have a short way through the core: where the longer of input and output is the whole vector on every rank.
SHORT = frozenset({"all_reduce", "broadcast", "reduce", "reduce_scatter", "all_gather", "all_to_all"})

Plan = tuple[int, int, int, int, bytes | None]  # program, operation, dtype, reduction, offsets of equal pieces


class Issuer(Arguments):
    """The part of a Communicator that knows how to issue; `_handle` is the core's communicator, None where there is but one rank."""

    def __init__(self, session: Session, members: tuple[int, ...], name: str) -> None:
        super().__init__(session, members, name)
        self.timeout_s = session.job.timeout_s
        self.transport = "shm" if all(session.near[m] for m in members if m != session.rank) else "tcp"
        self._topology = Topology.on_one_host(self.size)
        self._handle: object | None = None
        self._carrier: MpiTransport | None = None  # who moves the bytes instead of the core
        self._device: torch.device | None = None  # of the CUDA tensors, once there was one
        self._stays: torch.device | None = None  # the same, unless they go through host memory
        self._device_carrier: StreamTransport | None = None  # who moves the bytes of those that stay
        self._plans: dict[tuple[object, ...], Plan] = {}
        self._shortcut: object | None = None  # of the core, for operations that were issued in the same form before
        self._programs: dict[tuple[object, ...], int] = {}
        self._in_flight: deque[Work] = deque()
        self._in_flight_lock = threading.Lock()
        self._order: OrderCheck | None = None

    @property
    def topology(self) -> Topology:
        """What algorithms are chosen by; every member sets it between the same two operations."""
        return self._topology

    @topology.setter
    def topology(self, topology: Topology) -> None:
        self._topology = topology
        self._plans.clear()
        self._take_long_way()
        if self._handle is not None and self._carrier is None and self._order is None:
            self._shortcut = core.shortcut(self._handle, self.session.sites.row_of, torch.Tensor)
            itself = weakref.ref(self)
            for name in SHORT:
                self.__dict__[name] = core.method(self._shortcut, name, itself, getattr(type(self), name))

    def _take_long_way(self) -> None:
        """Let every operation be issued by the Python methods."""
        self._shortcut = None
        for name in SHORT:
            self.__dict__.pop(name, None)

    def _is_plain(self, tensor: torch.Tensor) -> bool:
        """Tell whether the core, or what carries CUDA tensors, can work on the tensor's memory as it is."""
        return tensor.is_contiguous() and (tensor.is_cpu or tensor.device == self._stays) and not tensor.is_neg()

    # -- collectives ------------------------------------------------------------------------------------------------------------------

    def _issue(
        self,
        op: str,
        reduction: str,
        root: int,
        count: int,
        input: torch.Tensor | None,
        output: torch.Tensor | None,
        counts: Sequence[int] | None,
        output_counts: Sequence[int] | None,
        async_op: bool,
        algorithm: str | None,
    ) -> Work | None:
        """Issue an operation on a vector of `count` elements, cut into `counts` (those of the output where they differ: `output_counts`)."""
        some = output if input is None else input
        if some is None:
            dtype, source, target = torch.uint8, 0, 0
        elif (input is None or self._is_plain(input)) and (output is input or output is None or self._is_plain(output)):
            dtype = some.dtype
            source = 0 if input is None else input.data_ptr()
            target = source if output is input else 0 if output is None else output.data_ptr()
        else:
            return self._issue_prepared(op, reduction, root, count, input, output, counts, output_counts, async_op, algorithm)
        carrier = self._carrier if some is None or some.is_cpu else self._device_carrier
        key = (op, dtype, reduction, count if output_counts is None else -1, counts is None, root, algorithm, carrier is None)
        plan = self._plans.get(key)
        if plan is None:
            if dtype not in DTYPES or (input is not None and output is not None and input.dtype is not output.dtype):
                return self._issue_prepared(op, reduction, root, count, input, output, counts, output_counts, async_op, algorithm)
            plan = self._plan(op, dtype, reduction, count, root, algorithm, counts is not None, carrier)
            if len(self._plans) < PLANS:
                self._plans[key] = plan
        if self._closed or self.session.closed:
            self._require_open(op)
        if self._handle is None:
            return _alone(input, output, async_op)
        if self._order is not None:
            self._order.meet(describe(op, dtype, reduction, count, root, counts, output_counts))
        if carrier is not None:
            return self._carry(carrier, Request.of(op, reduction, dtype, count, input, output, counts, output_counts, root, algorithm), async_op)
        program, operation, dtype_code, code, offsets = plan
        if self._shortcut is not None and counts is None and not async_op and op in SHORT:
            core.remember(self._shortcut, op, reduction, algorithm, dtype, root, count, program, operation, dtype_code, code, offsets)
        if counts is not None:
            offsets = _offsets(counts)
        output_offsets = None if output_counts is None else _offsets(output_counts)
        start = core.begin if async_op else core.run
        outcome = start(
            self._handle,
            program,
            operation,
            dtype_code,
            code,
            root,
            count,
            offsets,
            output_offsets,
            source,
            target,
            self.timeout_s,
            self.session.sites.row(2),
        )
        if async_op:
            return self._keep(Work(outcome, (input, output), self._fail))
        if outcome is not None:
            self._fail(outcome)
        return None

    def _plan(
        self,
        op: str,
        dtype: torch.dtype,
        reduction: str,
        count: int,
        root: int,
        algorithm: str | None,
        is_uneven: bool,
        carrier: Transport | None,
    ) -> Plan:
        """Check what is checked once for all operations like this one, choose a schedule, and compile it unless it is there already."""
        code = reduction_code(op, reduction)
        if op in FOLDING:
            require_arithmetic(dtype, reduction, self._where(op))
        self._require_open(op)
        if carrier is not None:
            return 0, OPERATIONS[op], DTYPES[dtype], code, None  # it chooses for itself
        nbytes = count * dtype.itemsize
        choice = self._choose(op, -1 if is_uneven and op == "all_to_all" else nbytes, algorithm)
        key = (op, root, choice.algorithm, choice.variant, choice.segments, choice.fallback)
        program = self._programs.get(key)
        if program is None:
            program = 0
            if self._handle is not None:
                name, hosts = (op, choice.algorithm, choice.variant), self.topology.hosts
                schedule = build(*name, self.rank, self.size, choice.segments, root, fallback=choice.fallback, hosts=hosts)
                program = core.program(self._handle, schedule.compile())
            self._programs[key] = program
        has_pieces = op not in ("all_reduce", "broadcast", "reduce", "barrier")
        return program, OPERATIONS[op], DTYPES[dtype], code, _offsets([count // self.size] * self.size) if has_pieces else None

    def _choose(self, op: str, nbytes: int, algorithm: str | None) -> select.Choice:
        return select.choose(op, nbytes, self.topology, algorithm)

    def _issue_prepared(
        self,
        op: str,
        reduction: str,
        root: int,
        count: int,
        input: torch.Tensor | None,
        output: torch.Tensor | None,
        counts: Sequence[int] | None,
        output_counts: Sequence[int] | None,
        async_op: bool,
        algorithm: str | None,
    ) -> Work | None:
        """Issue an operation on tensors that are not plain ones, and give the result back at its end."""
        where, arithmetic = self._where(op), reduction if op in FOLDING else None
        self._meet_device(where, input, output)
        if input is not None and output is not None and input.dtype is not output.dtype:
            raise ConfigError(f"{where}: input is {input.dtype} but output is {output.dtype}")
        into = None if output is None else prepare(output, where, arithmetic, reads=output is input, stays=self._stays)
        out_of = into if output is input else None if input is None else prepare(input, where, arithmetic, writes=False, stays=self._stays)
        operand = out_of or into
        assert operand is not None  # a barrier is always plain
        factor = operand.factor
        work = self._issue(
            op,
            reduction,
            root,
            count * factor,
            None if out_of is None else out_of.flat,
            None if into is None else into.flat,
            None if counts is None else [c * factor for c in counts],
            None if output_counts is None else [c * factor for c in output_counts],
            async_op,
            algorithm,
        )
        if into is None or into.original is None:
            return work
        if work is None:
            into.give_back()
            return None
        return Works([work], into.give_back)

    def _meet_device(self, where: str, *tensors: torch.Tensor | None) -> None:
        """At the first CUDA tensor, decide with the others which way those go; see that they stay on one GPU.

        Raises: ConfigError, CommunicationError.
        """
        devices = {tensor.device for tensor in tensors if tensor is not None}
        if len(devices) > 1:
            raise ConfigError(f"{where}: input and output are on {' and '.join(sorted(map(str, devices)))}, expected one device")
        (device,) = devices
        if device.type != "cuda" or device == self._device:
            return
        if self._device is not None:
            raise ConfigError(
                f"{where} cannot take this tensor:\n  it is on {device}, expected {self._device}, where this communicator's others were"
            )
        self._open_device(device)

    def _open_device(self, device: torch.device) -> None:
        if self._handle is not None:
            from ringfold.collectives.cuda import open_transport  # only who uses it has it

            self._device_carrier = open_transport(self, self._handle, self._fail, device)  # type: ignore[arg-type]  # the Communicator that we are
        self._device = device
        if self._device_carrier is not None or self._handle is None:
            self._stays = device

    def _together(self, tensors: Sequence[torch.Tensor], issue: Callable[[torch.Tensor], Work | None], async_op: bool) -> Work | None:
        """Issue one operation for all small tensors of a dtype, packed into one, and one for each large one; all are in place."""
        small: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        works = []
        for tensor in tensors:
            if tensor.numel() * tensor.element_size() < PACKED_NBYTES and tensor.dtype in DTYPES and (tensor.is_cpu or tensor.is_cuda):
                small.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
            elif (work := issue(tensor)) is not None:
                works.append(work)
        for (dtype, device), group in small.items():
            packed = registered.empty([sum(t.numel() for t in group)], dtype, device)
            pieces = [p.view(t.shape) for p, t in zip(packed.split([t.numel() for t in group]), group, strict=True)]
            torch._foreach_copy_(pieces, group)
            work = issue(packed)
            works.append(Works([] if work is None else [work], lambda group=group, pieces=pieces: torch._foreach_copy_(group, pieces)))  # type: ignore[misc]
        together = Works(works)
        if async_op:
            return together
        together.wait()
        return None

    # -- messages ---------------------------------------------------------------------------------------------------------------------

    def _message(self, op: str, tensor: torch.Tensor, peer: int | None, tag: int, async_op: bool) -> Work | None:
        if peer is not None:
            self._check_peer(op, peer)
        if peer == self.rank or self.size == 1:
            raise ConfigError(f"{self._where(op)}: a rank cannot message itself")
        if not 0 <= tag < 1 << 31:
            raise ConfigError(f"{self._where(op)}: tag {tag} must be at least 0 and below 2^31")
        self._require_open(op)
        operand = prepare(tensor, self._where(op), None, reads=op == "send", writes=op == "recv")
        flat = operand.flat
        if self._carrier is not None:
            sent, received = (flat.view(-1), None) if op == "send" else (None, flat.view(-1))
            request = Request(op, "sum", flat.dtype, flat.numel(), sent, received, peer=-1 if peer is None else peer, tag=tag)
            return self._carry(self._carrier, request, async_op, None if operand.original is None else operand.give_back)
        handle = core.message(
            self._handle,
            op == "send",
            -1 if peer is None else peer,
            tag,
            DTYPES[flat.dtype],
            flat.numel(),
            flat.data_ptr(),
            self.timeout_s,
            self.session.sites.row(2),
        )
        work = self._keep(Work(handle, (flat,), self._fail, None if operand.original is None else operand.give_back))
        if async_op:
            return work
        work.wait()
        return None

    def _carry(self, carrier: Transport, request: Request, async_op: bool, finish: Callable[[], None] | None = None) -> Work | None:
        """Issue an operation of which the carrier moves the bytes."""
        work = carrier.begin(request, self.timeout_s, awaited=not async_op)
        if finish is not None:
            work = Works([work], finish)
        self._keep(work)
        if async_op:
            return work
        work.wait()
        return None

    # -- afterwards -------------------------------------------------------------------------------------------------------------------

    def _keep(self, work: Work) -> Work:
        """Hold the work's tensors until it is done, even if the caller lets go of it."""
        in_flight = self._in_flight
        with self._in_flight_lock:
            while in_flight and in_flight[0].done():
                in_flight.popleft()
            in_flight.append(work)
        return work

    def _fail(self, outcome: Outcome) -> None:
        """Raise what an operation's outcome stands for, and write down what led to it."""
        error = failure(outcome)
        folder = self.session.record_flight(error) if isinstance(error, PeerLost | CollectiveTimeout | CollectiveMismatch) else None
        if folder is not None:
            error.args = (f"{error}\n  The last operations of this rank, and of the one at fault if it is on this host, are in {folder}",)
        raise error


def _alone(input: torch.Tensor | None, output: torch.Tensor | None, async_op: bool) -> Work | None:
    """Do the operation of a communicator of one: the fold of one vector is that vector, and its piece the whole."""
    if input is not None and output is not None and input.data_ptr() != output.data_ptr():
        output.detach().view(-1).copy_(input.detach().view(-1))
    return Work() if async_op else None


def _offsets(counts: Sequence[int]) -> bytes:
    """Return where each piece begins, for the core."""
    return struct.pack(f"={len(counts) + 1}Q", 0, *accumulate(counts))
