"""What a launcher tells a worker: every environment variable and every store key that ringfold knows, in one place.

`Job.from_environment()` finds out who started this process, in this order:

    ringfold run     RINGFOLD_RANK, RINGFOLD_WORLD_SIZE, ...
    torchrun         RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ... (also set by hand)
    mpirun           OMPI_COMM_WORLD_RANK, ... (Open MPI), PMI_RANK, ... (Hydra: MPICH, Intel MPI)
    srun             SLURM_PROCID, ... inside a step (SLURM_STEP_ID)
    nobody           one process

It reads variables and checks that they agree. It opens nothing and decides nothing: `rendezvous.join` does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

from ringfold.collectives.errors import ConfigError, nearest

RANK = "RINGFOLD_RANK"
WORLD_SIZE = "RINGFOLD_WORLD_SIZE"
LOCAL_RANK = "RINGFOLD_LOCAL_RANK"
LOCAL_SIZE = "RINGFOLD_LOCAL_SIZE"
STORE = "RINGFOLD_STORE"  # host:port of the key-value store
SECRET = "RINGFOLD_SECRET"  # what every member of the job must hold
PAGE_FD = "RINGFOLD_PAGE_FD"  # inherited descriptor of this worker's shared page
LAYOUT = "RINGFOLD_LAYOUT"
JOB = "RINGFOLD_JOB"  # unique to one start of one job: a restart gets a new one
TIMEOUT_S = "RINGFOLD_TIMEOUT_S"
TRANSPORT = "RINGFOLD_TRANSPORT"
INTERFACE = "RINGFOLD_INTERFACE"  # by which ranks of other hosts are reached: a name, or a network such as 10.1.0.0/16
STREAMS = "RINGFOLD_STREAMS"  # TCP connections that share a large message to another host
DEVICE = "RINGFOLD_DEVICE"  # where rf.init() puts the model: "cuda" if there is one, unless this says "cpu"
LOG_DIR = "RINGFOLD_LOG_DIR"
QUIET = "RINGFOLD_QUIET"
VERBOSE = "RINGFOLD_VERBOSE"  # "1": rf.init() says what it has set up
CHECK_ORDER = "RINGFOLD_CHECK_ORDER"  # "1": compare what ranks are about to do before each collective
FLIGHT_DIR = "RINGFOLD_FLIGHT_DIR"  # where the flight recorder writes

Source = Literal["ringfold", "torchrun", "openmpi", "hydra", "slurm", "single"]
Transport = Literal["auto", "shm", "tcp", "mpi"]
Device = Literal["auto", "cpu", "cuda"]

DEFAULT_TIMEOUT_S = 300.0
DEFAULT_STREAMS = 4
MAX_STREAMS = 64
# What a job says about itself travels in the clear, so a secret must not be guessable by trying words.
MIN_SECRET_NBYTES = 16


def generation_prefix(generation: str) -> str:
    """Return what every store key of one generation begins with, so that one delete takes them all."""
    return f"{generation}/"


def open_key(generation: str) -> str:
    """Return the key that says that the store behind this address serves this generation."""
    return f"{generation}/open"


def claim_key(generation: str, rank: int) -> str:
    """Return the counter of processes that say they are this rank: more than one is a mistake."""
    return f"{generation}/claim/{rank}"


def member_key(generation: str, rank: int) -> str:
    """Return the key under which a rank publishes where it can be reached."""
    return f"{generation}/member/{rank}"


def nccl_key(generation: str, communicator: int) -> str:
    """Return what the keys of NCCL's ranks of one communicator begin with."""
    return f"{generation}/nccl/{communicator}/"


