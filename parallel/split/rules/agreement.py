"""How the operands of one operation come to be divided alike.

Each dimension of each operand has a label, the same where they are paired with each other (None: it is repeated). For every axis one label is
divided, by one cut. An operand that is divided otherwise is gathered; one that is not, and has the label, gives its part; one that has not the
label is shared: each rank uses all of it, for a part of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ringfold.parallel.split import exchange
from ringfold.parallel.split.axis import Axis
from ringfold.parallel.split.cut import Cut
from ringfold.parallel.split.tensor import Split, cuts_of, joined, local_of, made, without_terms
from torch import Tensor, nn

__all__ = ["Agreement", "agree", "labels_of", "like"]

Labels = Sequence[object]


class Agreement(NamedTuple):
    """Operands as this rank has them, the label that each axis divides, and over which axes the result's gradient is a sum."""

    locals: list[Tensor]
    divided: dict[object, Cut]
    terms: frozenset[Axis]

    def cuts(self, labels: Labels) -> list[Cut]:
        """Return the cuts of a result."""
        return [cut.at(labels.index(label)) for label, cut in self.divided.items() if label in labels]


def agree(operands: Sequence[Tensor], labels: Sequence[Labels], why: str) -> Agreement:
    """Divide operands alike; of two that are divided differently over an axis the later one stays."""
    operands = [_of_parameter(one, _axes(operands)) for one in operands]
    divided: dict[object, Cut] = {}
    for axis in _axes(operands):
        label, cut = _choose(operands, labels, axis)
        if label is None or label in divided:  # a dimension is divided over one axis
            operands = [joined(one, axis, why) for one in operands]
            continue
        divided[label] = cut
        for place, (one, own) in enumerate(zip(operands, labels, strict=True)):
            operands[place] = _divided_by(one, own, label, cut, why)
    terms = _terms(operands)
    return Agreement([local_of(one) for one in operands], divided, terms)


def like(operand: Tensor, model: Split, labels: Labels, why: str) -> Tensor:
    """Divide an operand as `model` is, whose labels are the numbers of its dimensions."""
    own = {cut.axis: cut for cut in model.cuts}
    for cut in cuts_of(operand):
        if cut.axis not in own:
            operand = joined(operand, cut.axis, why)
    for cut in model.cuts:
        operand = _divided_by(operand, labels, cut.dim, cut, why)
    terms = operand.terms if isinstance(operand, Split) else frozenset()
    operand = without_terms(operand, terms - model.terms - own.keys())
    for axis in model.terms - terms:
        operand = made(exchange.share(local_of(operand), axis), operand.shape, cuts_of(operand), terms | {axis})
    return operand


def labels_of(own: Sequence[int], shape: Sequence[int]) -> list[object]:
    """Return the labels of an operand of shape `own` that is repeated to `shape`, whose labels are the numbers of its dimensions."""
    offset = len(shape) - len(own)
    return [offset + dim if length == shape[offset + dim] else None for dim, length in enumerate(own)]


def _of_parameter(operand: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Return a parameter that code has kept for itself, past the module, as the module would have given it."""
    sums = frozenset(axis for axis in axes if axis.sums_parameters)
    return made(operand, operand.shape, (), sums) if sums and isinstance(operand, nn.Parameter) else operand


def _axes(operands: Sequence[Tensor]) -> list[Axis]:
    return list(dict.fromkeys(cut.axis for one in operands for cut in cuts_of(one)))


def _choose(operands: Sequence[Tensor], labels: Sequence[Labels], axis: Axis) -> tuple[object, Cut]:
    found = [(own[cut.dim], cut) for one, own in zip(operands, labels, strict=True) for cut in cuts_of(one) if cut.axis is axis]
    return next((pair for pair in reversed(found) if pair[0] is not None), found[0])


def _divided_by(operand: Tensor, own: Labels, label: object, cut: Cut, why: str) -> Tensor:
    axis = cut.axis
    has = next((each for each in cuts_of(operand) if each.axis is axis), None)
    if has is not None:
        if own[has.dim] == label and has.matches(cut):
            return operand
        if label not in own:
            axis.gathered[why] += 1
            assert isinstance(operand, Split)  # it has a cut
            return made(exchange.lend(local_of(operand), has), operand.shape, [c for c in operand.cuts if c is not has], operand.terms | {axis})
        operand = joined(operand, axis, why)
    terms = operand.terms if isinstance(operand, Split) else frozenset()
    if label not in own:
        if axis in terms:
            return operand
        return made(exchange.share(local_of(operand), axis), operand.shape, cuts_of(operand), terms | {axis})
    mine = cut.at(own.index(label))
    local = local_of(operand)
    part = mine.take(local) if axis in terms else exchange.part(local, mine)
    return made(part, operand.shape, (*cuts_of(operand), mine), terms - {axis})


def _terms(operands: list[Tensor]) -> frozenset[Axis]:
    """Return the axes over which the result's gradient may be a sum: those of all operands that have one; others' are made alike, in place."""
    axes = frozenset(axis for one in operands if isinstance(one, Split) for axis in one.terms)
    divided = {cut.axis for one in operands for cut in cuts_of(one)}
    kept = set()
    for axis in axes - divided:
        if all(isinstance(one, Split) and axis in one.terms for one in operands if one.requires_grad):
            kept.add(axis)
        else:
            operands[:] = [without_terms(one, [axis]) for one in operands]
    return frozenset(kept)
