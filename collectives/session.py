"""One rank's live place in a job: its membership, its shared page and its native context.

A Session is made by `Session.join` and ended by `close`; Communicators are made on it. Children forked by the user's code (DataLoader workers) give
up their copies of its descriptors at once: a peer learns of this process's death by an end of file, which a child that holds it would delay.
"""

from __future__ import annotations

import os
import socket
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from ringfold.collectives import flight_recorder, rendezvous
from ringfold.collectives._native import check, core, pool
from ringfold.collectives.call_site import CallSites
from ringfold.collectives.cost import SHM, TCP, Link
from ringfold.collectives.environment import Job
from ringfold.collectives.errors import CommunicationError
from ringfold.collectives.page import Page, State

if TYPE_CHECKING:
    from ringfold.collectives.mpi_choice import Folds

__all__ = ["Session"]

# A wait spins this long for a peer that is about to answer; longer than any small collective, shorter than a time slice.
SPIN_S = 200e-6

_alive: weakref.WeakSet[Session] = weakref.WeakSet()


class Session:
    """A joined job as one rank sees it; `near[rank]` tells whether that rank shares this host's memory."""

    def __init__(self, membership: rendezvous.Membership, page: Page) -> None:
        self.membership = membership
        self.page = page
        self.job = membership.job
        self.rank = membership.rank
        self.world_size = membership.world_size
        self.communicators_made: dict[tuple[str, tuple[int, ...]], int] = {}
        self.links: tuple[Link, Link] = (SHM, TCP)  # inside a host and between hosts; of a job on several hosts as measured
        self.folds: Folds | None = None  # of a job over MPI as measured
        self.communicator_names: dict[int, str] = {}  # by the number that the core and the page know them by
        self._has_recorded = False
        self.near = [rank in membership.links and membership.links[rank].family == socket.AF_UNIX for rank in range(self.world_size)]
        local = 1 + sum(self.near)
        self.has_core_each = len(os.sched_getaffinity(0)) >= local
        spin_s = SPIN_S if self.has_core_each else 0.0
        self.context = core.context(pool, self.rank, self.world_size, membership.describe(self.rank), os.dup(page.fd), spin_s)
        for peer, link in membership.links.items():
            core.add_peer(self.context, peer, link.detach(), self.near[peer], membership.describe(peer))
        check(core.start(self.context, self.job.timeout_s))
        self.sites = CallSites(page)
        page.set_state(State.RUNNING)
        self.closed = False
        _alive.add(self)

    @classmethod
    def join(cls, job: Job) -> Session:
        """Find the other ranks of `job` and connect to each of them.

        Raises:
            ConnectError: somebody did not come before the job's timeout; names them.
            AuthenticationError: somebody holds another secret.
        """
        page = Page.attach(os.dup(job.page_fd)) if job.page_fd is not None else Page.create(job.rank)
        try:
            membership = rendezvous.join(job)
        except BaseException:
            page.close()
            raise
        return cls(membership, page)

    @property
    def seconds_waited(self) -> float:
        """Seconds that this process has spent blocked in operations, of all communicators."""
        seconds: float = core.waited_seconds_in_all(self.context)
        return seconds

    def record_flight(self, error: CommunicationError) -> Path | None:
        """Write down the last operations of this rank, and of the rank at fault if its page is at hand, at the first error only; return where."""
        if self._has_recorded or self.closed:
            return None
        self._has_recorded = True
        folder, why = flight_recorder.directory(self.job.job_id), str(error)
        pages = {peer: Page.attach(fd) for peer, fd in core.peer_pages(self.context).items()}
        try:
            flight_recorder.write(self.page, folder, why, self.communicator_names)
            if error.peer in pages:
                flight_recorder.write(pages[error.peer], folder, why, self.communicator_names)
        except OSError:  # a full disk must not hide the error
            return None
        finally:
            for page in pages.values():
                page.close()
        return folder

    def close(self) -> None:
        """Say farewell to the peers (unless this rank has failed) and end every thread, socket and mapping; may be called again."""
        if self.closed:
            return
        self.closed = True
        _alive.discard(self)
        has_failed = self.page.read().state is State.FAILED
        core.close_context(self.context, not has_failed)
        if not has_failed:
            self.page.set_state(State.FINISHED)
        self.membership.close()
        self.page.close()

    def _forget_in_child(self) -> None:
        self.closed = True
        core.forked(self.context)
        self.membership.close_descriptors()


def _forget_all_in_child() -> None:
    for session in list(_alive):
        session._forget_in_child()
    _alive.clear()


os.register_at_fork(after_in_child=_forget_all_in_child)
