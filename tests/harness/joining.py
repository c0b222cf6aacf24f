"""Processes that join a job and say how it went, under the environment of any launcher; they import no torch, so each starts at once."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random

import pytest

__all__ = ["CLOSE", "JOIN", "RUN", "SECRET", "Workers", "hydra", "openmpi", "ringfold", "slurm", "torchrun", "two_ports"]

SECRET = "0123456789abcdef0123456789abcdef"
RUN = secrets.token_hex(8)  # two runs of this suite at the same time are two jobs

# Every worker joins, tries every link in both directions, and prints one JSON line; BODY sees `membership`, `report` and the sockets' words.
PRELUDE = """
import json, os, sys, threading, time
from ringfold.collectives.environment import Job
from ringfold.collectives.errors import RingfoldError
from ringfold.collectives.rendezvous import join

def swap(sockets, rank, tag):
    for sock in sockets.values():
        sock.settimeout(20)
        sock.sendall(f"{tag}{rank:03}".encode())
    return {peer: sock.recv(4).decode() for peer, sock in sockets.items()}

job = Job.from_environment()
report = {"source": job.source, "rank": job.rank}
began = time.monotonic()
try:
BODY
except RingfoldError as error:
    report |= {"error": type(error).__name__, "message": str(error)}
report["seconds"] = time.monotonic() - began
print(json.dumps(report))
"""
JOIN = """
    membership = join(job)
    report |= {"generation": membership.generation, "families": {p: s.family.name for p, s in membership.links.items()}}
    report |= {"blocking": all(s.getblocking() for s in membership.links.values()), "swapped": swap(membership.links, job.rank, "L")}
    report |= {"pids": membership.pids, "host_of": membership.host_of, "own": os.getpid(), "has_store": membership.store is not None}
"""
CLOSE = """
    membership.close()
    membership.close()
"""


class Workers:
    """Worker processes of one job, each with its own environment; all are waited for, or killed at the end of the test."""

    def __init__(self) -> None:
        self.children: list[subprocess.Popen] = []

    def start(self, environ: dict[str, str], body: str = JOIN + CLOSE, prefix: Sequence[str] = ()) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("RINGFOLD_", "SLURM_", "PMI", "OMPI_"))}
        command = [*prefix, sys.executable, "-c", PRELUDE.replace("BODY", body.strip("\n"))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.children.append(subprocess.Popen(command, env={**clean, **environ}, text=True, **pipes))

    def reports(self, timeout_s: float = 60) -> list[dict]:
        """Wait for each in turn and return what it printed; a worker's standard input ends only when those before it have ended."""
        deadline = time.monotonic() + timeout_s
        reports = []
        for child in self.children:
            out, err = child.communicate(timeout=max(0.1, deadline - time.monotonic()))
            assert child.returncode == 0, err
            reports.append(json.loads(out))
        return reports


@contextmanager
def two_ports() -> Iterator[int]:
    """Yield a port that somebody else listens on, as torchrun's store does on MASTER_PORT, whose successor is free."""
    random = Random()
    for _ in range(100):
        port = random.randrange(20_000, 30_000)  # below what the system hands out, so that nobody is given the free one meanwhile
        try:
            socket.create_server(("127.0.0.1", port + 1)).close()
            occupant = socket.create_server(("127.0.0.1", port))
        except OSError:
            continue
        with occupant:
            yield port
        return
    pytest.fail("no two ports in a row are free")


def ringfold(rank: int, size: int, store: str, **more: str) -> dict[str, str]:
    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_SIZE": size, "STORE": store, "SECRET": SECRET, "JOB": "job-17"}
    return {f"RINGFOLD_{name}": str(value) for name, value in (numbers | {"TIMEOUT_S": "30"} | more).items()}


def torchrun(rank: int, size: int, port: int = 29500, **more: str) -> dict[str, str]:
    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    run = {"TORCHELASTIC_RUN_ID": RUN, "TORCHELASTIC_RESTART_COUNT": "0", "RINGFOLD_TIMEOUT_S": "30"}
    return {name: str(value) for name, value in (numbers | run | more).items()}


def openmpi(rank: int, size: int) -> dict[str, str]:
    numbers = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank, "LOCAL_SIZE": size}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in numbers.items()} | {"PMIX_NAMESPACE": f"prterun-{RUN}@1"}


def hydra(rank: int, size: int) -> dict[str, str]:
    return {"PMI_RANK": str(rank), "PMI_SIZE": str(size), "MPI_LOCALRANKID": str(rank), "MPI_LOCALNRANKS": str(size)}


def slurm(rank: int, size: int) -> dict[str, str]:
    numbers = {"PROCID": rank, "STEP_NUM_TASKS": size, "LOCALID": rank, "STEP_TASKS_PER_NODE": size, "NODEID": 0, "STEP_ID": 0, "JOB_ID": RUN}
    return {f"SLURM_{name}": str(value) for name, value in numbers.items()}
