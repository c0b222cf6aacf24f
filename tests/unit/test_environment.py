"""What a worker makes of the environment its launcher gave it."""

import os
import subprocess
import sys

import pytest
from ringfold.collectives import environment
from ringfold.collectives.environment import Job
from ringfold.collectives.errors import ConfigError

SECRET = "0123456789abcdef0123456789abcdef"
RINGFOLD = {
    "RINGFOLD_RANK": "5",
    "RINGFOLD_WORLD_SIZE": "7",
    "RINGFOLD_LOCAL_RANK": "1",
    "RINGFOLD_LOCAL_SIZE": "3",
    "RINGFOLD_STORE": "10.0.0.7:4000",
    "RINGFOLD_SECRET": SECRET,
    "RINGFOLD_JOB": "job-17",
}
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "3",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "3",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
    "PMIX_NAMESPACE": "prterun-node-a-4711@1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "3", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "3"}
SLURM = {
    "SLURM_JOB_ID": "88",
    "SLURM_STEP_ID": "3",
    "SLURM_PROCID": "4",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}
SEVERAL_HOSTS = {"RINGFOLD_SECRET": SECRET, "RINGFOLD_STORE": "10.0.0.7:4000"}


def test_ringfold_variables_are_read_whole():
    more = {"RINGFOLD_PAGE_FD": "9", "RINGFOLD_LAYOUT": "dp7 micro2", "RINGFOLD_TRANSPORT": "tcp", "RINGFOLD_TIMEOUT_S": "2.5"}
    more |= {"RINGFOLD_INTERFACE": "10.1.0.0/16", "RINGFOLD_STREAMS": "7"}
    assert Job.from_environment({**RINGFOLD, **more}) == Job(
        rank=5,
        world_size=7,
        local_rank=1,
        local_size=3,
        source="ringfold",
        store="10.0.0.7:4000",
        secret=SECRET.encode(),
        job_id="job-17",
        layout="dp7 micro2",
        page_fd=9,
        transport="tcp",
        interface="10.1.0.0/16",
        streams=7,
        timeout_s=2.5,
    )


def test_nothing_set_is_one_process():
    assert Job.from_environment({}) == Job()


@pytest.mark.parametrize(
    ("environ", "source", "place"),
    [
        (TORCHRUN, "torchrun", (1, 3, 1, 3)),
        (OPENMPI, "openmpi", (2, 3, 2, 3)),
        (HYDRA, "hydra", (1, 3, 1, 3)),
        (SLURM | SEVERAL_HOSTS, "slurm", (4, 5, 0, 1)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "hydra", (1, 2, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "3"}, "torchrun", (1, 3, 1, 3)),
    ],
)
def test_each_launcher_is_recognised(environ, source, place):
    job = Job.from_environment(environ)
    assert (job.source, (job.rank, job.world_size, job.local_rank, job.local_size)) == (source, place)


@pytest.mark.parametrize(
    ("environ", "source"),
    [
        (SLURM | HYDRA | OPENMPI | TORCHRUN | RINGFOLD, "ringfold"),
        (SLURM | HYDRA | OPENMPI | TORCHRUN, "torchrun"),
        (SLURM | HYDRA | OPENMPI, "openmpi"),
        (SLURM | HYDRA, "hydra"),
        (SLURM | SEVERAL_HOSTS | {"PMI_RANK": "4", "PMI_SIZE": "5"}, "slurm"),  # srun --mpi=pmi2
        ({"SLURM_JOB_ID": "88", "SLURM_NTASKS": "4"}, "single"),  # a batch script, outside any step
    ],
)
def test_the_innermost_launcher_wins(environ, source):
    assert Job.from_environment(environ).source == source


def test_job_id_tells_two_torchruns_and_two_attempts_apart():
    environs = [TORCHRUN, TORCHRUN | {"MASTER_PORT": "29501"}, TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "1"}]
    assert len({Job.from_environment(environ).job_id for environ in environs}) == 3


PRINT_JOB_ID = "from ringfold.collectives.environment import Job; print(Job.from_environment().job_id)"


