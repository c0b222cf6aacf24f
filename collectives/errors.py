"""Every error ringfold raises, in one tree, at the bottom of the layers so that each of them can raise it.

    RingfoldError
      ConfigError         LayoutError, PrecisionError
      CommunicationError  ConnectError, AuthenticationError, PeerLost, CollectiveTimeout, CollectiveMismatch
      CheckpointError     Incomplete, Corrupt, Incompatible
      LaunchError
      OutOfMemory

A message says what was seen, on which rank, in which operation, what was expected, and what to do next. `exit_code` is what a
command ends with: 2 when the input was wrong and nothing was started, 1 when something that ran has failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AuthenticationError",
    "CheckpointError",
    "CollectiveMismatch",
    "CollectiveTimeout",
    "CommunicationError",
    "ConfigError",
    "ConnectError",
    "Corrupt",
    "Incompatible",
    "Incomplete",
    "LaunchError",
    "LayoutError",
    "OutOfMemory",
    "PeerLost",
    "PrecisionError",
    "RingfoldError",
    "nearest",
]


class RingfoldError(Exception):
    """Base of every error that ringfold raises on purpose."""

    exit_code = 1


class ConfigError(RingfoldError):
    """An option, a variable or an argument that cannot work; nothing has been started."""

    exit_code = 2


class LayoutError(ConfigError):
    """A layout text that does not parse, or a layout that does not fit the world or the model."""


class PrecisionError(ConfigError):
    """A precision that is unknown, or that this device or operation does not have."""


class CommunicationError(RingfoldError):
    """Ranks could not talk to each other, or did not agree on what they were saying; `peer` is the world rank at fault, or -1."""

    peer: int = -1


class ConnectError(CommunicationError):
    """A connection was not made before its deadline, or some ranks never arrived."""


class AuthenticationError(CommunicationError):
    """The other side does not hold this job's secret."""


class PeerLost(CommunicationError):
    """A rank that an operation needs has ended."""


class CollectiveTimeout(CommunicationError):
    """An operation did not finish before its deadline."""


class CollectiveMismatch(CommunicationError):
    """Ranks of one communicator issued different operations at the same place in their order."""


class CheckpointError(RingfoldError):
    """A checkpoint cannot be written or loaded; the previous one is untouched."""

    exit_code = 2


class Incomplete(CheckpointError):
    """The checkpoint was never committed, or files of it are missing."""


class Corrupt(CheckpointError):
    """A file of the checkpoint does not hold the bytes that were written."""


class Incompatible(CheckpointError):
    """The checkpoint is whole, but belongs to another model or to another version of the format."""


class LaunchError(RingfoldError):
    """A worker process could not be started."""

    exit_code = 2


class OutOfMemory(RingfoldError):
    """Memory for a train step could not be had; the message says what has it, and which layouts need less."""


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that `word` most likely meant, for "did you mean", or None if none is close."""
    by_folded = {choice.casefold(): choice for choice in choices}
    found = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.6)
    return by_folded[found[0]] if found else None


# Tracebacks name an error as the user imports it: `ringfold.PeerLost`.
for _name in __all__:
    if _name != nearest.__name__:
        globals()[_name].__module__ = "ringfold"
del _name
