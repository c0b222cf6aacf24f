"""Sparse gradients: the rows that each rank touched are gathered on all ranks and added up there.

    cost for k rows of width w on each of n ranks: n k (w + 1) elements arrive at each rank, whatever the size of the table

A gradient that is dense on some rank (a table that is also used as a linear layer) is reduced densely on all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.work import Work
from torch import nn

_NONE, _SPARSE, _DENSE = range(3)


def sparse_parameter_names(module: nn.Module) -> set[str]:
    """Return the names of the parameters whose gradient is sparse: tables of `Embedding(sparse=True)` and `EmbeddingBag(sparse=True)`."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse}
    return {name for name, parameter in module.named_parameters() if id(parameter) in tables}


def reduce_sparse(parameters: Sequence[nn.Parameter], comm: Communicator, averaged: bool) -> Iterator[None]:
    """Replace the gradient of each parameter by its sum (or average) over the ranks of `comm`, coalesced; None where no rank has one.

    A generator of phases: it yields after it has sent and before it waits, and is to be exhausted.
    """
    if not parameters:
        yield
        return
    mine = torch.tensor([_kind_and_count(parameter) for parameter in parameters], dtype=torch.int64, device="cpu")
    gathered = torch.empty(comm.size * mine.numel(), dtype=torch.int64, device="cpu")
    counting = comm.all_gather(gathered, mine.view(-1), async_op=True)
    yield
    _wait(counting)
    exchanges = []
    for parameter, columns in zip(parameters, gathered.view(comm.size, len(parameters), 2).unbind(1), strict=True):
        kinds, counts = columns[:, 0].tolist(), columns[:, 1].tolist()
        if _DENSE in kinds:
            exchanges.append(_reduce_densely(parameter, comm, averaged))
        elif any(counts):
            exchanges.append(_gather(parameter, counts, comm, averaged))
        elif _SPARSE in kinds:
            parameter.grad = _sparse(parameter, torch.empty(0, dtype=torch.int64, device=parameter.device), parameter.new_empty(0))
    for exchange in exchanges:
        next(exchange)
    yield
    for exchange in exchanges:
        for _ in exchange:
            pass


def _kind_and_count(parameter: nn.Parameter) -> tuple[int, int]:
    """Coalesce the gradient of this rank and tell its kind and number of rows."""
    grad = parameter.grad
    if grad is None:
        return _NONE, 0
    if not grad.is_sparse:
        return _DENSE, 0
    parameter.grad = grad.coalesce()
    return _SPARSE, int(parameter.grad._nnz())


def _gather(parameter: nn.Parameter, counts: list[int], comm: Communicator, averaged: bool) -> Iterator[None]:
    grad = parameter.grad
    width = parameter.shape[1:].numel()
    if grad is None:
        my_indices, my_values = torch.empty(0, dtype=torch.int64, device=parameter.device), parameter.new_empty(0)
    else:
        my_indices, my_values = grad.indices().reshape(-1), grad.values().reshape(-1)
    indices = torch.empty(sum(counts), dtype=torch.int64, device=parameter.device)
    values = parameter.new_empty(sum(counts) * width)
    works = [
        comm.all_gather(indices, my_indices, counts=counts, async_op=True),
        comm.all_gather(values, my_values.detach(), counts=[count * width for count in counts], async_op=True),
    ]
    yield
    for work in works:
        _wait(work)
    if averaged:
        values /= comm.size
    parameter.grad = _sparse(parameter, indices, values)


def _reduce_densely(parameter: nn.Parameter, comm: Communicator, averaged: bool) -> Iterator[None]:
    grad = parameter.grad
    dense = torch.zeros_like(parameter) if grad is None else grad.detach()
    dense = dense.to_dense() if dense.is_sparse else dense.contiguous()
    work = comm.all_reduce(dense, "avg" if averaged else "sum", async_op=True)
    yield
    _wait(work)
    parameter.grad = dense


def _sparse(parameter: nn.Parameter, indices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    rows = values.view(-1, *parameter.shape[1:]) if indices.numel() else values.new_empty(0, *parameter.shape[1:])
    return torch.sparse_coo_tensor(indices.view(1, -1), rows, parameter.shape, check_invariants=False).coalesce()


def _wait(work: Work | None) -> None:
    if work is not None:
        work.wait()
