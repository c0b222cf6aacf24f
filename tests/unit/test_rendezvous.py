"""Joining: real processes under every launcher's environment, who is refused, who is missing, and what is left behind."""

import os
import shutil
import socket
import subprocess
from contextlib import ExitStack

import pytest
from ringfold.collectives.environment import Job
from ringfold.collectives.errors import ConfigError, ConnectError
from ringfold.collectives.rendezvous import host_identity, join
from ringfold.collectives.store import Store, StoreServer

from tests.harness.joining import CLOSE, JOIN, RUN, SECRET, Workers, hydra, openmpi, ringfold, slurm, torchrun, two_ports


@pytest.fixture
def workers():
    workers = Workers()
    yield workers
    for child in workers.children:
        child.kill()
        child.communicate()


def assert_joined(reports: list[dict], source: str, family: str = "AF_UNIX") -> None:
    size = len(reports)
    for rank, report in enumerate(reports):
        assert "error" not in report, report
        assert (report["source"], report["rank"], report["has_store"], report["blocking"]) == (source, rank, True, True)
        peers = [peer for peer in range(size) if peer != rank]
        assert report["swapped"] == {str(peer): f"L{peer:03}" for peer in peers}
        assert report["families"] == {str(peer): family for peer in peers}
        assert report["pids"] == [peer["own"] for peer in reports]
        assert report["host_of"] == [host_identity()] * size
    assert len({report["generation"] for report in reports}) == 1


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("transport", "family"), [("auto", "AF_UNIX"), ("shm", "AF_UNIX"), ("tcp", "AF_INET")])
def test_under_our_launcher_and_its_store(workers, size, transport, family):
    with StoreServer(SECRET.encode()) as server:
        for rank in range(size):
            workers.start(ringfold(rank, size, server.address, TRANSPORT=transport))
        assert_joined(workers.reports(), "ringfold", family)
        with Store(server.address, SECRET.encode(), 10) as store:
            assert store.delete("") == 0  # rank 0 has deleted what the generation left


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("source", "environ"), [("torchrun", torchrun), ("openmpi", openmpi), ("hydra", hydra), ("slurm", slurm)])
def test_under_another_launcher_without_a_store(workers, size, source, environ):
    for rank in reversed(range(size)):  # rank 0 comes last
        workers.start(environ(rank, size))
    workers.children.reverse()
    assert_joined(workers.reports(), source)


@pytest.mark.parametrize("size", [2, 3])
def test_under_torchrun_with_a_secret_rank_0_serves_beside_its_store(workers, size):
    with two_ports() as port:
        for rank in range(size):
            workers.start(torchrun(rank, size, port, RINGFOLD_SECRET=SECRET))
        assert_joined(workers.reports(), "torchrun")


def test_two_jobs_on_one_host_at_the_same_time_do_not_meet(workers):
    for rank in range(2):
        for port in (29500, 29501):
            workers.start(torchrun(rank, 2, port))
    reports = workers.reports()
    assert_joined(reports[0::2], "torchrun")
    assert_joined(reports[1::2], "torchrun")
    assert reports[0]["generation"] != reports[1]["generation"]


def test_one_process_opens_nothing():
    before = set(os.listdir("/proc/self/fd"))
    membership = join(Job())
    assert (membership.rank, membership.world_size, membership.store, membership.links) == (0, 1, None, {})
    assert (membership.host_of, membership.pids) == ([host_identity()], [os.getpid()])
    assert membership.connect("comm 0", [0]) == {}
    membership.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_wrong_secret_is_refused_within_a_second_and_missed_by_the_others(workers):
    with ExitStack() as stack:
        for wrong_rank in range(3):  # three jobs, which wait for their deadlines at the same time
            server = stack.enter_context(StoreServer(SECRET.encode()))
            for rank in range(3):
                environ = ringfold(rank, 3, server.address, TIMEOUT_S="2.5")
                workers.start(environ | ({"RINGFOLD_SECRET": "f" * 32} if rank == wrong_rank else {}))
        reports = workers.reports()
    for number, report in enumerate(reports):
        wrong_rank, rank = divmod(number, 3)
        if rank == wrong_rank:
            assert report["error"] == "AuthenticationError"
            assert f"rank {rank} of job-17 does not hold the job's secret" in report["message"]
            assert report["seconds"] < 1.0
        else:
            assert report["error"] == "ConnectError"
            assert f"rank {wrong_rank} of 3 did not arrive" in report["message"]


