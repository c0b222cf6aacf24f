"""RINGFOLD_CHECK_ORDER=1: before each collective all ranks of its communicator compare what they are about to do.

Each gathers a fingerprint of every other's operation, dtype, reduction, count, root and piece lengths. Where they differ, all of them know it,
so they exchange their Python stacks and raise the same CollectiveMismatch, at the very first divergence, without hanging. Where ranks wait for
each other in different communicators, each sees in the other's page that it does. It costs a small all_gather an operation, and makes
asynchronous ones begin together.

Call sites are reported, not compared: ranks may well reach one collective from different lines.
"""

from __future__ import annotations

import hashlib
import os
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from ringfold.collectives._native import core
from ringfold.collectives.codes import FOLDING, OPERATIONS
from ringfold.collectives.errors import CollectiveMismatch
from ringfold.collectives.page import OperationState, Page

if TYPE_CHECKING:
    from ringfold.collectives.communicator import Communicator

__all__ = ["OrderCheck", "describe"]

# Ranks that have not met after this long are looked at: do they wait for each other elsewhere?
SUSPICION_S = 0.3
PAUSE_S = 0.0005
STACK_LINES = 12


class OrderCheck:
    """Compares the operations of one communicator's ranks, one after the other."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._checked = 0
        self._is_checking = False

    def meet(self, description: str) -> None:
        """Wait until every rank is about to issue a collective, and see that they all describe it in the same words.

        Raises: CollectiveMismatch, with what each rank was about to do and from where.
        """
        if self._is_checking:  # the collectives of the check itself
            return
        self._is_checking = True
        try:
            self._compare(description)
            self._checked += 1
        finally:
            self._is_checking = False

    def _compare(self, description: str) -> None:
        comm = self._communicator
        mine = torch.frombuffer(bytearray(hashlib.blake2b(description.encode(), digest_size=16).digest()), dtype=torch.uint8)
        everyone = torch.empty(16 * comm.size, dtype=torch.uint8, device="cpu")
        work = comm.all_gather(everyone, mine, async_op=True)
        assert work is not None
        suspicious_at = time.monotonic() + SUSPICION_S
        while not work.done():
            if time.monotonic() > suspicious_at:
                self._look_elsewhere(description)
            time.sleep(PAUSE_S)
        work.wait()
        if bool((everyone.view(comm.size, 16) == mine).all()):
            return
        told = comm.all_gather_object((description, _site(), _stack()))
        groups: dict[str, list[int]] = {}
        for rank, (what, _, _) in enumerate(told):
            groups.setdefault(what, []).append(rank)
        lines = [f"the ranks of axis {comm.name} diverge at their collective #{self._checked} (RINGFOLD_CHECK_ORDER)"]
        lines += [f"  {_ranks(comm, ranks)}: {what} at {told[ranks[0]][1]}" for what, ranks in groups.items()]
        for ranks in groups.values():
            lines += [f"  stack of {_ranks(comm, ranks[:1])}:", *("    " + line for line in told[ranks[0]][2])]
        error = CollectiveMismatch("\n".join(lines))
        fewest = min(groups.values(), key=len)
        error.peer = comm.members[fewest[0]]
        raise error

    def _look_elsewhere(self, description: str) -> None:
        """Raise if a rank that we wait for waits for us, in another communicator: neither will ever come."""
        comm = self._communicator
        for peer, fd in core.peer_pages(comm.session.context).items():
            page = Page.attach(fd)
            try:
                records = page.operations()
            finally:
                page.close()
            if peer not in comm.members or not records:
                continue
            last = records[-1]
            waits_for_us = last.state is OperationState.STARTED and last.waiting_for == comm.session.rank and last.op == OPERATIONS["all_gather"]
            if waits_for_us and last.comm != comm.identity:
                axis = comm.session.communicator_names.get(last.comm, "another communicator")
                error = CollectiveMismatch(
                    f"ranks wait for each other in different communicators (RINGFOLD_CHECK_ORDER)\n"
                    f"  rank {comm.session.rank} is about to issue {description} on axis {comm.name} at {_site()}\n"
                    f"  rank {peer} is about to issue its #{last.seq} on axis {axis} at {last.site}\n"
                    "  stack of this rank:\n" + "\n".join("    " + line for line in _stack())
                )
                error.peer = peer
                raise error


def _ranks(comm: Communicator, ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(str(comm.members[rank]) for rank in ranks)}"


def _user_frames() -> list[traceback.FrameSummary]:
    frames = traceback.extract_stack()
    return [
        frame for frame in frames if not os.path.realpath(frame.filename).startswith(os.path.realpath(os.path.dirname(__file__)) + os.sep)
    ] or frames[:1]


def _site() -> str:
    frame = _user_frames()[-1]
    return f"{frame.filename.removeprefix(os.getcwd() + os.sep)}:{frame.lineno} in {frame.name}"


def _stack() -> list[str]:
    return "".join(traceback.format_list(_user_frames())).splitlines()[-STACK_LINES:]


def describe(
    op: str, dtype: torch.dtype, reduction: str, count: int, root: int, counts: Sequence[int] | None, output_counts: Sequence[int] | None
) -> str:
    """Return what must be the same on every rank."""
    words = [f"{op} ({str(dtype).removeprefix('torch.')}"]
    if output_counts is None:
        words.append(f" x {count}" if counts is None else f" x {count} in pieces of {list(counts)}")
    if op in FOLDING:
        words.append(f", {reduction}")
    if root >= 0:
        words.append(f", root {root}")
    return "".join(words) + ")"
