"""From a user's tensor to what is communicated: flat, contiguous, in host memory (or on the GPU, if it stays there), of a dtype that the core knows.

What is that already goes as it is. A tensor with gaps is copied into registered memory, and a result back out of it. Complex numbers go as pairs.
A dtype that the core does not compute with goes as bytes, where nothing is folded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ringfold.collectives import registered
from ringfold.collectives.codes import DTYPES as DTYPE_CODES
from ringfold.collectives.codes import REDUCTIONS
from ringfold.collectives.errors import ConfigError, nearest

__all__ = ["DTYPES", "Operand", "prepare", "reduction_code", "require_arithmetic", "rescale"]

DTYPES = {getattr(torch, name): code for name, code in DTYPE_CODES.items()}
CPU = torch.device("cpu")
BITWISE = frozenset({"band", "bor", "bxor"})
OF_PAIRS = frozenset({"sum", "avg"})  # a complex sum is the sum of its parts; a product is not their product


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor as it is communicated; `factor` is the number of its elements for each of the user's tensor, `original` where a result belongs."""

    flat: torch.Tensor
    factor: int
    original: torch.Tensor | None

    def give_back(self) -> None:
        """Copy a result to where the user expects it."""
        if self.original is not None:
            flat = torch.view_as_complex(self.flat.view(-1, 2)) if self.original.is_complex() else self.flat.view(self.original.dtype)
            self.original.copy_(flat.view(self.original.shape))


def prepare(
    tensor: torch.Tensor, where: str, reduction: str | None, reads: bool = True, writes: bool = True, stays: torch.device | None = None
) -> Operand:
    """Return the operand of a tensor; `reads`: its values are needed, `writes`: it gets the result. `reduction` is None where nothing is folded.

    stays: the device whose tensors are communicated where they are; those of others are copied to host memory and back.

    Raises: ConfigError, listing everything about the tensor that cannot work.
    """
    problems = []
    if tensor.is_sparse or tensor.layout is not torch.strided:
        problems.append(f"its layout is {tensor.layout}, expected torch.strided: send indices and values")
    if not tensor.is_cpu and not tensor.is_cuda:
        problems.append(f"it is on {tensor.device}, expected cpu or cuda")
    if reduction is not None:
        problems.extend(_arithmetic_problems(tensor.dtype, reduction))
    if problems:
        raise ConfigError(f"{where} cannot take this tensor:\n  " + "\n  ".join(problems))
    packed = tensor.detach()
    if packed.is_complex():
        packed = torch.view_as_real(packed.resolve_conj())
    original = None
    place = tensor.device if tensor.device == stays else CPU
    if not packed.is_contiguous() or packed.is_neg() or tensor.is_conj() or tensor.device != place:
        packed = _packed(packed, reads, place)
        original = tensor.detach() if writes else None
    # One element is contiguous whatever its stride says, but has to say 1 to be looked at as bytes.
    flat = packed.view(-1).as_strided((packed.numel(),), (1,))
    if flat.dtype not in DTYPES:
        flat = flat.view(torch.uint8)
    return Operand(flat, _factor(tensor, flat), original)


def _packed(tensor: torch.Tensor, reads: bool, place: torch.device) -> torch.Tensor:
    """Return contiguous memory of the tensor's shape, registered where its dtype is the core's, with its values if they are needed."""
    is_known = tensor.dtype in DTYPES
    copy = registered.empty(tensor.shape, tensor.dtype, place) if is_known else torch.empty(tensor.shape, dtype=tensor.dtype, device=place)
    return copy.copy_(tensor) if reads else copy


def _factor(tensor: torch.Tensor, flat: torch.Tensor) -> int:
    return tensor.element_size() // flat.element_size()


def require_arithmetic(dtype: torch.dtype, reduction: str, where: str) -> None:
    """Raise ConfigError for a dtype that has no such reduction."""
    problems = _arithmetic_problems(dtype, reduction)
    if problems:
        raise ConfigError(f"{where} cannot take this tensor:\n  {problems[0]}")


def _arithmetic_problems(dtype: torch.dtype, reduction: str) -> list[str]:
    known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
    if dtype.is_complex:
        return [] if reduction in OF_PAIRS else [f"its dtype is {dtype}, of which only sum and avg exist, not {reduction}"]
    if dtype not in DTYPES:
        return [f"its dtype is {dtype}, expected one of {known}"]
    if reduction in BITWISE and dtype.is_floating_point:
        return [f"its dtype is {dtype}, and {reduction} is of the bits of integers"]
    if reduction == "avg" and dtype is torch.bool:
        return ["its dtype is torch.bool, which has no average"]
    return []


def reduction_code(op: str, reduction: str) -> int:
    """Return the core's number of a reduction.

    Raises: ConfigError for one that is unknown.
    """
    code = REDUCTIONS.get(reduction)
    if code is None:
        meant = nearest(reduction, REDUCTIONS)
        raise ConfigError(
            f"{op}: unknown op={reduction!r}; expected one of {', '.join(REDUCTIONS)}" + (f". Did you mean {meant!r}?" if meant else "")
        )
    return code


def rescale(tensor: torch.Tensor, scale: float, where: str) -> torch.Tensor:
    """Return a copy of the tensor times `scale`, in its dtype.

    Raises: ConfigError for a fraction of integers.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()) and scale != int(scale):
        raise ConfigError(f"{where} cannot take this tensor:\n  its dtype is {tensor.dtype}, which has no multiple by scale={scale}")
    return torch.mul(tensor, scale).to(tensor.dtype)
