"""The fixture `hosts`: a few hosts for one test, or a skip that says what this machine lacks."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from tests.cluster.hosts import Hosts, missing_feature

_missing = functools.cache(missing_feature)


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """Two hosts on one network, or as many hosts and networks as the test asks for: @pytest.mark.parametrize("hosts", [(3, 1)], indirect=True)."""
    reason = _missing()
    if reason is not None:
        pytest.skip(reason)
    with Hosts(*getattr(request, "param", (2, 1))) as made:
        yield made
