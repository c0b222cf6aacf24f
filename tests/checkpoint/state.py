"""State for the tests of several ranks: a model whose tensors say where each element belongs, cut as a sharded optimizer cuts it."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from ringfold.runtime.checkpoint import Piece, TensorPart
from torch import Tensor, nn

SHAPES = {"embed": (7, 5), "up.weight": (5, 11), "up.bias": (11,), "scale": (), "empty": (0, 3)}


def full_tensor(name: str, offset: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the same values on every rank, all different."""
    base = 1000.0 * list(SHAPES).index(name)
    return (torch.arange(prod(SHAPES[name]), dtype=torch.float64) + base + offset).to(dtype).view(SHAPES[name])


def cuts(size: int) -> list[int]:
    """Return the bounds of `size` uneven pieces of all tensors laid in a row: one may be empty, others cross tensors."""
    total = sum(prod(shape) for shape in SHAPES.values())
    return [0, *(total * (rank * rank + rank) // (size * size + size) for rank in range(1, size)), total]


def pieces(rank: int, size: int) -> dict[str, tuple[int, int]]:
    """Return {name: (start, stop)} of what a rank has of the tensors in a row; names of which it has nothing are absent."""
    begin, end = cuts(size)[rank : rank + 2]
    found, at = {}, 0
    for name, shape in SHAPES.items():
        start, stop = max(begin - at, 0), min(end - at, prod(shape))
        if start < stop:
            found[name] = (start, stop)
        at += prod(shape)
    return found


def model_parts(rank: int, size: int) -> dict[str, Any]:
    """Return the model state in pieces; what has no elements is an ordinary tensor."""
    held = {name: (start, stop) for name, (start, stop) in pieces(rank, size).items()}
    parts: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        start, stop = held.get(name, (0, 0))
        parts[name] = TensorPart(full_tensor(name).reshape(-1)[start:stop].clone(), shape, start) if prod(shape) else full_tensor(name)
    return parts


def sharded_adam(rank: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[torch.optim.Optimizer, dict[str, Piece]]:
    """Return an optimizer over a rank's pieces, in two groups of which either may be empty, without state."""
    of_name = {}
    for name, (start, stop) in pieces(rank, size).items():
        of_name[name] = Piece(nn.Parameter(full_tensor(name, dtype=dtype).reshape(-1)[start:stop].clone()), start, SHAPES[name])
    decayed = [piece.parameter for name, piece in of_name.items() if len(SHAPES[name]) > 1]
    rest = [piece.parameter for name, piece in of_name.items() if len(SHAPES[name]) < 2]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}], lr=0.02), of_name


def whole_adam(dtype: torch.dtype = torch.float32) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:
    """Return the same optimizer over whole parameters."""
    of_name = {name: nn.Parameter(full_tensor(name, dtype=dtype)) for name in SHAPES if prod(SHAPES[name])}
    decayed = [parameter for name, parameter in of_name.items() if len(SHAPES[name]) > 1]
    rest = [parameter for name, parameter in of_name.items() if len(SHAPES[name]) < 2]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}], lr=0.02), of_name


def fill_moments(optimizer: torch.optim.Optimizer, named: Mapping[str, Any]) -> None:
    """Give every parameter, or piece, the state that belongs to its elements."""
    for name, value in named.items():
        piece = value if isinstance(value, Piece) else Piece(value, 0, tuple(value.shape))
        dtype = piece.parameter.dtype
        optimizer.state[piece.parameter] = {
            "step": torch.tensor(7.0),
            "exp_avg": moment(name, 0.25, piece, dtype),
            "exp_avg_sq": moment(name, 0.5, piece, dtype),
        }


def moment(name: str, offset: float, piece: Piece, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what a piece has of a moment."""
    return full_tensor(name, offset, dtype).reshape(-1)[piece.start : piece.stop].clone().view(piece.parameter.shape)


def assert_moments(optimizer: torch.optim.Optimizer, named: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Check that every parameter, or piece, has exactly the state of its elements, and the options of its group."""
    for name, value in named.items():
        piece = value if isinstance(value, Piece) else Piece(value, 0, tuple(value.shape))
        state = optimizer.state[piece.parameter]
        assert state["step"].shape == ()
        assert state["step"].item() == 7.0
        for key, offset in (("exp_avg", 0.25), ("exp_avg_sq", 0.5)):
            assert state[key].dtype == dtype, (name, key, state[key].dtype)
            assert torch.equal(state[key], moment(name, offset, piece, dtype)), (name, key)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)
