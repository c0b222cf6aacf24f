"""An ordered set of ranks that issues collectives, in order, each with a deadline.

    world = communicator.world()          # all ranks of the job
    world.all_reduce(gradient, "avg")     # in place
    row = world.subgroup([0, 1], "tp")    # only the members call it

Every rank of a communicator issues the same operations in the same order. Communicators do not wait for one another. What an operation does is a
Schedule (algorithms/), chosen by a cost model (select.py), compiled once and run by the C++ core; nothing here moves a byte.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from ringfold.collectives import registered, select
from ringfold.collectives._native import check, core
from ringfold.collectives.algorithms import build
from ringfold.collectives.codes import DTYPES as DTYPE_CODES
from ringfold.collectives.codes import OPERATIONS, REDUCTIONS
from ringfold.collectives.environment import Job
from ringfold.collectives.errors import CommunicationError, ConfigError, nearest
from ringfold.collectives.page import Page
from ringfold.collectives.session import Session
from ringfold.collectives.work import Work

__all__ = ["Communicator", "world"]

DTYPES = {getattr(torch, name): code for name, code in DTYPE_CODES.items()}

# An inbound ring is this long where there are few peers: in the L2 cache of the core that empties it, and long enough that a sender
# that is woken late finds the receiver still busy. All rings of a rank together stay below RINGS_NBYTES.
RING_NBYTES = 256 * 1024
RINGS_NBYTES = 4 * 1024 * 1024
# Compiled plans kept by a communicator; a training step issues a few dozen different ones.
PLANS = 4096


def world(job: Job | None = None) -> Communicator:
    """Join `job` (default: what the environment says) and return the communicator of all its ranks; closing it leaves the job.

    Raises:
        ConnectError, AuthenticationError: see Session.join.
    """
    session = Session.join(job if job is not None else Job.from_environment())
    try:
        return Communicator(session, tuple(range(session.world_size)), "world")
    except BaseException:
        session.close()
        raise


class Communicator:
    """Ranks `members` of a job under the name of their axis; `rank` and `size` are this rank's place among them."""

    def __init__(self, session: Session, members: tuple[int, ...], name: str, owns_session: bool | None = None) -> None:
        self.members = members
        self.name = name
        self.rank = members.index(session.rank)
        self.size = len(members)
        self.timeout_s = session.job.timeout_s
        self.session = session
        self.transport = "shm" if all(session.near[m] for m in members if m != session.rank) else "tcp"
        self._owns_session = name == "world" if owns_session is None else owns_session
        self._plans: dict[tuple[Any, ...], tuple[int, int]] = {}
        self._in_flight: list[Work] = []
        self._closed = False
        self._handle: object | None = None
        if self.size > 1:
            identity = self._identity()
            self._handle = core.communicator(session.context, identity, name, members)
            self._open(identity)

    def _identity(self) -> int:
        """Return 32 bits that the members agree on and no other communicator here has: of its name, its members and how often it was made."""
        made = self.session.communicators_made
        key = (self.name, self.members)
        made[key] = made.get(key, 0) + 1
        digest = hashlib.blake2b(repr((*key, made[key])).encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little")

    def _open(self, identity: int) -> None:
        session = self.session
        far = [m for m in self.members if m != session.rank and not session.near[m]]
        for lane, purpose in enumerate(("collective", "message")):
            for member, sock in session.membership.connect(f"communicator {identity} {purpose}", far).items():
                core.add_socket(self._handle, self.members.index(member), lane, sock.detach())
        ring_nbytes = min(RING_NBYTES, RINGS_NBYTES // (2 * self.size)) // 64 * 64
        check(core.open(self._handle, ring_nbytes, self.timeout_s))

    # -- operations -------------------------------------------------------------------------------------------------------------------

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", *, async_op: bool = False, algorithm: str | None = None) -> Work | None:
        """Fold the tensors of all ranks elementwise; each rank ends with the result, in place and bit-identical.

        op: sum, avg (the sum divided by the size; integers toward zero), min, max or prod. async_op: return a Work at once.

        Raises:
            ConfigError: the tensor is not contiguous, not on the CPU or of a dtype that ringfold does not reduce; nothing was sent.
            CommunicationError: PeerLost, CollectiveTimeout, CollectiveMismatch.
        """
        address = self._address(tensor, "all_reduce")
        return self._issue("all_reduce", tensor.dtype, op, -1, tensor.numel(), None, address, address, async_op, algorithm, (tensor,))

    def reduce_scatter(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        op: str = "sum",
        *,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
        algorithm: str | None = None,
    ) -> Work | None:
        """Fold the inputs of all ranks and leave piece r of the result, in rank order, in the output of rank r.

        counts: elements of each rank's piece; without them all are equal. The input is not changed, unless output is this rank's piece of it.

        Raises: as all_reduce.
        """
        offsets = self._offsets("reduce_scatter", input.numel(), output.numel(), counts)
        source, target = self._address(input, "reduce_scatter"), self._address(output, "reduce_scatter")
        self._same_dtype("reduce_scatter", input, output)
        return self._issue("reduce_scatter", input.dtype, op, -1, input.numel(), offsets, source, target, async_op, algorithm, (input, output))

    def all_gather(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        *,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
        algorithm: str | None = None,
    ) -> Work | None:
        """Concatenate the inputs of all ranks in rank order into the output of each.

        counts: elements of each rank's input; without them all are equal. The input may be this rank's piece of the output.

        Raises: as all_reduce.
        """
        offsets = self._offsets("all_gather", output.numel(), input.numel(), counts)
        source, target = self._address(input, "all_gather"), self._address(output, "all_gather")
        self._same_dtype("all_gather", input, output)
        return self._issue("all_gather", input.dtype, "sum", -1, output.numel(), offsets, source, target, async_op, algorithm, (input, output))

    def broadcast(self, tensor: torch.Tensor, src: int = 0, *, async_op: bool = False, algorithm: str | None = None) -> Work | None:
        """Copy the tensor of rank `src` of this communicator to every other, in place.

        Raises: as all_reduce.
        """
        self._check_peer("broadcast", src)
        address = self._address(tensor, "broadcast")
        return self._issue("broadcast", tensor.dtype, "sum", src, tensor.numel(), None, address, address, async_op, algorithm, (tensor,))

    def barrier(self, *, async_op: bool = False) -> Work | None:
        """Wait until every rank has come here.

        Raises: CommunicationError.
        """
        return self._issue("barrier", torch.uint8, "sum", -1, 0, None, 0, 0, async_op, None, ())

    def send(self, tensor: torch.Tensor, dst: int, *, async_op: bool = False) -> Work | None:
        """Send the tensor to rank `dst`, whose next recv from this rank takes it; the shape need not match, dtype and count must.

        Raises: as all_reduce.
        """
        return self._message("send", tensor, dst, async_op)

    def recv(self, tensor: torch.Tensor, src: int, *, async_op: bool = False) -> Work | None:
        """Receive into the tensor what rank `src` sends to this rank next.

        Raises: as all_reduce.
        """
        return self._message("recv", tensor, src, async_op)

    # -- small Python values ----------------------------------------------------------------------------------------------------------

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order; they are pickled, which only authenticated members of the job can send.

        Raises: CommunicationError.
        """
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        self.all_gather(sizes, torch.tensor([mine.numel()]))
        counts = sizes.tolist()
        everyone = torch.empty(sum(counts), dtype=torch.uint8)
        self.all_gather(everyone, mine, counts=counts)
        return [pickle.loads(piece.numpy().tobytes()) for piece in everyone.split(counts)]

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        """Return rank `src`'s value on every rank; see all_gather_object.

        Raises: CommunicationError.
        """
        self._check_peer("broadcast_object", src)
        if self.size == 1:
            return value
        mine = bytearray(pickle.dumps(value)) if self.rank == src else bytearray()
        size = torch.tensor([len(mine)])
        self.broadcast(size, src)
        content = torch.frombuffer(mine, dtype=torch.uint8) if mine else torch.empty(int(size), dtype=torch.uint8)
        self.broadcast(content, src)
        return value if self.rank == src else pickle.loads(content.numpy().tobytes())

    # -- other communicators and memory -----------------------------------------------------------------------------------------------

    def subgroup(self, ranks: Sequence[int], name: str) -> Communicator:
        """Return a communicator of `ranks` (of this one, in that order); called by exactly these, in the same order among subgroups of one name.

        Raises:
            ConfigError: the ranks are not distinct ranks of this communicator, or this rank is not among them.
            CommunicationError: a member did not call it in time.
        """
        if len(set(ranks)) != len(ranks) or any(not 0 <= r < self.size for r in ranks) or self.rank not in ranks:
            raise ConfigError(
                f"subgroup {name!r} of axis {self.name}: ranks {list(ranks)} must be distinct, below {self.size}, and include rank {self.rank}"
            )
        return Communicator(self.session, tuple(self.members[r] for r in ranks), name, owns_session=False)

    def split(self, color: int | None, key: int | None = None, name: str = "split") -> Communicator | None:
        """Return the communicator of all ranks that gave the same color, ordered by (key, rank); None for a rank whose color is None.

        Called by every rank, as MPI_Comm_split.

        Raises: CommunicationError.
        """
        answers = self.all_gather_object((color, self.rank if key is None else key))
        if color is None:
            return None
        ranks = sorted((r for r in range(self.size) if answers[r][0] == color), key=lambda r: (answers[r][1], r))
        return self.subgroup(ranks, name)

    def empty(self, *shape: int | Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return an uninitialised contiguous tensor in registered memory, which collectives on one host fold where it lies; not collective.

        Raises:
            ConfigError: the dtype cannot be reduced.
            OSError: no memory.
        """
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return registered.empty(sizes, dtype)  # type: ignore[arg-type]

    def is_registered(self, tensor: torch.Tensor) -> bool:
        """Tell whether the tensor's memory lies in the process's registered pool."""
        return registered.is_registered(tensor)

    # -- about it ---------------------------------------------------------------------------------------------------------------------

    def explain(self, op: str, nbytes: int) -> str:
        """Return which algorithm an operation of that size takes here, what it is predicted to cost, and why the others were not picked."""
        return str(select.choose(op, self.size, nbytes, self.transport))

    @property
    def seconds_waited(self) -> float:
        """Seconds that this process has spent blocked in operations of this communicator."""
        return 0.0 if self._handle is None else core.waited_seconds(self._handle)

    @property
    def page(self) -> Page:
        """This rank's shared page."""
        return self.session.page

    def close(self) -> None:
        """End this communicator, and for the world's the rank's place in the job; may be called again."""
        if self._closed:
            return
        self._closed = True
        if self._handle is not None:
            core.drop(self._handle)
        self._in_flight.clear()
        if self._owns_session:
            self.session.close()

    def __repr__(self) -> str:
        return f"Communicator({self.name}: rank {self.rank} of {self.size}, {self.transport})"

    # -- the way down -----------------------------------------------------------------------------------------------------------------

    def _address(self, tensor: torch.Tensor, op: str) -> int:
        if not tensor.is_contiguous() or not tensor.is_cpu or tensor.dtype not in DTYPES:
            problems = []
            if tensor.is_sparse or tensor.layout is not torch.strided:
                problems.append(f"its layout is {tensor.layout}, expected torch.strided: send indices and values")
            elif not tensor.is_contiguous():
                problems.append(f"its strides are {tensor.stride()} for shape {tuple(tensor.shape)}, expected contiguous: call .contiguous()")
            if not tensor.is_cpu:
                problems.append(f"it is on {tensor.device}, expected cpu")
            if tensor.dtype not in DTYPES:
                problems.append(f"its dtype is {tensor.dtype}, expected one of {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}")
            raise ConfigError(f"{op} on rank {self.rank} of axis {self.name} cannot take this tensor:\n  " + "\n  ".join(problems))
        return tensor.data_ptr()

    def _require_open(self, op: str) -> None:
        if self._closed or self.session.closed:
            raise CommunicationError(f"{op} on rank {self.rank} of axis {self.name}: the communicator is closed; rf.init() joins the job again")

    def _same_dtype(self, op: str, input: torch.Tensor, output: torch.Tensor) -> None:
        if input.dtype is not output.dtype:
            raise ConfigError(f"{op} on rank {self.rank} of axis {self.name}: input is {input.dtype} but output is {output.dtype}")

    def _check_peer(self, op: str, peer: int) -> None:
        if not 0 <= peer < self.size:
            raise ConfigError(f"{op} on rank {self.rank} of axis {self.name}: rank {peer} is not among its {self.size} ranks (0 to {self.size - 1})")

    def _offsets(self, op: str, whole: int, piece: int, counts: Sequence[int] | None) -> bytes:
        """Return where each rank's piece begins in the whole, for the core."""
        if counts is None:
            if whole != piece * self.size:
                raise ConfigError(
                    f"{op} on rank {self.rank} of axis {self.name}: the whole has {whole} elements and this rank's piece {piece}; "
                    f"expected {piece} x {self.size} = {piece * self.size}, or counts=[elements of each rank's piece]"
                )
            counts = [piece] * self.size
        elif len(counts) != self.size or sum(counts) != whole or counts[self.rank] != piece or min(counts) < 0:
            raise ConfigError(
                f"{op} on rank {self.rank} of axis {self.name}: counts {list(counts)} must be {self.size} numbers that add up to {whole}, "
                f"the elements of the whole, with {piece}, this rank's piece, at place {self.rank}"
            )
        return struct.pack(f"={self.size + 1}Q", 0, *accumulate(counts))

    def _plan(self, op: str, root: int, nbytes: int, algorithm: str | None) -> tuple[int, int]:
        """Choose and compile the schedule of an operation, or find the one that serves its size class already."""
        choice = select.choose(op, self.size, nbytes, self.transport, algorithm)
        key = (op, root, choice.algorithm, choice.variant, choice.segments)
        known = self._plans.get(key)
        if known is None:
            schedule = build(op, choice.algorithm, choice.variant, self.rank, self.size, choice.segments, root)
            known = self._plans[key] = (core.program(self._handle, schedule.compile()), OPERATIONS[op])
        return known

    def _issue(
        self,
        op: str,
        dtype: torch.dtype,
        reduction: str,
        root: int,
        count: int,
        offsets: bytes | None,
        input: int,
        output: int,
        async_op: bool,
        algorithm: str | None,
        tensors: tuple[torch.Tensor, ...],
    ) -> Work | None:
        code = REDUCTIONS.get(reduction)
        if code is None:
            meant = nearest(reduction, REDUCTIONS)
            raise ConfigError(
                f"{op}: unknown op={reduction!r}; expected one of {', '.join(REDUCTIONS)}" + (f". Did you mean {meant!r}?" if meant else "")
            )
        self._require_open(op)
        if self._handle is None:
            return self._alone(tensors, async_op)
        key = (op, dtype, count, root, algorithm)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plan(op, root, count * dtype.itemsize, algorithm)
            if len(self._plans) < PLANS:
                self._plans[key] = plan
        if not async_op:
            check(core.run(self._handle, plan[0], plan[1], DTYPES[dtype], code, root, count, offsets, input, output, self.timeout_s))
            return None
        handle = core.begin(self._handle, plan[0], plan[1], DTYPES[dtype], code, root, count, offsets, input, output, self.timeout_s)
        return self._keep(Work(handle, tensors))

    def _alone(self, tensors: tuple[torch.Tensor, ...], async_op: bool) -> Work | None:
        """Do the operation of a communicator of one: the fold of one vector is that vector."""
        if len(tensors) == 2 and tensors[0].data_ptr() != tensors[1].data_ptr():
            tensors[1].view(-1).copy_(tensors[0].view(-1))
        return Work(None, ()) if async_op else None

    def _message(self, op: str, tensor: torch.Tensor, peer: int, async_op: bool) -> Work | None:
        self._check_peer(op, peer)
        if peer == self.rank:
            raise ConfigError(f"{op} on rank {self.rank} of axis {self.name}: a rank cannot message itself")
        address = self._address(tensor, op)
        self._require_open(op)
        handle = core.message(self._handle, op == "send", peer, DTYPES[tensor.dtype], tensor.numel(), address, self.timeout_s)
        work = self._keep(Work(handle, (tensor,)))
        if async_op:
            return work
        work.wait()
        return None

    def _keep(self, work: Work) -> Work:
        """Hold the work's tensors until it is done, even if the caller lets go of it."""
        self._in_flight = [w for w in self._in_flight if not w.done()]
        self._in_flight.append(work)
        return work