@dataclass(frozen=True)
class Job:
    """This process's place in a job, as its launcher described it.

    `store` is the address of the launcher's store when `source` is "ringfold"; otherwise it is where rank 0 is to serve one.
    Without it rank 0 hands out an address and a fresh secret: on its host (`handoff.py`), or if there are others over MPI (`mpi_handoff.py`).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    source: Source = "single"
    store: str | None = None
    secret: bytes | None = field(default=None, repr=False)
    job_id: str = "single"
    layout: str | None = None
    page_fd: int | None = None
    transport: Transport = "auto"
    device: Device = "auto"
    interface: str | None = None
    streams: int = DEFAULT_STREAMS
    timeout_s: float = DEFAULT_TIMEOUT_S
    checks_order: bool = False

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Job:
        """Find out which launcher started this process, and what it said.

        Raises: ConfigError, listing everything that is missing or does not fit.
        """
        variables = _Variables(environ)
        source, place = _detect(variables)
        store = variables.text(STORE) or (_store_beside_master(variables) if source != "ringfold" else None)
        secret = variables.text(SECRET)
        if secret is not None and len(secret.encode()) < MIN_SECRET_NBYTES:
            variables.problems.append(f"{SECRET} has {len(secret.encode())} bytes, expected at least {MIN_SECRET_NBYTES} random ones")
        if variables.text(STORE) and secret is None:
            variables.problems.append(f"{STORE} is set but {SECRET} is not: a store only admits who holds the job's secret")
        transport = variables.choice(TRANSPORT, get_args(Transport), "auto")
        device = variables.choice(DEVICE, get_args(Device), "auto")
        has_mpi = transport == "mpi" or source in ("openmpi", "hydra")
        if place.local_size < place.world_size and (secret is None or store is None) and not has_mpi:
            variables.problems.append(
                f"{place.local_size} of {place.world_size} workers are on this host: for the others set {SECRET} "
                f"(the same random text everywhere) and {STORE}=HOST:PORT (a free port on rank 0's host)"
            )
        timeout_s = variables.number(TIMEOUT_S, DEFAULT_TIMEOUT_S)
        if not 0 < timeout_s < float("inf"):
            variables.problems.append(f"{TIMEOUT_S} is {timeout_s:g}, expected a number of seconds above 0")
        page_fd = variables.integer(PAGE_FD, -1)
        streams = variables.integer(STREAMS, DEFAULT_STREAMS)
        if not 1 <= streams <= MAX_STREAMS:
            variables.problems.append(f"{STREAMS} is {variables.text(STREAMS)}, expected 1 to {MAX_STREAMS}")
        variables.check(source)
        return cls(
            rank=place.rank,
            world_size=place.world_size,
            local_rank=place.local_rank,
            local_size=place.local_size,
            source=source,
            store=store if secret is not None else None,
            secret=secret.encode() if secret is not None else None,
            job_id=place.job_id,
            layout=variables.text(LAYOUT),
            page_fd=page_fd if page_fd >= 0 else None,
            transport=cast(Transport, transport),
            device=cast(Device, device),
            interface=variables.text(INTERFACE),
            streams=streams,
            timeout_s=timeout_s,
            checks_order=variables.choice(CHECK_ORDER, ("0", "1"), "0") == "1",
        )


@dataclass(frozen=True)
class _Place:
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    job_id: str


class _Variables:
    """Reads variables and collects what is wrong with them, so that the user is told everything at once."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.problems: list[str] = []

    def has(self, *names: str) -> bool:
        return all(self._environ.get(name) for name in names)

    def text(self, name: str) -> str | None:
        return self._environ.get(name) or None

    def integer(self, name: str, default: int | None = None) -> int:
        """Return the variable as an integer; without a default it must be there."""
        text = self.text(name)
        if text is None and default is None:
            self.problems.append(f"{name} is not set, expected an integer")
        elif text is not None and not re.fullmatch(r"-?\d+", text.strip()):
            self.problems.append(f"{name} is {text!r}, expected an integer")
        elif text is not None:
            return int(text)
        return default or 0

    def number(self, name: str, default: float) -> float:
        text = self.text(name)
        try:
            return default if text is None else float(text)
        except ValueError:
            self.problems.append(f"{name} is {text!r}, expected a number")
            return default

    def choice(self, name: str, choices: tuple[str, ...], default: str) -> str:
        text = self.text(name)
        if text is None or text in choices:
            return text or default
        meant = nearest(text, choices)
        self.problems.append(f"{name} is {text!r}, expected one of {', '.join(choices)}" + (f"; did you mean {meant!r}?" if meant else ""))
        return default

    def place(self, rank: str, world_size: str, local_rank: str, local_size: str | int | None, job_id: str) -> _Place:
        """Read the four numbers; those of this host default to a job on one host."""
        before = len(self.problems)
        world = self.integer(world_size)
        own = self.integer(rank)
        local = self.integer(local_rank, own)
        local_world = local_size if isinstance(local_size, int) else self.integer(local_size, world) if local_size else world
        if len(self.problems) == before:
            if world < 1:
                self.problems.append(f"{world_size} is {world}, expected at least 1")
            elif not 0 <= own < world:
                self.problems.append(f"{rank} is {own}, expected 0 to {world - 1} ({world_size} is {world})")
            elif not 1 <= local_world <= world:
                self.problems.append(f"{local_size} is {local_world}, expected 1 to {world} ({world_size} is {world})")
            elif not 0 <= local < local_world:
                self.problems.append(f"{local_rank} is {local}, expected 0 to {local_world - 1} (there are {local_world} workers on this host)")
        return _Place(own, world, local, local_world, job_id)

    def check(self, source: Source) -> None:
        if self.problems:
            started_by = "" if source == "single" else f" (started by {source})"
            raise ConfigError(f"the environment of this worker{started_by} does not fit together:\n  " + "\n  ".join(self.problems))