def test_job_id_under_hydra_is_the_same_for_siblings():
    def run() -> str:
        environ = {**os.environ, **HYDRA}
        return subprocess.run([sys.executable, "-c", PRINT_JOB_ID], env=environ, capture_output=True, timeout=60, text=True).stdout

    job_ids = {run(), run()}
    assert len(job_ids) == 1
    assert job_ids.pop().startswith(f"hydra-{os.getpid()}-")  # none above is called hydra_pmi_proxy, so the parent counts


def test_job_id_under_hydra_is_the_proxys_through_a_shell(tmp_path):
    proxy = tmp_path / "hydra_pmi_proxy"
    proxy.symlink_to("/bin/sh")
    environ = {**os.environ, **HYDRA, "PYTHON": sys.executable, "PROGRAM": PRINT_JOB_ID}
    # As with `mpirun sh -c "python train.py"`; what follows each command keeps the shell from becoming it.
    ran = subprocess.Popen([proxy, "-c", """/bin/sh -c '"$PYTHON" -c "$PROGRAM"; true'; true"""], env=environ, stdout=subprocess.PIPE, text=True)
    assert ran.communicate(timeout=60)[0].startswith(f"hydra-{ran.pid}-")


def test_store_beside_torchruns_own_needs_the_secret():
    assert Job.from_environment(TORCHRUN).store is None
    assert Job.from_environment(TORCHRUN | {"RINGFOLD_SECRET": SECRET}).store == "127.0.0.1:29501"
    assert Job.from_environment(TORCHRUN | {"RINGFOLD_SECRET": SECRET, "MASTER_ADDR": "fd00::7"}).store == "[fd00::7]:29501"
    assert Job.from_environment(TORCHRUN | {"RINGFOLD_SECRET": SECRET, "RINGFOLD_STORE": "a:1"}).store == "a:1"


def test_several_hosts_without_a_secret_are_refused_with_what_to_set():
    with pytest.raises(ConfigError, match=r"1 of 5 workers are on this host.*RINGFOLD_SECRET.*RINGFOLD_STORE=HOST:PORT"):
        Job.from_environment(SLURM)


def test_all_problems_are_told_at_once():
    environ = {
        "RINGFOLD_RANK": "two",
        "RINGFOLD_STORE": "10.0.0.7:4000",
        "RINGFOLD_TRANSPORT": "shmm",
        "RINGFOLD_TIMEOUT_S": "-1",
        "RINGFOLD_PAGE_FD": "x",
    }
    with pytest.raises(ConfigError) as error:
        Job.from_environment(environ)
    text = str(error.value)
    for seen in (
        "RINGFOLD_RANK is 'two', expected an integer",
        "RINGFOLD_WORLD_SIZE is not set",
        "RINGFOLD_STORE is set but RINGFOLD_SECRET is not",
        "did you mean 'shm'?",
        "RINGFOLD_TIMEOUT_S is -1",
        "RINGFOLD_PAGE_FD is 'x'",
    ):
        assert seen in text
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "3"}, "RANK is 3, expected 0 to 2"),
        ({"RANK": "-1"}, "RANK is -1, expected 0 to 2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0, expected at least 1"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is not set"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK is 3, expected 0 to 2"),
        ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE is 4, expected 1 to 3"),
        ({"RINGFOLD_SECRET": "short"}, "RINGFOLD_SECRET has 5 bytes, expected at least 16"),
        ({"RINGFOLD_TIMEOUT_S": "nan"}, "RINGFOLD_TIMEOUT_S is nan"),
        ({"RINGFOLD_TIMEOUT_S": "soon"}, "RINGFOLD_TIMEOUT_S is 'soon', expected a number"),
        ({"RINGFOLD_STREAMS": "0"}, "RINGFOLD_STREAMS is 0, expected 1 to 64"),
        ({"RINGFOLD_STREAMS": "many"}, "RINGFOLD_STREAMS is 'many', expected an integer"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Job.from_environment(TORCHRUN | change)


def test_secret_is_not_printed():
    assert SECRET not in repr(Job.from_environment(RINGFOLD))


def test_store_keys_of_a_generation_share_a_prefix_that_no_other_has():
    keys = [environment.open_key("job/1"), environment.claim_key("job/1", 0), environment.member_key("job/1", 12)]
    assert all(key.startswith(environment.generation_prefix("job/1")) for key in keys)
    assert not environment.member_key("job/10", 0).startswith(environment.generation_prefix("job/1"))
    assert len(set(keys)) == 3
