"""What is right: single-process references, bit equality, and bounds for a sum of floats in an unknown order.

The bounds, with u the unit roundoff (half the distance from 1 to the next number) and gamma(k) = k u / (1 - k u):

* A sum of n values takes n - 1 additions in any order; no value passes through more than n - 1 of them, each a factor (1 + d), |d| <= u:
  |computed - exact| <= gamma(n - 1) * sum |x|   (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2).
* avg is a sum and one division: gamma(n) * sum |x| / n.
* prod is n - 1 multiplications: gamma(n - 1) * |exact|, as long as nothing underflows.
* f16 and bf16 are added in f32 and rounded to 16 bits at latest when sent, so one step rounds twice: u = u16 + u32 + u16 * u32.
* Addition never underflows inexactly; a division or product may, by at most half the smallest subnormal.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64, torch.uint8, torch.int8, torch.int16)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BITWISE = {"band": torch.bitwise_and, "bor": torch.bitwise_or, "bxor": torch.bitwise_xor}
U32 = torch.finfo(torch.float32).eps / 2


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the relative error of one operation on two values of `dtype`."""
    u = torch.finfo(dtype).eps / 2
    return u + U32 + u * U32 if dtype in (torch.float16, torch.bfloat16) else u


def gamma(k: int, u: float) -> float:
    return k * u / (1 - k * u)


def reference(op: str, inputs: Tensor) -> Tensor:
    """Fold `inputs` [ranks, count] over ranks in the widest type: float64, or int64 whose low bits are every narrower type's result.

    avg of integers is the sum, in the integers' own type, divided and truncated towards zero.
    """
    if inputs.dtype is torch.bool:
        counted = inputs.sum(0)
        return {"sum": counted > 0, "max": counted > 0, "bor": counted > 0, "bxor": counted % 2 == 1}.get(op, counted == inputs.shape[0])
    if op in BITWISE:
        return functools.reduce(BITWISE[op], inputs)
    wide = inputs.to(torch.int64 if inputs.dtype in INTEGERS else torch.float64)
    if op == "sum":
        return wide.sum(0)
    if op == "prod":
        return wide.prod(0)
    if op == "min":
        return wide.amin(0)
    if op == "max":
        return wide.amax(0)
    if inputs.dtype in INTEGERS:
        return torch.div(wide.sum(0).to(inputs.dtype).to(torch.int64), inputs.shape[0], rounding_mode="trunc")
    return wide.mean(0)


def fold_bound(op: str, inputs: Tensor) -> Tensor:
    """Return the greatest |computed - reference| that a right fold of `inputs` [ranks, count] can have, in float64."""
    n, dtype = inputs.shape[0], inputs.dtype
    if op in ("min", "max"):
        return torch.zeros(inputs.shape[1:], dtype=torch.float64, device=inputs.device)
    u, wide = unit_roundoff(dtype), inputs.to(torch.float64)
    # The reference itself rounds in float64, which matters where dtype is float64.
    u += torch.finfo(torch.float64).eps / 2
    if op == "sum":
        return gamma(n - 1, u) * wide.abs().sum(0)
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    if op == "avg":
        return gamma(n, u) * wide.abs().mean(0) + subnormal
    return gamma(n - 1, u) * wide.prod(0).abs() + n * subnormal


def assert_fold(actual: Tensor, expected: Tensor, bound: Tensor | None, case: str) -> None:
    """Check a reduction: integers exactly (modulo their width), floats within `bound` of the float64 reference."""
    actual = actual.cpu()
    # Written so that a nan is wrong.
    right = actual == expected.to(actual.dtype) if bound is None else (actual.to(torch.float64) - expected).abs() <= bound
    wrong = ~right
    if bool(wrong.any()):
        i = int(wrong.flatten().nonzero()[0])
        limit = "exact" if bound is None else f"within {bound.flatten()[i].item():.3g}"
        raise AssertionError(
            f"{case}: {int(wrong.sum())} of {wrong.numel()} elements wrong; first is element {i}: "
            f"{actual.flatten()[i].item()} instead of {expected.flatten()[i].item()} ({limit})"
        )


def bits(tensor: Tensor) -> bytes:
    """Return the elements as they lie in memory: two tensors are the same only if these are (nan, -0.0)."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy().tobytes()


def assert_bitwise_equal(actual: Tensor, expected: Tensor, case: str = "") -> None:
    """Check shape, dtype and every bit."""
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        raise AssertionError(f"{case}: {actual.dtype} {tuple(actual.shape)} instead of {expected.dtype} {tuple(expected.shape)}")
    if bits(actual) != bits(expected):
        width = actual.element_size()
        differs = [i for i in range(actual.numel()) if bits(actual)[i * width :][:width] != bits(expected)[i * width :][:width]]
        i = differs[0]
        a, e = actual.detach().flatten()[i].item(), expected.detach().flatten()[i].item()
        raise AssertionError(
            f"{case}: {len(differs)} of {actual.numel()} elements differ in their bits; first is element {i}: {a!r} instead of {e!r}"
        )


def assert_close_ulp(actual: Tensor, expected: Tensor, ulps: float, case: str = "") -> None:
    """Check that each element is within `ulps` units in the last place (of the expected value's binade, in the dtype of `actual`)."""
    info = torch.finfo(actual.dtype)
    wide = expected.detach().to(torch.float64)
    _, exponent = torch.frexp(wide)
    ulp = torch.ldexp(torch.full_like(wide, info.eps), exponent - 1).clamp(min=info.smallest_normal * info.eps)
    distance = (actual.detach().to(torch.float64) - wide).abs() / ulp
    wrong = ~(distance <= ulps)
    if bool(wrong.any()):
        i = int(wrong.flatten().nonzero()[0])
        raise AssertionError(
            f"{case}: {int(wrong.sum())} of {wrong.numel()} elements are further than {ulps} ulp; first is element {i}: "
            f"{actual.flatten()[i].item()!r} instead of {wide.flatten()[i].item()!r}, {distance.flatten()[i].item():.1f} ulp"
        )
