"""One rank of a group: join a library, then do what the driver asks for, over a socket, until the driver goes away.

    python -m ringfold.benchmarks._rank MODULE:CLASS FOLDER SIZE MAX_NBYTES

Between requests the rank is blocked in a read and takes no processor time. Requests and replies are lines of JSON:

    {"do": "prepare", "case": NAME, ...}  make buffers and values     {} or {"unsupported": why}
    {"do": "round", "case": NAME, "calls": K}                         {"seconds": [K], "wrong": elements}
    {"do": "forget", "case": NAME}        give the buffers back       {}

Any failure is a reply {"failed": traceback}. The end of the driver is an end of file: a rank that is busy then, maybe for ever, ends itself.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import queue
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from ringfold.benchmarks._operations import OPERATIONS, Case
from ringfold.benchmarks.sides.side import Call, Place, Side, Unsupported
from torch import Tensor

LEAVE_S = 5.0  # what a rank may still take to leave after the driver has gone
POISON = 101  # is in no result
SPINS = 2000  # about 100 us: then the other may need this core
SLOT = 8  # int64 in a cache line: each rank writes a line of its own


class Barrier:
    """A barrier in shared memory that spins, the same for every library: ranks leave it within a microsecond or two of each other."""

    def __init__(self, path: Path, rank: int, size: int) -> None:
        with open(path, "r+b") as file:
            self._slots = memoryview(mmap.mmap(file.fileno(), size * SLOT * 8)).cast("q")
        self._own, self._others = rank * SLOT, [other * SLOT for other in range(size) if other != rank]
        self._turn = 0

    def wait(self) -> None:
        """Return when all have come. A rank that has ended never comes: then the driver gives up and ends this one."""
        self._turn += 1
        slots, turn = self._slots, self._turn
        slots[self._own] = turn
        spins = 0
        for other in self._others:
            while slots[other] < turn:
                spins += 1
                if spins > SPINS:
                    os.sched_yield()


@dataclass
class Prepared:
    """A case of one side, with its tensors bound; `own` is what `input` holds before each call."""

    call: Call
    own: Tensor | None
    input: Tensor | None
    output: Tensor | None
    expected: Tensor | None


def prepare(side: Side, request: dict[str, Any]) -> Prepared:
    operation = OPERATIONS[request["operation"]]
    case = Case(side.rank, side.size, request["count"], getattr(torch, request["dtype"]), request["reduction"])
    side.device = torch.device(request["device"])
    side.choose(request["memory"], request["algorithm"])
    if not hasattr(side, request["operation"]):
        raise Unsupported(f"no {request['operation']}")
    own, expected = operation.input(case), operation.expected(case)
    input = side.empty(own.numel(), case.dtype) if own is not None else None
    output = input if operation.in_place else side.empty(expected.numel(), case.dtype) if expected is not None else None
    return Prepared(operation.bind(side, output, input, case), own, input, output, expected)


def time_calls(prepared: Prepared, barrier: Barrier, calls: int) -> dict[str, Any]:
    seconds, result = [], None
    on_gpu = any(tensor is not None and tensor.is_cuda for tensor in (prepared.input, prepared.output))
    for number in range(calls):
        if prepared.input is not None and prepared.own is not None:
            prepared.input.copy_(prepared.own)
        if number == calls - 1 and prepared.output is not None and prepared.output is not prepared.input:
            prepared.output.fill_(POISON)
        if on_gpu:
            torch.cuda.synchronize()
        barrier.wait()
        start = time.perf_counter()
        result = prepared.call()
        if on_gpu:  # the end of the call is not the end of the operation
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        barrier.wait()  # the floor's ranks write to each other's memory: nobody refills or checks before all are done
    output = result if isinstance(result, Tensor) else prepared.output
    wrong = int((output.cpu() != prepared.expected).sum()) if output is not None and prepared.expected is not None else 0
    return {"seconds": seconds, "wrong": wrong}


def answer(side: Side, barrier: Barrier, prepared: dict[str, Prepared], request: dict[str, Any]) -> dict[str, Any]:
    try:
        if request["do"] == "forget":
            del prepared[request["case"]]
        elif request["do"] == "prepare":
            prepared[request["case"]] = prepare(side, request)
        else:
            return time_calls(prepared[request["case"]], barrier, request["calls"])
    except Unsupported as reason:
        return {"unsupported": str(reason)}
    except Exception:
        return {"failed": traceback.format_exc()}
    return {}


def listen(connection: socket.socket, requests: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    with connection.makefile("r") as lines:
        for line in lines:
            requests.put(json.loads(line))
    requests.put(None)
    time.sleep(LEAVE_S)
    os._exit(1)


def main(name: str, folder: Path, size: int, max_nbytes: int) -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(folder / "driver"))
    requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(connection, requests), daemon=True).start()  # also while joining: it may never end
    module, class_name = name.split(":")
    side: Side = getattr(import_module(f"ringfold.benchmarks.sides.{module}"), class_name)(Place(folder, size, max_nbytes))
    if side.size != size:
        raise RuntimeError(f"{name} sees {side.size} ranks, not {size}")
    barrier = Barrier(folder / "barrier", side.rank, size)
    gc.disable()

    def send(reply: dict[str, Any]) -> None:
        connection.sendall(json.dumps(reply).encode() + b"\n")

    send({"rank": side.rank, "pid": os.getpid(), "version": side.version(), "threads": torch.get_num_threads()})
    prepared: dict[str, Prepared] = {}
    while (request := requests.get()) is not None:
        send(answer(side, barrier, prepared, request))
    prepared.clear()
    side.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
