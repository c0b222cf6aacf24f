"""A process that has imported torch and ringfold once, and forks ranks from that state in milliseconds.

Starting torch costs two seconds; forking it costs ten milliseconds. The server stays single-threaded (a fork copies one thread only),
does nothing on its own, and ends with its client: at end of file on the control socket it kills every rank it started.

The two sides talk over a SOCK_SEQPACKET pair in small JSON messages; descriptors travel beside them, and whatever is large lies in
memory files. Ranks stay zombies until the client asks for their status, so a pid in the client's hands never names a stranger.
"""

from __future__ import annotations

import array
import atexit
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PRELOAD = ("torch", "numpy", "pytest", "ringfold.collectives.communicator", "ringfold.parallel.data_parallel", "ringfold.runtime.engine")
FDS_PER_RANK = 4  # in this order: record, stdout, stderr, stacks
MESSAGE_NBYTES = 1 << 16


class ForkServer:
    """The client's end of one server process."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environ = {k: v for k, v in os.environ.items() if not k.startswith("RINGFOLD_")}
        environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environ.get("PYTHONPATH")])])
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from tests.harness.forkserver import main; main({theirs.fileno()})"],
                cwd=ROOT,
                env=environ,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.socket = ours
        self.lock = threading.Lock()

    def fork(self, payload_fd: int, rank_fds: list[list[int]], module: str) -> list[int]:
        """Fork one process for each entry of `rank_fds` and return their pids."""
        fds = [payload_fd, *(fd for four in rank_fds for fd in four)]
        return self._ask({"action": "fork", "count": len(rank_fds), "module": module}, fds)

    def reap(self, pid: int) -> int:
        """Wait for a rank that has ended and return its `waitpid` status."""
        return self._ask({"action": "reap", "pid": pid}, [])

    def _ask(self, message: dict[str, Any], fds: list[int]) -> Any:
        with self.lock:
            socket.send_fds(self.socket, [json.dumps(message).encode()], fds)
            reply = self.socket.recv(MESSAGE_NBYTES)
        if not reply:
            raise RuntimeError(f"the fork server ended with status {self.process.wait(10)}; its stderr is in the test's output")
        answer = json.loads(reply)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        self.socket.close()
        self.process.wait(10)


_server: ForkServer | None = None


def server() -> ForkServer:
    """Return the one server of this session, starting it at the first call."""
    global _server
    if _server is None:
        _server = ForkServer()
        atexit.register(close_server)
    return _server


def close_server() -> None:
    global _server
    if _server is not None:
        _server.close()
        _server = None


def serve(control: socket.socket) -> None:
    """Answer requests until the client hangs up; then kill what is left."""
    living: set[int] = set()
    while True:
        message, ancillary, _, _ = control.recvmsg(MESSAGE_NBYTES, socket.CMSG_SPACE(253 * 4), socket.MSG_CMSG_CLOEXEC)
        if not message:
            for pid in living:
                os.killpg(pid, signal.SIGKILL)
            return
        fds = array.array("i")
        for _, _, data in ancillary:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        request = json.loads(message)
        try:
            if request["action"] == "reap":
                _, value = os.waitpid(request["pid"], 0)
                living.discard(request["pid"])
            else:
                value = fork_ranks(control, request, list(fds))
                living.update(value)
            answer = {"value": value}
        except Exception as error:
            answer = {"error": f"fork server: {type(error).__name__}: {error}"}
        for fd in fds:
            os.close(fd)
        control.send(json.dumps(answer).encode())


def fork_ranks(control: socket.socket, request: dict[str, Any], fds: list[int]) -> list[int]:
    from tests.harness import rank  # here, so that the client does not need it

    if request["module"]:
        importlib.import_module(request["module"])  # once for all ranks
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"importing {request['module']} started {threads - 1} threads; a fork would lose them")
    gc.collect()
    gc.freeze()
    payload, per_rank = fds[0], [fds[1 + i * FDS_PER_RANK :][:FDS_PER_RANK] for i in range(request["count"])]
    pids = []
    for own in per_rank:
        pid = os.fork()
        if pid == 0:
            control.close()
            for fd in set(fds) - {payload, *own}:
                os.close(fd)
            rank.main(len(pids), payload, *own)
        pids.append(pid)
    return pids


def main(control_fd: int) -> None:
    """Import what ranks need, then serve on the descriptor."""
    control = socket.socket(fileno=control_fd)
    control.set_inheritable(False)
    import torch

    torch.set_num_threads(1)
    for name in PRELOAD:
        with suppress(Exception):  # what cannot be imported fails in the test that needs it
            importlib.import_module(name)
    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False  # torch's cost each rank 50 ms at its end, and are about state that ends with the process anyway
    serve(control)