def test_rank_0_says_how_many_it_refused(workers):
    with two_ports() as port:
        workers.start(torchrun(0, 2, port, RINGFOLD_SECRET=SECRET, RINGFOLD_TIMEOUT_S="1.5"))
        workers.start(torchrun(1, 2, port, RINGFOLD_SECRET="f" * 32, RINGFOLD_TIMEOUT_S="1.5"))
        first, second = workers.reports()
    assert second["error"] == "AuthenticationError"
    assert "rank 1 of 2 did not arrive" in first["message"]
    assert "refused because they did not hold the job's secret: 1 connections" in first["message"]


def test_missing_ranks_are_named_by_everybody_at_the_deadline(workers):
    jobs = [(missing, launched) for missing in ([2], [1, 3]) for launched in (True, False)]
    expected = []
    with ExitStack() as stack:
        for number, (missing, launched) in enumerate(jobs):  # all wait for their deadlines at the same time
            server = stack.enter_context(StoreServer(SECRET.encode()))
            for rank in (rank for rank in range(4) if rank not in missing):
                environ = ringfold(rank, 4, server.address) if launched else torchrun(rank, 4, 29500 + number)
                workers.start(environ | {"RINGFOLD_TIMEOUT_S": "2.5"})
                expected.append("rank 2 of 4" if missing == [2] else "ranks 1, 3 of 4")
        reports = workers.reports()
    for report, named in zip(reports, expected, strict=True):
        assert report["error"] == "ConnectError", report
        assert f"{named} did not arrive" in report["message"]
        assert "arrived: rank 0 (" in report["message"]
        assert "RINGFOLD_TIMEOUT_S" in report["message"]
        assert report["seconds"] < 5.0


def test_missing_rank_0_is_named(workers):
    with two_ports() as port:
        for secret in ({}, {"RINGFOLD_SECRET": SECRET}):  # by handoff, and at an address
            workers.start(torchrun(1, 2, port, RINGFOLD_TIMEOUT_S="1.0") | secret)
        reports = workers.reports()
    for report in reports:
        assert report["error"] == "ConnectError"
        assert "rank 0 of 2 did not arrive: rank 1" in report["message"]
        assert 0.9 < report["seconds"] < 3.0


def test_store_that_is_gone_is_told_at_once(workers):
    with StoreServer(SECRET.encode()) as server:
        pass
    workers.start(ringfold(1, 2, server.address))
    (report,) = workers.reports()
    assert report["error"] == "ConnectError"
    assert f"rank 1 of job-17 did not reach the store: no connection to {server.address}" in report["message"]
    assert report["seconds"] < 2.0


def test_taken_port_is_told_with_what_to_set(workers):
    with two_ports() as port, socket.create_server(("127.0.0.1", port + 1)):
        workers.start(torchrun(0, 2, port, RINGFOLD_SECRET=SECRET))
        (report,) = workers.reports()
    assert report["error"] == "ConnectError"
    assert f"cannot serve its store at 127.0.0.1:{port + 1}: Address already in use" in report["message"]
    assert "Set RINGFOLD_STORE=HOST:PORT to a free port" in report["message"]


@pytest.mark.parametrize(("what", "usual", "other"), [("transport", "auto", "tcp"), ("streams", "4", "2")])
def test_ranks_that_were_told_different_things_all_say_so(workers, what, usual, other):
    with StoreServer(SECRET.encode()) as server:
        workers.start(ringfold(0, 2, server.address))
        workers.start(ringfold(1, 2, server.address, **{what.upper(): other}))
        first, second = workers.reports()
    assert first["error"] == second["error"] == "ConfigError"
    assert f"{what} is {usual} on rank 0, but rank 1 ({socket.gethostname()}, pid " in first["message"]
    assert f"{what} is {other} on rank 1, but rank 0 (" in second["message"]


