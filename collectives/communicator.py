"""An ordered set of ranks that issues collectives, in order, each with a deadline.

    world = communicator.world()          # all ranks of the job
    world.all_reduce(gradient, "avg")     # in place
    row = world.subgroup([0, 1], "tp")    # only the members call it

Every rank of a communicator issues the same operations in the same order. Communicators do not wait for one another. What an operation does is a
Schedule (algorithms/), chosen by a cost model (select.py), compiled once and run by the C++ core; nothing here moves a byte.

Tensors may have gaps, any number of elements, and be on the CPU or a GPU (cuda/ says which way those go; waiting for one holds the current stream,
not the CPU). What every operation takes beside them:
    async_op: return a Work at once; the tensors are the operation's until its `wait` has returned.
    algorithm: one of codes.ALGORITHMS instead of what the cost model picks.
What every operation raises:
    ConfigError: an argument that cannot work; nothing was sent.
    CommunicationError: PeerLost, CollectiveTimeout, CollectiveMismatch. The contents of the tensors are then undefined, the communicator finished.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from ringfold.collectives import registered
from ringfold.collectives._native import check, core
from ringfold.collectives.cost import Topology
from ringfold.collectives.environment import Job
from ringfold.collectives.errors import ConfigError
from ringfold.collectives.issue import Issuer
from ringfold.collectives.measure import measure_links
from ringfold.collectives.objects import Objects
from ringfold.collectives.operand import rescale
from ringfold.collectives.order import OrderCheck
from ringfold.collectives.page import OperationCounter, Page
from ringfold.collectives.session import Session
from ringfold.collectives.work import Work, Works

__all__ = ["Communicator", "world"]

# An inbound ring is this long where there are few peers: four segments, and longer than what a core's own cache holds. In one of 256 KiB the two ends
# write and read the same cache lines while these are still in the other's cache, at a third of the speed (AMD EPYC, 2 ranks, 1 MiB: 176 us; 58 with
# 1 MiB of ring). With more peers shorter rings are as good: all of a rank together stay below RINGS_NBYTES (4 ranks: best at 512 KiB each).
RING_NBYTES = 1024 * 1024
RINGS_NBYTES = 4 * 1024 * 1024

Tensors = torch.Tensor | Sequence[torch.Tensor]
Message = tuple[torch.Tensor, int, int]  # tensor, the other end, tag


def world(job: Job | None = None) -> Communicator:
    """Join `job` (default: what the environment says) and return the communicator of all its ranks; closing it leaves the job.

    Raises:
        ConnectError, AuthenticationError: see Session.join.
    """
    session = Session.join(job if job is not None else Job.from_environment())
    try:
        communicator = Communicator(session, tuple(range(session.world_size)), "world")
        if communicator.size > 1:
            session.links = measure_links(communicator)
            if session.job.transport == "mpi":
                from ringfold.collectives.mpi_choice import measure_folds

                session.folds = measure_folds(communicator)
            communicator.set_topology()
            core.forget_recorded(session.context)  # records and counters are of what the user does
        return communicator
    except BaseException:
        session.close()
        raise


class Communicator(Issuer, Objects):
    """Ranks `members` of a job under the name of their axis; `rank` and `size` are this rank's place among them."""

    def __init__(self, session: Session, members: tuple[int, ...], name: str, owns_session: bool | None = None) -> None:
        super().__init__(session, members, name)
        self._owns_session = name == "world" if owns_session is None else owns_session
        if self.size > 1:
            self.identity = self._identity()
            session.communicator_names[self.identity] = name
            self._handle = core.communicator(session.context, self.identity, name, members)
            self._open(self.identity)
            if session.job.transport == "mpi":
                from ringfold.collectives.mpi import MpiTransport  # only who uses it has it

                self._carrier = MpiTransport(session, self._handle, members, self.rank, name, lambda: self.topology, self._fail)
                self.transport = self._carrier.name
            if session.job.checks_order:
                self._order = OrderCheck(self)
            self.set_topology()

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
        for member, streams in session.membership.connect_streams(f"communicator {identity} collective", far).items():
            for sock in streams:
                core.add_socket(self._handle, self.members.index(member), 0, sock.detach())
        for member, sock in session.membership.connect(f"communicator {identity} message", far).items():
            core.add_socket(self._handle, self.members.index(member), 1, sock.detach())
        ring_nbytes = min(RING_NBYTES, RINGS_NBYTES // (2 * self.size)) // 64 * 64
        check(core.open(self._handle, ring_nbytes, self.timeout_s))

    def set_topology(self) -> None:
        """Choose algorithms from now on by what the session knows of hosts and links; every member does it between the same two operations."""
        host_of, (near, far) = self.session.membership.host_of, self.session.links
        places = range(self.size) if self.session.job.transport == "tcp" else (host_of.index(host_of[member]) for member in self.members)
        self.topology = Topology(tuple(places), near, far, remote_reads=core.remote_reads(self._handle))
        self._plans.clear()

    # -- one vector -------------------------------------------------------------------------------------------------------------------

    def all_reduce(
        self, tensor: Tensors, op: str = "sum", *, scale: float | None = None, async_op: bool = False, algorithm: str | None = None
    ) -> Work | None:
        """Fold the tensors of all ranks elementwise; each rank ends with the result, in place and bit-identical.

        tensor: one, or several that are folded as one operation. op: sum, avg (the sum divided by the size; integers toward zero), min, max,
        prod, band, bor or bxor; of truth values sum is "or" and bxor "not equal". scale: this rank's values are multiplied by it first.
        """
        if not isinstance(tensor, torch.Tensor):
            return self._together(tensor, lambda one: self.all_reduce(one, op, scale=scale, async_op=True, algorithm=algorithm), async_op)
        if scale is not None:
            tensor.detach().copy_(rescale(tensor.detach(), scale, self._where("all_reduce")))
        return self._issue("all_reduce", op, -1, tensor.numel(), tensor, tensor, None, None, async_op, algorithm)

    def broadcast(self, tensor: Tensors, src: int = 0, *, async_op: bool = False, algorithm: str | None = None) -> Work | None:
        """Copy the tensor of rank `src` of this communicator, or each of several, to every other, in place."""
        self._check_peer("broadcast", src)
        if not isinstance(tensor, torch.Tensor):
            return self._together(tensor, lambda one: self.broadcast(one, src, async_op=True, algorithm=algorithm), async_op)
        return self._issue("broadcast", "sum", src, tensor.numel(), tensor, tensor, None, None, async_op, algorithm)

    def reduce(
        self, tensor: torch.Tensor, dst: int = 0, op: str = "sum", *, scale: float | None = None, async_op: bool = False, algorithm: str | None = None
    ) -> Work | None:
        """Fold the tensors of all ranks into the tensor of rank `dst`, as all_reduce does; the others stay as they are."""
        self._check_peer("reduce", dst)
        result = tensor if self.rank == dst else None
        if scale is not None:
            scaled = rescale(tensor.detach(), scale, self._where("reduce"))
            tensor = scaled if result is None else tensor.detach().copy_(scaled)
        return self._issue("reduce", op, dst, tensor.numel(), tensor, result, None, None, async_op, algorithm)

    # -- a vector with a piece for each rank ------------------------------------------------------------------------------------------

    def reduce_scatter(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        op: str = "sum",
        *,
        counts: Sequence[int] | None = None,
        scale: float | None = None,
        async_op: bool = False,
        algorithm: str | None = None,
    ) -> Work | None:
        """Fold the inputs of all ranks and leave piece r of the result, in rank order, in the output of rank r.

        counts: elements of each rank's piece, the same on every rank; without them all are equal. op, scale: see all_reduce.
        The input is not changed, unless output is this rank's piece of it.
        """
        self._check_pieces("reduce_scatter", input.numel(), output.numel(), counts)
        if scale is not None:
            input = rescale(input.detach(), scale, self._where("reduce_scatter"))
        return self._issue("reduce_scatter", op, -1, input.numel(), input, output, counts, None, async_op, algorithm)

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

        counts: elements of each rank's input, the same on every rank; without them all are equal. The input may be this rank's piece of the output.
        """
        self._check_pieces("all_gather", output.numel(), input.numel(), counts)
        return self._issue("all_gather", "sum", -1, output.numel(), input, output, counts, None, async_op, algorithm)

    def gather(
        self,
        output: torch.Tensor | None,
        input: torch.Tensor,
        dst: int = 0,
        *,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
        algorithm: str | None = None,
    ) -> Work | None:
        """Concatenate the inputs of all ranks in rank order into the output of rank `dst`; elsewhere the output is ignored.

        counts: elements of each rank's input, the same on every rank; without them all are equal. The input may be dst's piece of the output.
        """
        self._check_peer("gather", dst)
        output = self._at_root("gather", "output", output, dst)
        whole = self._whole(input.numel(), counts) if output is None else output.numel()
        self._check_pieces("gather", whole, input.numel(), counts)
        return self._issue("gather", "sum", dst, whole, input, output, counts, None, async_op, algorithm)

    def scatter(
        self,
        output: torch.Tensor,
        input: torch.Tensor | None,
        src: int = 0,
        *,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
        algorithm: str | None = None,
    ) -> Work | None:
        """Copy piece r of the input of rank `src`, in rank order, to the output of rank r; elsewhere the input is ignored.

        counts: elements of each rank's piece, the same on every rank; without them all are equal. src's output may be its piece of the input.
        """
        self._check_peer("scatter", src)
        input = self._at_root("scatter", "input", input, src)
        whole = self._whole(output.numel(), counts) if input is None else input.numel()
        self._check_pieces("scatter", whole, output.numel(), counts)
        return self._issue("scatter", "sum", src, whole, input, output, counts, None, async_op, algorithm)

    def all_to_all(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        *,
        output_counts: Sequence[int] | None = None,
        input_counts: Sequence[int] | None = None,
        async_op: bool = False,
        algorithm: str | None = None,
    ) -> Work | None:
        """Send piece d of the input to rank d; piece s of the output, in rank order, comes from rank s. Output and input share no memory.

        output_counts, input_counts: elements of each piece, those of this rank; without them all pieces of all ranks are equal. Either every
        rank gives both, or none gives any.
        """
        if (output_counts is None) != (input_counts is None):
            raise ConfigError(f"{self._where('all_to_all')}: give both output_counts and input_counts, or neither")
        if output_counts is None:
            self._check_pieces("all_to_all", input.numel(), output.numel() // self.size, None)
            self._check_pieces("all_to_all", output.numel(), input.numel() // self.size, None)
        else:
            self._check_counts("all_to_all", output.numel(), output_counts)
            self._check_counts("all_to_all", input.numel(), input_counts or ())
        return self._issue("all_to_all", "sum", -1, input.numel(), input, output, input_counts, output_counts, async_op, algorithm)

    # -- no vector, and messages ------------------------------------------------------------------------------------------------------

    def barrier(self, *, async_op: bool = False) -> Work | None:
        """Wait until every rank has come here."""
        return self._issue("barrier", "sum", -1, 0, None, None, None, None, async_op, None)

    def send(self, tensor: torch.Tensor, dst: int, tag: int = 0, *, async_op: bool = False) -> Work | None:
        """Send the tensor to rank `dst`, whose next recv from this rank with this tag takes it; the shape need not match, dtype and count must."""
        return self._message("send", tensor, dst, tag, async_op)

    def recv(self, tensor: torch.Tensor, src: int | None = None, tag: int = 0, *, async_op: bool = False) -> Work | None:
        """Receive into the tensor what rank `src`, or with None any rank, sends to this rank with this tag next; Work.source tells who it was."""
        return self._message("recv", tensor, src, tag, async_op)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], *, async_op: bool = False) -> Work | None:
        """Send and receive many messages at the same time; each is (tensor, the other rank, tag), as for `send` and `recv`."""
        works = Works(
            [work for t, peer, tag in receives if (work := self.recv(t, peer, tag, async_op=True))]
            + [work for t, peer, tag in sends if (work := self.send(t, peer, tag, async_op=True))]
        )
        if async_op:
            return works
        works.wait()
        return None

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
        made = Communicator(self.session, tuple(self.members[r] for r in ranks), name, owns_session=False)
        if self._device is not None:
            made.use_device(self._device)
        return made

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

    def use_device(self, device: torch.device) -> None:
        """Decide now which way this rank's tensors on a GPU go, not at the first operation on one; every member calls it. Subgroups do it when made.

        Else that first operation waits for all members, as no other does.
        Raises: ConfigError: another GPU is in use already. CommunicationError.
        """
        self._require_open("use_device")
        if device != self._device:
            if self._device is not None:
                raise ConfigError(f"{self._where('use_device')}: this rank's tensors are on {self._device}, not on {device}")
            self._open_device(device)

    def empty(self, *shape: int | Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return an uninitialised contiguous tensor in registered memory, which collectives on one host fold where it lies; not collective.

        On a GPU it is an ordinary tensor: all are alike there.

        Raises:
            ConfigError: the dtype cannot be reduced.
            OSError: no memory.
        """
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return registered.empty(sizes, dtype, torch.device(device))  # type: ignore[arg-type]

    def is_registered(self, tensor: torch.Tensor) -> bool:
        """Tell whether the tensor's memory lies in the process's registered pool."""
        return registered.is_registered(tensor)

    # -- about it ---------------------------------------------------------------------------------------------------------------------

    def explain(self, op: str, nbytes: int) -> str:
        """Return which algorithm an operation of that size takes here, what it is predicted to cost, and why the others were not picked."""
        return str(self._choose(op, nbytes, None)) if self._carrier is None else self._carrier.explain(op, nbytes)

    @property
    def seconds_waited(self) -> float:
        """Seconds that this process has spent blocked in operations of this communicator."""
        return 0.0 if self._handle is None else core.waited_seconds(self._handle)

    @property
    def counters(self) -> dict[str, OperationCounter]:
        """What each kind of operation of this rank, on all its communicators, has come to: calls, bytes, time, and time blocked."""
        if self._device_carrier is not None:
            self._device_carrier.poll()
        return self.page.counters()

    @property
    def held_nbytes(self) -> int:
        """Bytes that this communicator holds for itself: rings, scratch memory, and messages put aside for later receives."""
        return 0 if self._handle is None else core.held_nbytes(self._handle)

    @property
    def page(self) -> Page:
        """This rank's shared page."""
        return self.session.page

    def close(self) -> None:
        """End this communicator, and for the world's the rank's place in the job; may be called again."""
        if self._closed:
            return
        self._closed = True
        self._take_long_way()
        for carrier in (self._carrier, self._device_carrier):
            if carrier is not None:
                carrier.close()
        self._carrier = self._device_carrier = None  # they refer to us, and should not live until the garbage collector comes
        if self._handle is not None:
            core.drop(self._handle)
        self._in_flight.clear()
        if self._owns_session:
            self.session.close()

    def __repr__(self) -> str:
        return f"Communicator({self.name}: rank {self.rank} of {self.size}, {self.transport})"
