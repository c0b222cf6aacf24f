"""The step of an offloaded optimizer beside backward: the bits of the step after it, and never half a step, or new weights in backward, unnoticed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.zero.shard_file import ShardFile
from ringfold.runtime.engine import Engine
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.parallel.test_engine import make_engine, mine
from tests.parallel.test_offload import on_a_device

WIDTH, STEPS = 24, 3
HIDDEN = [40, 7, 33, 64, 1, 29]  # of each block: no two buckets are as long
DEADLINE_S = 60.0  # for what is sure to come
AHEAD = "ringfold-step"  # what the thread's name begins with


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor, detached: bool = False) -> Tensor:
        if detached:
            return x + F.linear(torch.tanh(F.linear(x, self.up.weight.detach())), self.down.weight.detach())
        return x + self.down(torch.tanh(self.up(x)))


class Deep(nn.Module):
    """Calls `in_backward` when backward has reached the first of its blocks; one parameter may be left out, and one always is."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(map(Block, HIDDEN))
        self.sometimes = nn.Parameter(torch.ones(WIDTH))
        self.never = nn.Parameter(torch.ones(WIDTH))
        self.in_backward: Callable[[], Any] = lambda: None
        self.uses_all = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 0 and x.requires_grad:
                x.register_hook(lambda _: self.in_backward() and None)
        return x * self.sometimes if self.uses_all else x


