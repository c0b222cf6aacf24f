"""The one door to the C++ core: the process's pool of registered memory, and failures as exceptions.

The core answers None, or (code, world rank at fault, text); `check` raises what the code stands for. Argument lists are in csrc/python/bindings.cpp.
"""

from __future__ import annotations

from typing import Any

from ringfold import _core
from ringfold.collectives.errors import CollectiveMismatch, CollectiveTimeout, CommunicationError, PeerLost

__all__ = ["Outcome", "check", "core", "failure", "pool"]

core: Any = _core

Outcome = tuple[int, int, str]

_ERRORS: dict[int, type[CommunicationError]] = {
    1: PeerLost,
    2: CollectiveTimeout,
    3: CollectiveMismatch,
    4: CommunicationError,
    5: CommunicationError,
}

# Registered memory outlives any one generation: gradient buckets stay where they are when the job is joined again.
pool: object = core.pool()


def check(outcome: Outcome | None) -> None:
    """Raise the exception of a failed operation.

    Raises:
        CommunicationError: PeerLost, CollectiveTimeout, CollectiveMismatch or, for a closed communicator, the class itself.
    """
    if outcome is not None:
        raise failure(outcome)


def failure(outcome: Outcome) -> CommunicationError:
    """Return the exception that an outcome stands for; its `peer` is the world rank at fault, or -1."""
    code, peer, text = outcome
    error = _ERRORS[code](text)
    error.peer = peer
    return error
