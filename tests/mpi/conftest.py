"""The MPI libraries of this machine, as a fixture."""

from __future__ import annotations

import pytest

from tests.mpi.launching import Mpi, find


@pytest.fixture
def mpi(request: pytest.FixtureRequest) -> Mpi:
    """The library that the test's mark names: Open MPI 5, MPICH, or Open MPI 4."""
    found = find(request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found
