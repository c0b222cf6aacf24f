"""QuantisedLinears: the nn.Linear modules of a model multiply in 8 bits, in forward and in backward.

    y  = x @ W.T + b      x and W in e4m3
    dx = g @ W            g in e5m2
    dW = g.T @ x          db = sum of g, which is not quantised

Backward has x in 8 bits, half of what bf16 saves. W is saved as it is and quantised again by the same scale: that costs a pass over the weight and
saves nothing of it, so whoever keeps parameters in shards can let go of it meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.errors import PrecisionError
from ringfold.mixed_precision.casting import Casting
from ringfold.mixed_precision.fp8 import Fp8
from ringfold.mixed_precision.quantised import E4M3, MULTIPLE, Quantised, product
from ringfold.mixed_precision.scales import Gauges, Scales
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["QuantisedLinears"]


class QuantisedLinears:
    """Let the Linears inside `blocks` compute in 8 bits, or all of a model without blocks; `comm` are the ranks that train it.

    Left out are those that are kept in float32, that have a size which is no multiple of 16, and subclasses. The `forward` of each is replaced on
    the object, so names, hooks and classes stay; a copy of the model (deepcopy, pickle) is without it. In training mode amaxes are recorded.

    Raises:
        PrecisionError: no Linear is left; tells why of each.
    """

    def __init__(
        self, module: nn.Module, blocks: Mapping[str, nn.Module], casting: Casting, comm: Communicator, settings: Fp8, device: torch.device
    ) -> None:
        inside = {id(part) for block in blocks.values() for part in block.modules()} if blocks else None
        linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
        obstacles = {name: _obstacle(part, inside, casting) for name, part in linears.items()}
        chosen = {name: part for name, part in linears.items() if not obstacles[name]}
        if not chosen:
            reasons = "".join(f"\n  {name or 'the model itself'}: {obstacle}" for name, obstacle in obstacles.items())
            found = f"no nn.Linear of the model can compute in it:{reasons}\n  Change them," if reasons else "the model has no nn.Linear."
            raise PrecisionError(f"fp8: {found} {'or use' if reasons else 'Use'} bf16.")
        self.names = tuple(chosen)
        self._comm = comm
        self.scales = Scales(self.names, device, settings)
        self._forwards = [_Forward(part, self.scales.gauges(name)) for name, part in chosen.items()]

    def finish_step(self) -> None:
        """End a train step: the scales of the next one follow from the amaxes of all ranks; collective."""
        self.scales.finish_step(self._comm)

    def state_dict(self) -> dict[str, Any] | None:
        """Return what the next step's scales follow from, the same on every rank."""
        return self.scales.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.scales.load_state_dict(state)

    def close(self) -> None:
        """Give the Linears their own forward back."""
        for forward in self._forwards:
            forward.remove()


class _Forward:
    """What stands in a Linear's `forward`."""

    def __init__(self, linear: nn.Linear, gauges: Gauges) -> None:
        vars(linear).pop("forward", None)  # that of an engine that was not closed
        self.forward = linear.forward
        self._linear = linear
        self._gauges = gauges
        linear.forward = self  # type: ignore[assignment]

    def remove(self) -> None:
        if vars(self._linear).get("forward") is self:
            del self._linear.forward

    def __call__(self, input: Tensor) -> Tensor:
        linear = self._linear
        output: Tensor = _Multiply.apply(input, linear.weight, linear.bias, self._gauges, linear.training)
        return output

    def __reduce__(self) -> tuple[Any, ...]:
        """Make a copy of the model plain."""
        return _itself, (self.forward,)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, gauges: Gauges, record: bool) -> Tensor:
        x = gauges.input.quantise(input.reshape(-1, input.shape[-1]), record=record)
        w = gauges.weight.quantise(weight, record=record)
        needs_x, needs_w = ctx.needs_input_grad[1], ctx.needs_input_grad[0]
        ctx.save_for_backward(*(x if needs_x else (None, None)), *((weight, w.scale) if needs_w else (None, None)))
        ctx.gauges, ctx.record, ctx.shape, ctx.dtype = gauges, record, input.shape, weight.dtype
        return product(x, w, weight.dtype, bias, fast=True).view(*input.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, scale, weight, weight_scale = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        g = ctx.gauges.grad.quantise(rows, record=ctx.record)
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_input = product(g, Quantised.of(weight, weight_scale, E4M3).t(), ctx.dtype).view(ctx.shape) if needs_input else None
        grad_weight = product(g.t(), Quantised(values, scale).t(), ctx.dtype) if needs_weight else None
        return grad_input, grad_weight, rows.sum(0) if needs_bias else None, None, None


def _obstacle(linear: nn.Linear, inside: set[int] | None, casting: Casting) -> str:
    """Return why a Linear does not compute in 8 bits, or nothing."""
    if inside is not None and id(linear) not in inside:
        return "lies outside of the blocks"
    if type(linear) is not nn.Linear:
        return f"is a {type(linear).__name__}, whose forward may be another"
    if not isinstance(own := vars(linear).get("forward"), _Forward | None):
        return f"its forward was replaced by {own!r}"
    if casting.dtype_of("weight", linear.get_parameter("weight")) != casting.compute:
        return f"is kept in {str(linear.weight.dtype).removeprefix('torch.')}"
    if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
        return f"has {linear.in_features} inputs and {linear.out_features} outputs, not multiples of {MULTIPLE}"
    return ""


def _itself(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward
