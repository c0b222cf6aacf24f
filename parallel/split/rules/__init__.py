"""The rules by which torch's functions are done on split tensors; importing this package makes them known."""

from ringfold.parallel.split.rules import attention, attributes, contraction, embedding, indexing, losses, pointwise, randomness, reductions, shapes

__all__ = ["attention", "attributes", "contraction", "embedding", "indexing", "losses", "pointwise", "randomness", "reductions", "shapes"]
