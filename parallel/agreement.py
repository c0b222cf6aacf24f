"""Agreement: ranks compare what they are about to share before they share it.

Buckets and broadcasts are matched by position, so two ranks with different models would add one tensor to another without a word.
A digest is compared first; the descriptions themselves travel only when it differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError

_SHOWN = 20  # differences in one message


def require_agreement(what: str, description: Mapping[str, str], comm: Communicator) -> None:
    """Compare an ordered mapping of names to descriptions on all ranks of `comm`; a collective call.

    Raises:
        ConfigError: on every rank, with what differs from rank 0.
    """
    if comm.size == 1:
        return
    digest = hashlib.sha256(repr(list(description.items())).encode()).hexdigest()
    if len(set(comm.all_gather_object(digest))) == 1:
        return
    descriptions: list[dict[str, str]] = comm.all_gather_object(dict(description))
    differences = []
    for rank, theirs in enumerate(descriptions):
        differences += [f"rank {rank}: {line}" for line in _differences(descriptions[0], theirs)]
    shown = differences[:_SHOWN] + ([f"... and {len(differences) - _SHOWN} more"] if len(differences) > _SHOWN else [])
    raise ConfigError(
        "\n  ".join(
            [
                f"{what} must be the same on all {comm.size} ranks of {comm.name}, and they are not:",
                *shown,
                "build the same model on every rank, and freeze the same parameters, before it is made parallel",
            ]
        )
    )


def _differences(expected: Mapping[str, str], seen: Mapping[str, str]) -> list[str]:
    lines = [f"{name} is missing (rank 0 has {value})" for name, value in expected.items() if name not in seen]
    lines += [f"{name} is {value}, and rank 0 does not have it" for name, value in seen.items() if name not in expected]
    both = [name for name in expected if name in seen]
    lines += [f"{name} is {seen[name]}, on rank 0 {expected[name]}" for name in both if seen[name] != expected[name]]
    if not lines and list(expected) != list(seen):
        first = next(pair for pair in zip(expected, seen, strict=True) if pair[0] != pair[1])
        lines.append(f"the order differs: {first[1]} stands where rank 0 has {first[0]}")
    return lines
