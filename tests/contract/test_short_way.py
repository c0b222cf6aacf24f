"""An operation that is issued again in a form that was issued before runs no line of Python, and gives what the long way gives."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import pytest
import torch
from ringfold.collectives._native import core
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import CommunicationError, ConfigError
from ringfold.collectives.issue import SHORT
from torch import Tensor

from tests.harness import run_ranks

READERS = pytest.mark.parametrize("reader", ["torch.Tensor", "attributes"])


def use_reader(world: Any, reader: str) -> None:
    """Have tensors read by torch's C interface, or by the attributes that an older torch has."""
    if reader == "attributes":
        shortcut = core.shortcut(world._handle, world.session.sites.row_of, object)  # has no such interface
        world._shortcut = shortcut
        for name in SHORT:
            world.__dict__[name] = core.method(shortcut, name, weakref.ref(world), getattr(Communicator, name))
    else:
        assert hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), "the pinned torch has the interface"


def python_calls(call: Any) -> list[str]:
    called: list[str] = []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            called.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return called[1:]  # `call` itself


def check_silence(world: Any, reader: str) -> None:
    use_reader(world, reader)
    size, rank = world.size, world.rank
    one, whole, piece = torch.ones(7), torch.arange(4.0 * size), torch.zeros(4)
    calls = {
        "all_reduce": lambda: world.all_reduce(one),
        "all_reduce of a kind": lambda: world.all_reduce(one, op="max", algorithm="ring", async_op=False),
        "broadcast": lambda: world.broadcast(one, size - 1),
        "reduce": lambda: world.reduce(one, dst=1),
        "reduce_scatter": lambda: world.reduce_scatter(piece, whole, "avg"),
        "all_gather": lambda: world.all_gather(whole, piece),
        "all_to_all": lambda: world.all_to_all(torch.zeros_like(whole), whole),
    }
    for name, call in calls.items():
        first, again = python_calls(call), python_calls(call)
        assert any("_issue" in each for each in first), (name, first)
        assert not any("ringfold" in each or "_issue" in each or name.split()[0] in each for each in again), (name, again)
    tensor = torch.full((7,), rank + 1.0)
    world.all_reduce(tensor)
    assert torch.equal(tensor, torch.full((7,), size * (size + 1) / 2))


@READERS
def test_the_second_operation_of_a_form_runs_no_python(reader: str) -> None:
    run_ranks(2, check_silence, reader)


class Named(Tensor):
    """A subclass, as users make them."""


def tensors(rank: int) -> dict[str, Tensor]:
    value = rank + 1.0
    gaps = torch.full((6, 2), value)[:, 0]
    negative = torch.complex(torch.zeros(1), torch.full((1,), -value)).conj().imag  # one element, and a bit that says it is negated
    assert negative.is_neg()
    return {
        "plain": torch.full((5,), value),
        "scalar": torch.tensor(value),
        "one": torch.full((1, 1), value),
        "empty": torch.zeros(0, 3),
        "gaps": gaps,
        "turned": torch.full((3, 4), value).t(),
        "turned column": torch.full((1, 4), value).t(),
        "channels last": torch.full((2, 3, 4, 5), value).to(memory_format=torch.channels_last),
        "negative": negative,
        "part": torch.full((9,), value)[2:7],
        "subclass": torch.full((5,), value).as_subclass(Named),
        "leaf": torch.full((5,), value, requires_grad=True),
        "parameter": torch.nn.Parameter(torch.full((5,), value)),
        "double": torch.full((5,), value, dtype=torch.float64),
        "half": torch.full((5,), value, dtype=torch.float16),
        "brain": torch.full((5,), value, dtype=torch.bfloat16),
        "long": torch.full((5,), rank + 1),
        "truth": torch.full((5,), True),
        "complex": torch.full((5,), value * 1j),
        "bytes": torch.full((5,), rank + 1, dtype=torch.uint8),
        "short": torch.full((5,), rank + 1, dtype=torch.int16),
    }


def check_tensors(world: Any, reader: str) -> None:
    use_reader(world, reader)
    total = world.size * (world.size + 1) // 2
    for turn in range(3):
        for name, tensor in tensors(world.rank).items():
            expected = (
                tensor.detach().clone().fill_(1) if name == "truth" else tensor.detach().clone().fill_(total * (1j if name == "complex" else 1))
            )
            world.all_reduce(tensor, "".join(["s", "um"]) if turn == 1 else "sum")
            assert torch.equal(tensor.detach(), expected), (turn, name, tensor)


@READERS
def test_every_kind_of_tensor_takes_the_way_that_it_needs_each_time(reader: str) -> None:
    run_ranks(2, check_tensors, reader)


def check_arguments(world: Any) -> None:
    tensor, whole = torch.ones(3), torch.ones(3 * world.size)
    for _ in range(3):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            world.all_reduce(tensor, src=0)
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            world.broadcast(tensor, 0, op="sum")
        with pytest.raises(TypeError, match="multiple values"):
            world.all_reduce(tensor, "sum", op="sum")
        with pytest.raises(TypeError):
            world.all_reduce()
        with pytest.raises(TypeError):
            world.all_reduce(tensor, "sum", None)
        with pytest.raises(ConfigError, match="Did you mean"):
            world.all_reduce(tensor, "summ")
        with pytest.raises(ConfigError, match="not among"):
            world.broadcast(tensor, world.size)
        with pytest.raises(ConfigError, match="not among"):
            world.broadcast(tensor, -1)
        with pytest.raises(ConfigError, match="expected"):
            world.all_gather(whole, torch.ones(4))
        with pytest.raises(ConfigError, match="expected"):
            world.reduce_scatter(torch.ones(2), whole)
        world.broadcast(tensor, 0)
        world.all_reduce(tensor)
        world.all_gather(whole, tensor)
        world.reduce_scatter(tensor, whole)
        work = world.all_reduce(tensor, async_op=True)
        work.wait()
        world.all_reduce([tensor, whole])
        world.all_reduce(tensor, scale=0.5)
        tensor.fill_(1.0)
        whole.fill_(1.0)
    world.barrier()
    everyone = world.subgroup(range(world.size), "closed")
    everyone.all_reduce(tensor)
    everyone.all_reduce(tensor)
    method = everyone.all_reduce
    everyone.close()
    for issue in (everyone.all_reduce, method):
        with pytest.raises(CommunicationError, match="closed"):
            issue(tensor)
    del everyone, issue
    with pytest.raises(ReferenceError, match="gone"):
        method(tensor)


def test_wrong_arguments_are_refused_however_often_right_ones_came_before() -> None:
    run_ranks(2, check_arguments)
