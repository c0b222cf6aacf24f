"""Jobs over MPI: joining again, the secret told over MPI, and what the others see when a rank is killed, leaves or does not come."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ringfold as rf
import torch
from ringfold.collectives.communicator import world
from ringfold.collectives.environment import Job
from ringfold.collectives.errors import CollectiveTimeout, CommunicationError, PeerLost
from ringfold.collectives.mpi_process import segments

from tests.mpi.launching import Mpi, libraries, mpirun

pytestmark = pytest.mark.mpi

# A rank sees a death within the core's beat (0.1 s); the rest is what a busy machine may take.
SECONDS = 10.0


def join_again(times: int) -> list[int]:
    """Join and leave; return the descriptors that are open after each time, and what the ranks add up to."""
    opened = []
    for _ in range(times):
        mesh = rf.init()
        tensor = torch.ones(3)
        rf.all_reduce(tensor)
        assert torch.equal(tensor, torch.full((3,), float(mesh.size)))
        rf.shutdown()
        opened.append(len(list(Path("/proc/self/fd").iterdir())))
    rf.init()  # and is left to the end of the process
    return opened


@libraries("mpich")
def test_a_job_may_be_joined_again_and_again_and_left_to_the_end(mpi: Mpi) -> None:
    finished = mpirun(mpi, 2, join_again, 6)
    assert finished.status == 0, finished.output
    for opened in finished.answers:
        assert opened[-1] == opened[1], f"descriptors open after each time: {opened}"


def as_if_on_hosts_of_their_own() -> list[Any]:
    """Take the launcher's word that every rank is alone on its host: then there is no handoff over a unix socket."""
    alone = {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0"}
    os.environ.update({key: value for key, value in alone.items() if key in os.environ})
    seen: list[Any] = []
    for transport in ("mpi", "auto"):
        os.environ["RINGFOLD_TRANSPORT"] = transport
        job = Job.from_environment()
        assert (job.secret, job.store, job.local_size) == (None, None, 1)
        comm = world(job)
        tensor = torch.tensor([comm.rank + 1])
        comm.all_reduce(tensor)
        seen += [comm.transport, int(tensor)]
        comm.close()
    return seen


@libraries("openmpi")
def test_without_a_secret_several_hosts_get_one_over_mpi(mpi: Mpi) -> None:
    finished = mpirun(mpi, 2, as_if_on_hosts_of_their_own)
    assert finished.status == 0, finished.output
    assert finished.answers == [["mpi", 3, "shm", 3]] * 2


def watch_a_death(algorithm: str | None) -> dict[str, Any]:
    """Rank 1 kills itself between two operations; the others go on until they hear of it."""
    comm = world()
    tensor = torch.ones(100_000)
    for _ in range(3):
        comm.all_reduce(tensor, algorithm=algorithm)
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        while True:
            comm.all_reduce(tensor, algorithm=algorithm)
    except CommunicationError as error:
        seen = {"kind": type(error).__name__, "message": str(error), "peer": error.peer, "seconds": time.monotonic() - began}
        with pytest.raises(PeerLost):
            comm.barrier()
        return seen


# MPICH's mpirun has no way to keep the others.
@pytest.mark.parametrize("mpi", [pytest.param("openmpi"), pytest.param("debian", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("algorithm", [None, pytest.param("ring", marks=pytest.mark.slow)])
def test_survivors_of_a_killed_rank_get_its_name_within_seconds(mpi: Mpi, algorithm: str | None) -> None:
    finished = mpirun(mpi, 3, watch_a_death, algorithm, options=mpi.keeps_survivors)
    assert finished.answers[1] is None
    for rank in (0, 2):
        answer = finished.answers[rank]
        assert answer is not None, finished.output
        assert (answer["kind"], answer["peer"]) == ("PeerLost", 1)
        assert answer["seconds"] < SECONDS
        assert "all_reduce #" in answer["message"], answer["message"]
        assert "over mpi, axis world): rank 1 (" in answer["message"]
        assert "is gone: it failed or was killed" in answer["message"]


@libraries()
def test_mpirun_ends_the_others_and_nobody_hangs_at_the_end(mpi: Mpi) -> None:
    finished = mpirun(mpi, 3, watch_a_death, None)
    assert finished.status != 0
    assert finished.answers[1] is None


def leave_early() -> None:
    comm = world()
    if comm.rank == 1:
        comm.close()
    else:
        comm.all_reduce(torch.ones(10))


@libraries()
def test_a_rank_that_leaves_without_taking_part_is_named(mpi: Mpi) -> None:
    finished = mpirun(mpi, 3, leave_early)
    assert finished.status != 0
    told = [answer for answer in (finished.answers[0], finished.answers[2]) if answer is not None]  # the first to fail may end the other
    assert told, finished.output
    for answer in told:
        assert answer["error"] == "PeerLost", answer
        assert "all_reduce #1 (float32 x 10, sum, native over mpi, axis world): rank 1 (" in answer["message"]
        assert "has left the job" in answer["message"]


def wait_in_vain(algorithm: str | None) -> dict[str, Any]:
    """Rank 1 waits for a message instead of taking part; all give up together, and then join the job again."""
    comm = world()
    try:
        if comm.rank == 1:
            comm.timeout_s = 60.0  # so that another gives up first
            comm.recv(torch.ones(1), 0)
        else:
            comm.all_reduce(torch.ones(10), algorithm=algorithm)
    except CommunicationError as error:
        seen = {"kind": type(error).__name__, "message": str(error), "peer": error.peer}
    began = time.monotonic()
    with pytest.raises(CollectiveTimeout):
        comm.barrier()
    seen["again"] = time.monotonic() - began
    comm.close()
    comm = world()
    tensor = torch.ones(1)
    comm.all_reduce(tensor)
    comm.close()
    return seen | {"sum": float(tensor), "segments": [str(path) for path in segments()]}


@libraries("mpich")
@pytest.mark.parametrize("algorithm", [None, pytest.param("direct", marks=pytest.mark.slow)])
def test_an_operation_in_which_a_rank_is_missing_times_out_and_names_it(mpi: Mpi, algorithm: str | None) -> None:
    finished = mpirun(mpi, 2, wait_in_vain, algorithm, env={"RINGFOLD_TIMEOUT_S": "1.5"})
    for answer in finished.answers:
        assert answer is not None, finished.output
        assert (answer["kind"], answer["sum"]) == ("CollectiveTimeout", 2.0), answer
        assert answer["again"] < 1.0, "a communicator that has failed fails at once"
        assert bool(answer["segments"]) == (mpi.name == "mpich")
        assert not any(Path(path).exists() for path in answer["segments"]), "without MPI_Finalize we take away what MPICH would leave"
        assert re.search(
            r"all_reduce #1 \(float32 x 10, sum, \w+ over mpi, axis world\).* gave up after its timeout of 1\.5 s\n", answer["message"]
        ), answer["message"]
        assert "waiting for rank 1 (" in answer["message"], answer["message"]