def test_ranks_that_count_differently_do_not_wait_for_who_does_not_exist(workers):
    with StoreServer(SECRET.encode()) as server:
        for rank, size in ((0, 2), (1, 3)):
            workers.start(ringfold(rank, size, server.address))
        first, second = workers.reports()
    assert "world_size is 2 on rank 0, but rank 1 (" in first["message"]
    assert "world_size is 3 on rank 1, but rank 0 (" in second["message"]
    assert {report["error"] for report in (first, second)} == {"ConfigError"}
    assert max(report["seconds"] for report in (first, second)) < 10


ELSEWHERE = ["unshare", "--user", "--map-current-user", "--ipc"]  # as in a container of its own on the same network


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*ELSEWHERE, "true"], capture_output=True).returncode != 0,
    reason="this machine does not let us make namespaces",
)
@pytest.mark.parametrize("transport", ["auto", "shm"])
def test_rank_that_shares_no_memory_is_linked_over_tcp_or_refused(workers, transport):
    with StoreServer(SECRET.encode()) as server:
        for rank in range(3):
            workers.start(ringfold(rank, 3, server.address, TRANSPORT=transport), prefix=ELSEWHERE if rank == 1 else [])
        reports = workers.reports()
    if transport == "shm":
        for report in reports:
            assert report["error"] == "ConfigError"
            assert "transport shm needs one host, but rank 1 (" in report["message"]
    else:
        hosts = reports[0]["host_of"]
        assert hosts[0] == hosts[2] == host_identity() != hosts[1]
        families = [report["families"] for report in reports]
        assert families[0] == {"1": "AF_INET", "2": "AF_UNIX"}
        assert families[1] == {"0": "AF_INET", "2": "AF_INET"}
        assert families[2] == {"0": "AF_UNIX", "1": "AF_INET"}


def test_second_process_of_one_rank_is_refused():
    with StoreServer(SECRET.encode()) as server:
        job = Job(1, 2, 1, 2, "ringfold", server.address, SECRET.encode(), f"twice-{RUN}", timeout_s=0.3)
        with Store(server.address, SECRET.encode(), 10) as store:
            store.add(f"twice-{RUN}/1/claim/1", 1)
        with pytest.raises(ConfigError, match="is the second process that says it is rank 1"):
            join(job)


def test_more_connections_are_told_apart_by_purpose_and_rank(workers):
    # Rank 0 asks for the two in one order, rank 1 in the other; 2 is only in the second.
    body = (
        JOIN
        + """
    order = ["a", "b"] if job.rank == 0 else ["b"] if job.rank == 2 else ["b", "a"]
    sockets = {purpose: membership.connect(purpose, [0, 1] if purpose == "a" else [0, 2, 1]) for purpose in order}
    report["extra"] = {purpose: swap(sockets[purpose], job.rank, purpose.upper()) for purpose in sorted(order)}
    report["tcp"] = all(s.family.name == "AF_INET" for each in sockets.values() for s in each.values())
    for each in sockets.values():
        for sock in each.values():
            sock.close()
"""
        + CLOSE
    )
    for rank in range(3):
        workers.start(torchrun(rank, 3), body)
    reports = workers.reports()
    assert_joined(reports, "torchrun")
    assert [report["tcp"] for report in reports] == [True] * 3
    assert reports[0]["extra"] == {"a": {"1": "A001"}, "b": {"1": "B001", "2": "B002"}}
    assert reports[1]["extra"] == {"a": {"0": "A000"}, "b": {"0": "B000", "2": "B002"}}
    assert reports[2]["extra"] == {"b": {"0": "B000", "1": "B001"}}


