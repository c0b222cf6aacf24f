"""What a split tensor says of itself: the whole's shape, this rank's everything else."""

from __future__ import annotations

from typing import Any

import torch
from ringfold.parallel.split.tensor import Split, local_of, made, plainly, rule
from torch import Tensor

__all__: list[str] = []

OF_THE_WHOLE = (
    "shape ndim dtype device layout requires_grad is_leaf is_cuda is_cpu is_meta is_sparse is_sparse_csr is_quantized is_nested is_mkldnn names"
)
METHODS = "size dim ndimension numel nelement element_size is_floating_point is_complex is_signed get_device stride is_inference is_pinned __len__"
OF_THE_LOCAL = "is_neg is_conj is_contiguous retain_grad register_hook has_names untyped_storage data_ptr storage_offset is_set_to"


def _getters(names: str) -> list[Any]:
    return [getattr(Tensor, name).__get__ for name in names.split() if hasattr(getattr(Tensor, name, None), "__get__")]


def _methods(names: str) -> list[Any]:
    return [found for name in names.split() for space in (Tensor, torch) if (found := getattr(space, name, None)) is not None]


@rule(*_getters(OF_THE_WHOLE), *_methods(METHODS))
def _of_the_whole(func: Any, *args: Any, **kwargs: Any) -> Any:
    with plainly():
        return func(*args, **kwargs)


@rule(*_getters("_version grad_fn nbytes"), *_methods(OF_THE_LOCAL))
def _of_the_local(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    return func(local_of(tensor), *args, **kwargs)


@rule(Tensor.data.__get__)  # type: ignore[attr-defined]
def _data(func: Any, tensor: Split, *_: Any) -> Tensor:
    return made(func(local_of(tensor)), tensor.shape, tensor.cuts, tensor.terms)


@rule(Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
def _transposed(func: Any, tensor: Split, *_: Any) -> Tensor:
    return tensor.permute(*range(tensor.dim())[::-1]) if func == Tensor.T.__get__ else tensor.transpose(-2, -1)  # type: ignore[attr-defined]


@rule(Tensor.requires_grad_)
def _requires_grad_(func: Any, tensor: Split, *args: Any, **kwargs: Any) -> Tensor:
    func(local_of(tensor), *args, **kwargs)
    with plainly():
        return func(tensor, *args, **kwargs)  # type: ignore[no-any-return]
