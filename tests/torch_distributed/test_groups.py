"""Groups and their works: how ranks meet, subgroups, destroying and making again, futures whose callbacks communicate, what a failure looks like."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import subprocess
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ringfold.collectives import environment
from ringfold.collectives.errors import CollectiveTimeout, ConfigError, PeerLost
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.harness import run_ranks, spawn_ranks
from tests.harness.leaks import Resources
from tests.torch_distributed.groups import ringfold_group

CLONE_NEWUSER, CLONE_NEWIPC = 0x10000000, 0x08000000  # linux/sched.h


def use_subgroups(folder: str) -> list[str]:
    with ringfold_group(folder) as (rank, size):
        names = [dist.group.WORLD.group_name]
        for members in ([0, 2], [1, 2], [0, 1, 2], [1]):
            group = dist.new_group(members, group_desc=f"of {len(members)}")
            if rank not in members:
                assert group == dist.GroupMember.NON_GROUP_MEMBER
                continue
            assert (group.rank(), group.size(), group.group_desc) == (members.index(rank), len(members), f"of {len(members)}")
            assert dist.get_backend(group) == group.name() == "ringfold"
            assert dist.get_process_group_ranks(group) == members
            tensor = torch.tensor([float(rank)])
            dist.all_reduce(tensor, group=group)
            assert tensor.item() == sum(members)
            dist.broadcast(tensor.fill_(rank), members[-1], group=group)
            assert tensor.item() == members[-1]
            names.append(group.group_name)
            if members == [1, 2]:
                dist.destroy_process_group(group)
        dist.barrier()
        assert len(set(names)) == len(names)
        assert size == 3
        return names


def test_a_group_of_some_ranks_knows_its_members_and_only_they_make_it(tmp_path: Any) -> None:
    run_ranks(3, use_subgroups, str(tmp_path), joined=False)


def make_and_destroy(folder: str) -> list[str]:
    leaked: list[str] = []
    for attempt in range(5):
        with ringfold_group(folder) as (rank, size):
            pair = dist.new_group([0, 1])
            tensor = torch.ones(1000)
            future = dist.all_reduce(tensor, async_op=True).get_future()
            assert future.wait()[0] is tensor
            assert tensor[0] == size
            if rank < 2:
                dist.all_reduce(tensor, group=pair)
        now = Resources.now()
        if attempt == 1:  # what the first two needed for good is there
            before = now
    deadline = time.monotonic() + 3
    while (leaked := before.leaked_until(Resources.now())) and time.monotonic() < deadline:
        time.sleep(0.02)
    return leaked


def test_a_destroyed_group_leaves_nothing_behind_and_can_be_made_again(tmp_path: Any) -> None:
    assert run_ranks(3, make_and_destroy, str(tmp_path), joined=False) == [[], [], []]


def chain_futures(folder: str) -> None:
    """On rank 0 each of 20 callbacks waits until all run, and then for a collective of its own."""
    with ringfold_group(folder) as (rank, size):
        tensors = [torch.full((10,), float(i)) for i in range(20)]
        expected = [i * size**2 for i in range(20)]
        if rank == 1:
            dist.recv(torch.empty(1), 0)  # rank 0 has registered its callbacks: they would run at once on a future that is complete
            for tensor in tensors * 2:
                dist.all_reduce(tensor)
            assert [tensor[0] for tensor in tensors] == expected
            return
        all_run = threading.Barrier(len(tensors))
        turns = [threading.Event() for _ in range(len(tensors) + 1)]
        turns[0].set()

        def again(i: int, future: Any) -> float:
            (tensor,) = future.value()
            all_run.wait(20)
            turns[i].wait(20)
            reduced = dist.all_reduce(tensor, async_op=True).get_future()
            turns[i + 1].set()
            return float(reduced.wait()[0][0])

        works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        futures = [work.get_future().then(lambda future, i=i: again(i, future)) for i, work in enumerate(works)]
        dist.send(torch.zeros(1), 1)
        assert [future.wait() for future in futures] == expected
        assert works[0].get_future() is works[0].get_future()
        assert works[0].get_future().value()[0] is tensors[0]


def test_callbacks_of_futures_may_wait_for_collectives_however_many_there_are(tmp_path: Any) -> None:
    run_ranks(2, chain_futures, str(tmp_path), joined=False)


def wait_in_vain(folder: str) -> None:
    with ringfold_group(folder) as (rank, _):
        if rank == 0:
            tensor = torch.zeros(3)
            work = dist.irecv(tensor, 1)
            began = time.monotonic()
            with pytest.raises(CollectiveTimeout, match="the operation is not complete"):
                work.wait(timedelta(seconds=0.05))
            assert 0.05 <= time.monotonic() - began < 5
            assert not work.is_completed()
            assert not work.is_success()
            dist.send(torch.ones(1), 1)
            work.wait()
            assert tensor.tolist() == [1, 2, 3]
        else:
            dist.recv(torch.empty(1), 0)
            dist.send(torch.tensor([1.0, 2.0, 3.0]), 0)
        group = dist.new_group(timeout=timedelta(seconds=0.3))
        if rank == 0:
            with pytest.raises(CollectiveTimeout, match=r"barrier .* 0\.3 s"):
                dist.barrier(group)
        group = dist.new_group()
        if rank == 0:
            with pytest.raises(CollectiveTimeout, match=r"barrier .* 0\.2 s"):
                dist.barrier(group, timeout=timedelta(seconds=0.2))
        dist.barrier()


def test_a_wait_ends_at_its_own_timeout_and_an_operation_at_its_groups(tmp_path: Any) -> None:
    run_ranks(2, wait_in_vain, str(tmp_path), joined=False)


def lose_a_rank(folder: str) -> list[str]:
    with ringfold_group(folder) as (rank, _):
        model = DistributedDataParallel(nn.Linear(50, 50))
        model(torch.ones(2, 50)).sum().backward()
        done = [Path(folder, f"done {other}") for other in (0, 2)]
        if rank == 1:
            while not all(path.exists() for path in done):  # else it may die while another still waits in its first backward
                time.sleep(0.001)
            os._exit(9)
        done[rank // 2].touch()
        errors = []
        try:
            model(torch.ones(2, 50)).sum().backward()
        except Exception as error:
            errors.append(str(error))
        try:
            dist.all_reduce(torch.ones(3))
        except PeerLost as error:
            errors.append(str(error))
        work = dist.all_reduce(torch.ones(3), async_op=True)
        with pytest.raises(RuntimeError, match="PeerLost"):
            work.get_future().wait()
        assert isinstance(work.exception(), PeerLost)
        assert not work.is_success()
        return errors


def test_when_a_rank_dies_ddp_and_every_later_operation_say_so(tmp_path: Any) -> None:
    with spawn_ranks(3, lose_a_rank, str(tmp_path), joined=False) as ranks:
        outcomes = ranks.wait(60)
    assert outcomes[1].exit_status == 9
    for rank in (0, 2):
        assert outcomes[rank].returned, outcomes[rank]
        assert len(outcomes[rank].value) == 2
        for text in outcomes[rank].value:
            assert "rank 1 (" in text, text


def fail_without_destroying(folder: str) -> None:
    rank, size = int(os.environ[environment.RANK]), int(os.environ[environment.WORLD_SIZE])
    dist.init_process_group("ringfold", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
    if rank == 0:
        dist.all_reduce(torch.ones(3), async_op=True).get_future()  # a thread waits for rank 1, which never comes
        raise ValueError("in the script")
    dist.recv(torch.empty(1), 0)


def test_a_rank_that_fails_ends_at_once_and_the_others_learn_of_it(tmp_path: Any) -> None:
    with spawn_ranks(2, fail_without_destroying, str(tmp_path), joined=False) as ranks:
        failed, told = ranks.wait(30)
    assert (failed.kind, failed.exit_status) == ("ValueError", 1)
    assert told.kind == "PeerLost"
    assert (told.ended_ns - failed.ended_ns) / 1e9 < 5
    assert (failed.exited_ns - failed.ended_ns) / 1e9 < 5


def meet(folder: str, secret: str | None, elsewhere: int) -> list[tuple[float, str]] | str:
    """Meet three times with nothing in common but a TCPStore; rank `elsewhere` as in a container of its own on the same network."""
    rank, size = int(os.environ[environment.RANK]), int(os.environ[environment.WORLD_SIZE])
    for name in [name for name in os.environ if name.startswith("RINGFOLD_")]:
        del os.environ[name]
    if secret is not None:
        os.environ[environment.SECRET] = secret
    if rank == elsewhere:
        assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWIPC) == 0, os.strerror(ctypes.get_errno())
    port = dist.FileStore(f"{folder}/port", size)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        port.set("port", str(store.port))
    else:
        store = dist.TCPStore("127.0.0.1", int(port.get("port")), size, is_master=False)
    met = []
    try:
        for _ in range(3):
            dist.init_process_group("ringfold", store=store, rank=rank, world_size=size)
            tensor = torch.tensor([float(rank)])
            dist.all_reduce(tensor)
            met.append((tensor.item(), dist.group.WORLD.communicator.transport))
            dist.destroy_process_group()
    except ConfigError as error:
        return str(error)
    finally:
        port.set(f"done {rank}", "")
        port.wait([f"done {other}" for other in range(size)])  # rank 0 is the store's server
    return met


def test_ranks_of_one_host_that_share_only_torchs_store_meet_without_a_secret(tmp_path: Any) -> None:
    assert run_ranks(3, meet, str(tmp_path), None, -1, joined=False) == [[(3.0, "shm")] * 3] * 3


needs_namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "--user", "--ipc", "true"], capture_output=True).returncode != 0,
    reason="this machine does not let us make namespaces",
)


@needs_namespaces
def test_with_a_secret_ranks_of_several_hosts_meet_at_a_store_of_rank_0(tmp_path: Any) -> None:
    assert run_ranks(3, meet, str(tmp_path), secrets.token_hex(16), 2, joined=False) == [[(3.0, "tcp")] * 3] * 3


@needs_namespaces
def test_without_one_they_are_told_to_set_it(tmp_path: Any) -> None:
    for text in run_ranks(3, meet, str(tmp_path), None, 2, joined=False):
        assert "rank 2 of 3 share no host with rank 0, and ranks 0, 1, 2 have no RINGFOLD_SECRET: set it" in text


def test_a_secret_that_can_be_guessed_is_refused(tmp_path: Any) -> None:
    for text in run_ranks(2, meet, str(tmp_path), "guess", -1, joined=False):
        assert "RINGFOLD_SECRET has 5 bytes, expected at least 16 random ones" in text