def _detect(variables: _Variables) -> tuple[Source, _Place]:
    for source, marks, read in _LAUNCHERS:
        if any(variables.has(mark) for mark in marks) and not (source == "hydra" and _is_slurm_pmi(variables)):
            return source, read(variables)
    return "single", _Place(0, 1, 0, 1, variables.text(JOB) or "single")


def _ringfold(variables: _Variables) -> _Place:
    return variables.place(RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, variables.text(JOB) or "ringfold")


def _torchrun(variables: _Variables) -> _Place:
    # The run id is "none" unless the user gave one: the port of the master tells apart two jobs on one host, the count two attempts of one.
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    job_id = "-".join(["torchrun", *(variables.text(name) or "none" for name in names)])
    return variables.place("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", job_id)


def _openmpi(variables: _Variables) -> _Place:
    job_id = variables.text("PMIX_NAMESPACE") or variables.text("OMPI_MCA_ess_base_jobid") or _ancestor("mpirun")
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    return variables.place(*names, f"openmpi-{job_id}")


def _hydra(variables: _Variables) -> _Place:
    # Hydra names no job in the environment; all its workers on a host descend from one proxy.
    job_id = variables.text(STORE) or _ancestor("hydra_pmi_proxy")
    return variables.place("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", f"hydra-{job_id}")


def _is_slurm_pmi(variables: _Variables) -> bool:
    """Slurm's own PMI sets PMI_RANK too, but not Hydra's numbers of this host."""
    return variables.has("SLURM_STEP_ID", "SLURM_PROCID") and not variables.has("MPI_LOCALRANKID")


def _slurm(variables: _Variables) -> _Place:
    size = "SLURM_STEP_NUM_TASKS" if variables.has("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    job_id = f"slurm-{variables.text('SLURM_JOB_ID') or 'none'}.{variables.text('SLURM_STEP_ID')}"
    return variables.place("SLURM_PROCID", size, "SLURM_LOCALID", _slurm_local_size(variables), job_id)


def _slurm_local_size(variables: _Variables) -> int | None:
    """Read this node's entry of a list such as "4(x2),3"."""
    per_node = variables.text("SLURM_STEP_TASKS_PER_NODE") or variables.text("SLURM_TASKS_PER_NODE")
    if per_node is None:
        return None
    sizes: list[int] = []
    for entry in per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry.strip())
        if match is None:
            variables.problems.append(f"SLURM_TASKS_PER_NODE is {per_node!r}, expected a list such as 4(x2),3")
            return None
        sizes += [int(match[1])] * int(match[2] or 1)
    node = variables.integer("SLURM_NODEID", 0)
    return sizes[node] if 0 <= node < len(sizes) else None


_LAUNCHERS: tuple[tuple[Source, tuple[str, ...], Callable[[_Variables], _Place]], ...] = (
    ("ringfold", (RANK, WORLD_SIZE), _ringfold),
    ("torchrun", ("RANK", "WORLD_SIZE"), _torchrun),
    ("openmpi", ("OMPI_COMM_WORLD_RANK",), _openmpi),
    ("hydra", ("PMI_RANK",), _hydra),
    ("slurm", ("SLURM_STEP_ID",), _slurm),
)


def _store_beside_master(variables: _Variables) -> str | None:
    """Return the port after MASTER_PORT on MASTER_ADDR: torchrun's own store sits on MASTER_PORT itself."""
    host = variables.text("MASTER_ADDR")
    if host is None:
        return None
    return f"[{host}]:{_port_after_master(variables)}" if ":" in host else f"{host}:{_port_after_master(variables)}"


def _port_after_master(variables: _Variables) -> int:
    return variables.integer("MASTER_PORT", 29500) + 1


def _ancestor(command: str) -> str:
    """Return an id of the nearest ancestor that runs `command`, or of the parent: the same for all workers that it started on this host."""
    parent = pid = os.getppid()
    while pid > 1:
        name, above, _ = _process(pid)
        if name == command:
            break
        pid = above
    chosen = pid if pid > 1 else parent
    return f"{chosen}-{_process(chosen)[2]}"


def _process(pid: int) -> tuple[str, int, str]:
    """Return a process's command, its parent and its start time in clock ticks; (\"\", 0, \"0\") if it cannot be read."""
    try:
        head, _, tail = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:
        return "", 0, "0"
    fields = tail.split()  # proc(5): from the third field, `state`; the start time is the 22nd
    return head.partition("(")[2], int(fields[1]), fields[19]
