"""Ranks of a job of our own on this host: processes that call one function each and return its value.

For checks that need several ranks where the user started one process; a training job is started by `ringfold run`. The processes are
spawned, so the function and its argument are sent by name and by value, and they end with this call, whatever happens in it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import secrets
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from ringfold.collectives import environment
from ringfold.collectives.errors import CollectiveTimeout, LaunchError, PeerLost
from ringfold.collectives.store import StoreServer

__all__ = ["run_local_ranks"]


def run_local_ranks(size: int, function: Callable[[Any], Any], argument: Any, timeout_s: float) -> list[Any]:
    """Call `function(argument)` on `size` ranks and return the values in rank order.

    Raises: the exception of the first rank that failed for a reason of its own; LaunchError for a rank that died, or at the deadline.
    """
    context = multiprocessing.get_context("spawn")
    payload = pickle.dumps((function, argument))
    processes = []
    readers: dict[Connection, int] = {}
    with StoreServer(secret=(secret := secrets.token_hex(32)).encode()) as store:
        common = {
            environment.WORLD_SIZE: str(size),
            environment.LOCAL_SIZE: str(size),
            environment.STORE: store.address,
            environment.SECRET: secret,
            environment.JOB: f"local-{secrets.token_hex(8)}",
            environment.TIMEOUT_S: str(timeout_s),
            # What a launcher said to this process is not for the ranks.
            environment.PAGE_FD: "",
            environment.LAYOUT: "",
        }
        try:
            for rank in range(size):
                reader, writer = context.Pipe(duplex=False)
                environ = common | {environment.RANK: str(rank), environment.LOCAL_RANK: str(rank)}
                process = context.Process(target=_rank_main, args=(environ, payload, writer), daemon=True)
                process.start()
                writer.close()
                processes.append(process)
                readers[reader] = rank
            return _collect(size, readers, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.join(timeout=1.0)
                if process.is_alive():
                    process.kill()
                process.join()
            for reader in readers:
                reader.close()


def _collect(size: int, readers: dict[Connection, int], deadline: float) -> list[Any]:
    values: dict[int, Any] = {}
    failures: list[BaseException] = []
    waiting = dict(readers)
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = ", ".join(map(str, sorted(waiting.values())))
            failures.append(LaunchError(f"rank {missing} of {size} did not answer in time. Give more time, or a smaller batch."))
            break
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = waiting.pop(reader)
            try:
                succeeded, value = pickle.loads(reader.recv_bytes())
            except EOFError:
                succeeded, value = False, LaunchError(f"rank {rank} of {size} ended without a word: it was killed, or its script ended it.")
            if succeeded:
                values[rank] = value
            else:
                failures.append(value)
    for error in sorted(failures, key=lambda error: isinstance(error, PeerLost | CollectiveTimeout)):
        raise error
    return [values[rank] for rank in range(size)]


def _rank_main(environ: dict[str, str], payload: bytes, writer: Connection) -> None:
    """Be one rank."""
    os.environ.update(environ)
    import torch

    torch.set_num_threads(1)  # as many processes as ranks share the cores already
    try:
        function, argument = pickle.loads(payload)
        answer = pickle.dumps((True, function(argument)))
    except BaseException as error:
        answer = _pickled_failure(error, environ[environment.RANK])
    writer.send_bytes(answer)
    writer.close()


def _pickled_failure(error: BaseException, rank: str) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        data = pickle.dumps((False, error))
        again = pickle.loads(data)[1]
        again.add_note(f"on rank {rank}:\n{text}")
        return pickle.dumps((False, again))
    except Exception:
        return pickle.dumps((False, LaunchError(f"rank {rank} raised {type(error).__name__}: {error}\n{text}")))
