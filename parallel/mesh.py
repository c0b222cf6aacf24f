"""DeviceMesh: the ranks as a named grid, and a Communicator for each of its axes.

    pp2 dp2 cp1 tp2:   rank  0 1 2 3 4 5 6 7
                       tp    0 1 0 1 0 1 0 1     fastest: neighbours, which talk most, are nearest
                       dp    0 0 1 1 0 0 1 1
                       pp    0 0 0 0 1 1 1 1     slowest

`mesh["dp"]` joins the ranks that differ from this one in dp alone, `mesh["dp", "cp"]` those that differ in dp, in cp, or in both.
The mesh does not own the world communicator, and it does not ask whether the strategies of the layout are built.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.environment import DEVICE, Device, Job
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.layout import AXES, Layout


def choose_device(wanted: Device, local_rank: int) -> torch.device:
    """Return where a rank keeps its model: a GPU if there is one, those of a host in turn, unless the CPU is wanted.

    Raises: ConfigError, if a GPU is wanted and there is none.
    """
    if wanted == "cpu" or not torch.cuda.is_available():
        if wanted == "cuda":
            raise ConfigError(f"{DEVICE}=cuda: torch {torch.__version__} finds no CUDA device. `ringfold doctor` says what is there.")
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


class DeviceMesh:
    """The grid of `layout` over the ranks of `world`, seen from this rank.

    Communicators are made when they are first asked for, together with the other members: all of them ask, and where a rank asks
    for several, all ask in the same order. Axes of size 1 do not count: with cp1, `mesh["dp", "cp"]` is `mesh["dp"]`.

    Raises:
        LayoutError: the layout does not fit the world.
    """

    def __init__(self, layout: Layout, world: Communicator, *, local_rank: int | None = None) -> None:
        self.layout = layout.resolve(world.size)
        self.world = world
        self.rank = world.rank
        self.size = world.size
        self.local_rank = Job.from_environment().local_rank if local_rank is None else local_rank
        self.device = choose_device(world.session.job.device, self.local_rank)
        if self.device.type == "cuda":
            world.use_device(self.device)
        self.coordinate = self.layout.coordinate(world.rank)
        self._communicators: dict[tuple[str, ...], Communicator] = {}
        self._closed = False

    def __getitem__(self, axes: str | tuple[str, ...]) -> Communicator:
        wanted = self._in_grid_order(axes)
        if self._closed:
            raise ConfigError(f'mesh["{", ".join(wanted)}"] was asked for on rank {self.rank} after the mesh was closed')
        sizes = self.layout.sizes
        key = tuple(axis for axis in wanted if sizes[axis] > 1) or wanted[:1]
        if key not in self._communicators:
            self._communicators[key] = self.world.subgroup(self.ranks(key), "+".join(key))
        return self._communicators[key]

    @property
    def seconds_waited(self) -> float:
        """Seconds that this process has spent blocked in operations of all communicators of its world."""
        return self.world.session.seconds_waited

    def ranks(self, axes: str | tuple[str, ...]) -> Sequence[int]:
        """Return the world ranks, this one among them, that differ from this one in `axes` only, in grid order."""
        wanted = self._in_grid_order(axes)
        sizes = self.layout.sizes
        places = product(*(range(sizes[axis]) for axis in wanted))
        return [self.layout.rank_at({**self.coordinate, **dict(zip(wanted, place, strict=True))}) for place in places]

    def close(self) -> None:
        """Close the communicators that this mesh made, in the order in which it made them; the world stays open."""
        self._closed = True
        while self._communicators:
            self._communicators.pop(next(iter(self._communicators))).close()

    def __repr__(self) -> str:
        place = ".".join(f"{axis}{self.coordinate[axis]}" for axis, size in self.layout.sizes.items() if size > 1) or "alone"
        return f'DeviceMesh("{self.layout}", rank {self.rank} of {self.size}: {place})'

    def _in_grid_order(self, axes: str | tuple[str, ...]) -> tuple[str, ...]:
        wanted = (axes,) if isinstance(axes, str) else tuple(axes)
        for axis in wanted:
            if axis not in AXES:
                raise ConfigError(f'"{axis}" is not an axis of the mesh "{self.layout}": the axes are {", ".join(AXES)}')
        if not wanted or len(set(wanted)) < len(wanted):
            raise ConfigError(f"mesh{list(wanted)}: name one axis or several different ones, out of {', '.join(AXES)}")
        return tuple(axis for axis in AXES if axis in wanted)
