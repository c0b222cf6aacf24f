"""Vectors of more than 2^31 elements and bytes: no length is kept in 32 bits on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness import run_ranks

COUNT = 2**31 + 4099
# Where a length cut to 32 bits would begin or end.
PLACES = (0, 2**31 - 1, 2**31, COUNT - 1)


def check_large(world: Any) -> None:
    tensor = torch.full((COUNT,), 3 + world.rank, dtype=torch.uint8)
    for place in PLACES:
        tensor[place] = 100 + world.rank
    world.all_reduce(tensor)
    assert [int(tensor[place]) for place in PLACES] == [201] * len(PLACES)
    assert int(torch.count_nonzero(tensor[1 :: 2**16] == 7)) == -(-(COUNT - 1) // 2**16)
    tensor[2**31] = 50 + world.rank
    world.broadcast(tensor, 1)
    assert int(tensor[2**31]) == 51
    if world.rank == 0:
        world.send(tensor, 1)
    else:
        tensor.zero_()
        world.recv(tensor, 0)
        assert [int(tensor[place]) for place in PLACES] == [201, 201, 51, 201]
        assert int(torch.count_nonzero(tensor[1 :: 2**16] == 7)) == -(-(COUNT - 1) // 2**16)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_more_than_two_to_the_31_elements(transport: str) -> None:
    run_ranks(2, check_large, transport=transport, timeout_s=300)