class Watched(torch.optim.AdamW):
    """Notes in which threads it steps."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.01, weight_decay=0.1)
        self.threads: list[str] = []
        self.has_stepped = threading.Event()

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        self.threads.append(threading.current_thread().name)
        self.has_stepped.set()


def make(world: Communicator, layout: str, model: Callable[[], nn.Module] = Deep, **options: Any) -> Engine:
    engine = make_engine(world, layout, model, optimizer=Watched, bucket_mb=0.008, **{"loss": F.mse_loss, **options})
    watched(engine)[0].threads.clear()  # it was tried whether it is elementwise
    return engine


def batch(world: Communicator, step: int, rows: int = 5) -> Any:
    x, y = torch.randn(2, rows, WIDTH, generator=torch.Generator().manual_seed(step))
    return mine((x, y), world.rank, world.size)


def whole(engine: Engine) -> dict[str, Tensor]:
    with engine.whole_parameters():
        return {name: value.clone() for name, value in engine.module.state_dict().items()}


def gradients(engine: Engine) -> dict[str, Tensor | None]:
    return {name: engine.grad(name) for name, _ in engine.module.named_parameters()}


def watched(engine: Engine) -> tuple[Watched, Deep]:
    assert isinstance(engine.optimizer, Watched)
    assert isinstance(engine.module, Deep)
    return engine.optimizer, engine.module


def threads_of_steps() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(AHEAD)]


def train(world: Communicator, layout: str, clip_norm: float | None, is_on_a_device: bool) -> tuple[Any, list[float], list[str], bool]:
    """Return numbers, norms, in which threads the optimizer has stepped, and whether it had whenever backward had reached the first block."""
    with on_a_device(is_on_a_device):
        engine = make(world, layout, clip_norm=clip_norm)
    optimizer, module = watched(engine)
    module.uses_all = world.rank == 0
    stepped: list[bool] = []
    deadline = DEADLINE_S if "zero3:" in layout and clip_norm is None else 0.0
    module.in_backward = lambda: stepped.append(optimizer.has_stepped.wait(deadline))
    found: list[Any] = []
    norms = []
    for step in range(STEPS):
        optimizer.has_stepped.clear()
        found += [engine.train_step(batch(world, step)), gradients(engine)]
        norms.append(engine.grad_norm)
    found.append(whole(engine))
    assert len(stepped) == STEPS
    engine.close()
    assert not threads_of_steps()
    return found, norms, optimizer.threads, all(stepped)


def assert_same_bits(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize(("place", "is_on_a_device"), [("nvme", False), ("nvme", True), ("cpu", True)])
@pytest.mark.parametrize("precision", ["", "bf16"])
@pytest.mark.parametrize("size", [1, 2])
def test_beside_backward_has_the_bits_of_after_it(size: int, precision: str, place: str, is_on_a_device: bool, tmp_path: Path) -> None:
    offloaded = f"{precision} zero3:{'cpu' if place == 'cpu' else f'nvme={tmp_path}'}"
    expected = run_ranks(size, train, f"{precision} zero3", None, False)[0][0]  # norms are added up in another order where ranges differ
    for after, beside in zip(
        run_ranks(size, train, offloaded, 1e9, is_on_a_device),  # which clips nothing
        run_ranks(size, train, offloaded, None, is_on_a_device),
        strict=True,
    ):
        for numbers, norms, threads, had_stepped in (after, beside):
            assert_same_bits(numbers, expected)
            assert norms == after[1]
            assert had_stepped == (numbers is beside[0])
            assert {name.startswith(AHEAD) for name in threads} == {numbers is beside[0]}


def pair(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return F.mse_loss(output, target, reduction="sum"), torch.tensor(target.numel())


def steps_beside(world: Communicator, layout: str, options: dict[str, Any]) -> set[bool]:
    engine = make(world, layout, **options)
    for step in range(2):
        engine.train_step(batch(world, step))
    return {name.startswith(AHEAD) for name in watched(engine)[0].threads}


@pytest.mark.parametrize(
    ("layout", "size", "options", "beside"),
    [
        ("zero3:nvme=DIR", 1, {"loss": pair}, True),  # its own count is known after the only forward
        ("zero3:nvme=DIR", 2, {"loss": pair}, False),  # and that of all ranks is not
        ("zero3:nvme=DIR micro2", 1, {}, False),
        ("zero3:nvme=DIR exact2", 2, {}, False),
        ("fp16 zero3:nvme=DIR", 1, {}, False),
        ("zero2:nvme=DIR", 1, {}, False),
        ("zero3:cpu", 1, {}, False),  # on a CPU it is no other place
        ("bf16 zero3", 1, {}, False),
    ],
)
def test_a_step_that_has_to_know_all_gradients_first_or_whose_uses_are_not_seen_comes_after(
    layout: str, size: int, options: dict[str, Any], beside: bool, tmp_path: Path
) -> None:
    for found in run_ranks(size, steps_beside, layout.replace("DIR", str(tmp_path)), options):
        assert found == {beside}


class Failed(Exception):
    pass


def fail(world: Communicator, folder: str, slow: int | None) -> Any:
    """Fail in backward when a part has been stepped on, but not on the rank `slow`; resume, and train on."""
    engine = make(world, f"zero3:nvme={folder}")
    optimizer, module = watched(engine)
    engine.train_step(batch(world, 0))
    saved = engine.save(Path(folder) / "saved")
    optimizer.has_stepped.clear()
    assert engine._sharding is not None
    on_sum = engine._sharding.gradients.on_sum
    if world.rank == slow:
        engine._sharding.gradients.on_sum = None

    def raises() -> None:
        assert optimizer.has_stepped.wait(0.0 if world.rank == slow else DEADLINE_S) == (world.rank != slow)
        raise Failed

    module.in_backward = raises
    with pytest.raises(Failed):
        engine.train_step(batch(world, 1))
    module.in_backward, engine._sharding.gradients.on_sum = lambda: None, on_sum
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"had changed a part of the parameters. Resume from a checkpoint"):
            engine.train_step(batch(world, 1))
    for use in (lambda: engine.evaluate([batch(world, 1)]), engine.state_dict):
        with pytest.raises(ConfigError, match="had changed a part"):
            use()
    with pytest.raises(ConfigError, match="had changed a part"):
        engine.save(Path(folder) / "half")
    assert engine.resume(saved) == 1
    result = engine.train_step(batch(world, 1)), gradients(engine), whole(engine)
    engine.close()
    assert not threads_of_steps()
    return result


def two_steps(world: Communicator) -> Any:
    engine = make(world, "zero3")
    engine.train_step(batch(world, 0))
    return engine.train_step(batch(world, 1)), gradients(engine), whole(engine)


@pytest.mark.parametrize(("size", "slow"), [(1, None), (2, None), (2, 1)])
def test_half_a_step_is_refused_on_every_rank_until_a_checkpoint_is_loaded(size: int, slow: int | None, tmp_path: Path) -> None:
    expected = run_ranks(size, two_steps)[0]
    for found in run_ranks(size, fail, str(tmp_path), slow):
        assert_same_bits(found, expected)


def fail_early(world: Communicator, folder: str) -> Any:
    """Fail when the last block is all that backward has passed."""
    engine = make(world, f"zero3:nvme={folder}")
    engine.train_step(batch(world, 0))

    def raises(*_: Any) -> None:
        raise Failed

    hook = watched(engine)[1].blocks[-1].register_forward_hook(lambda _, __, output: output.register_hook(raises) and None)
    with pytest.raises(Failed):
        engine.train_step(batch(world, 1))
    hook.remove()
    return engine.train_step(batch(world, 1)), gradients(engine), whole(engine)


@pytest.mark.parametrize("size", [1, 2])
def test_after_a_failure_that_has_changed_nothing_training_goes_on(size: int, tmp_path: Path) -> None:
    expected = run_ranks(size, two_steps)[0]
    for found in run_ranks(size, fail_early, str(tmp_path)):
        assert_same_bits(found, expected)


def fail_to_write(world: Communicator, folder: str) -> None:
    engine = make(world, f"zero3:nvme={folder}")
    engine.train_step(batch(world, 0))
    store = ShardFile.store
    ShardFile.store = lambda *_: (_ for _ in ()).throw(OSError("the disk is gone"))  # type: ignore[method-assign]
    try:
        with pytest.raises(OSError, match="the disk is gone"):
            engine.train_step(batch(world, 1))
    finally:
        ShardFile.store = store  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="had changed a part"):
        engine.train_step(batch(world, 1))
    engine.close()
    assert not threads_of_steps()


def test_what_the_thread_meets_is_raised_by_the_step(tmp_path: Path) -> None:
    run_ranks(1, fail_to_write, str(tmp_path))


class UsedTwice(Deep):
    """Uses its last block first, without a gradient: in backward that comes last, when its own gradient is complete."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.blocks[-1](x, detached=True)
        for block in self.blocks:
            x = block(x)
        return x * self.sometimes


def use_twice(world: Communicator, layout: str, clip_norm: float | None) -> dict[str, Tensor]:
    engine = make(world, layout, UsedTwice, clip_norm=clip_norm)
    try:
        engine.train_step(batch(world, 0))
        return whole(engine)
    finally:
        engine.close()


@pytest.mark.parametrize("size", [1, 2])
def test_a_use_of_weights_that_may_have_changed_is_refused(size: int, tmp_path: Path) -> None:
    expected = run_ranks(size, use_twice, "zero3", None)[0]
    assert_same_bits(run_ranks(size, use_twice, f"zero3:nvme={tmp_path}", 1e9)[0], expected)
    with pytest.raises(Exception, match=r"blocks\.5 is used in backward after the gradients of all its parameters were complete \(.*blocks\.5\.up"):
        run_ranks(size, use_twice, f"zero3:nvme={tmp_path}", None)