def test_member_that_does_not_connect_is_named(workers):
    for rank in range(3):
        body = (
            JOIN
            + ("" if rank == 2 else '\n    membership.connect("comm 7", [0, 1, 2])\n')
            + ("\n    sys.stdin.read()\n" if rank == 2 else "")
            + CLOSE
        )
        workers.start(torchrun(rank, 3, RINGFOLD_TIMEOUT_S="1.5"), body)
    first, second, _ = workers.reports()
    for report in (first, second):
        assert report["error"] == "ConnectError"
        assert f"rank 2 did not connect to rank {report['rank']} for 'comm 7'" in report["message"]


REPEAT = """
    def left():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    times_s = []
    for count in range(200):
        began_join = time.monotonic()
        membership = join(job)
        times_s.append(time.monotonic() - began_join)
        membership.close()
        if count == 2:
            report["before"] = left()
    report |= {"after": left(), "generation": membership.generation, "times_s": sorted(times_s)}
"""


@pytest.mark.quiet
@pytest.mark.parametrize("mode", ["launcher", "handoff", "address"])
def test_two_hundred_joins_are_fast_and_leave_nothing(workers, mode):
    with two_ports() as port, StoreServer(SECRET.encode()) as server:
        for rank in range(2):
            secret = {"RINGFOLD_SECRET": SECRET} if mode == "address" else {}
            workers.start(ringfold(rank, 2, server.address) if mode == "launcher" else torchrun(rank, 2, port) | secret, REPEAT)
        reports = workers.reports(100)
        with Store(server.address, SECRET.encode(), 10) as store:
            assert store.delete("") == 0
    for report in reports:
        assert "error" not in report, report
        assert report["after"] == report["before"]
        assert report["generation"].endswith("/200")
        # The fast half tells what a join costs; the rest tells what else this machine was doing.
        assert report["times_s"][50] < 0.010


def test_failed_joins_leave_nothing():
    before = set(os.listdir("/proc/self/fd"))
    with StoreServer(SECRET.encode()) as server:
        jobs = [
            Job(0, 2, 0, 2, "torchrun", job_id=f"lonely-{RUN}", timeout_s=0.05),
            Job(1, 2, 1, 2, "torchrun", job_id=f"lonely-{RUN}", timeout_s=0.05),
            Job(0, 2, 0, 2, "ringfold", server.address, SECRET.encode(), f"alone-{RUN}", timeout_s=0.05),
        ]
        for _ in range(5):
            for job in jobs:
                with pytest.raises(ConnectError, match=f"rank {1 - job.rank} of 2 did not arrive"):
                    join(job)
    assert set(os.listdir("/proc/self/fd")) == before


FORKED = """
    membership = join(job)
    if job.rank == 1:
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.close(writing)
            if LETS_GO:
                membership.close_descriptors()
            os.read(reading, 1)  # until rank 1 itself has ended
            os._exit(0)
        membership.links[0].sendall(b"x")
        membership.close()
        sys.stdin.readline()
        os.close(writing)
    else:
        link = membership.links[1]
        link.settimeout(2 if LETS_GO else 0.3)
        report["first"] = link.recv(1).decode()
        try:
            report["end"] = link.recv(1).decode()
        except TimeoutError:
            report["end"] = "no end"
        membership.close()
"""


@pytest.mark.parametrize(("lets_go", "end"), [(True, ""), (False, "no end")])
def test_forked_child_that_closes_its_descriptors_does_not_hide_its_parents_end(workers, lets_go, end):
    for rank in range(2):
        workers.start(torchrun(rank, 2), FORKED.replace("LETS_GO", str(lets_go)))
    first, _ = workers.reports()
    assert (first["first"], first["end"]) == ("x", end)


def test_no_descriptor_of_a_membership_is_inherited(workers):
    body = """
    def opened():
        return {int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}

    before = opened()
    membership = join(job)
    new = opened() - before
    report |= {"new": len(new), "inheritable": [fd for fd in new if os.get_inheritable(fd)]}
    swap(membership.links, job.rank, "E")
    membership.close()
"""
    for rank in range(2):
        workers.start(torchrun(rank, 2), body)
    for report in workers.reports():
        assert report["new"] >= 5  # a link, two listeners, a bell, the store's client
        assert report["inheritable"] == []
