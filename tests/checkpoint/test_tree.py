"""runtime/checkpoint/tree.py: trees come back with their types, and what JSON cannot say is refused."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ringfold.collectives.errors import CheckpointError, Corrupt
from ringfold.runtime.checkpoint.tree import decode, encode

keys = st.text(max_size=4) | st.integers(-3, 3) | st.sampled_from(["$tensor", "$tuple", "$dict", "$x", "a.b"])
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
trees = st.recursive(
    leaves,
    lambda child: st.lists(child, max_size=3) | st.lists(child, max_size=3).map(tuple) | st.dictionaries(keys, child, max_size=3),
    max_leaves=12,
)


def round_trip(tree: Any) -> Any:
    tensors, value = encode(tree, "a test's state")
    text = json.dumps(value, allow_nan=False)
    return decode(json.loads(text), tensors.__getitem__)


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and [*map(type, left)] == [*map(type, right)] and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@given(trees)
def test_any_tree_comes_back_with_its_types(tree: Any) -> None:
    assert same(round_trip(tree), tree)


def test_what_schedulers_and_optimizers_keep_comes_back() -> None:
    back = round_trip({"milestones": Counter({10: 2, 30: 1}), "best": float("-inf"), "bad": float("nan"), "dtype": torch.bfloat16})
    assert back["milestones"] == Counter({10: 2, 30: 1})
    assert isinstance(back["milestones"], Counter)
    assert back["best"] == float("-inf")
    assert back["bad"] != back["bad"]
    assert back["dtype"] is torch.bfloat16
    assert round_trip(np.float32(0.5)) == 0.5
    assert round_trip(OrderedDict(b=1, a=2)) == {"b": 1, "a": 2}
    array = np.arange(6, dtype=np.uint16).reshape(2, 3)[:, ::-1]
    assert np.array_equal(round_trip([array])[0], array)


def test_tensors_are_named_by_path_and_never_share_a_name() -> None:
    tensors, _ = encode({"a": {"b": torch.tensor(1)}, "a.b": torch.tensor(2), "list": [torch.tensor(3)]}, "state")
    assert {name: value.item() for name, value in tensors.items()} == {"a.b": 1, "a.b'": 2, "list.0": 3}


def test_one_memory_is_one_tensor_and_overlapping_views_are_not() -> None:
    x = torch.arange(6.0)
    tensors, _ = encode({"x": x, "same": x.view(6), "other shape": x.view(2, 3), "half": x[:3], "reversed": x.view(2, 3).t()}, "state")
    assert list(tensors) == ["x", "other shape", "half", "reversed"]
    empty = torch.zeros(0)
    assert len(encode([empty, torch.zeros(0)], "state")[0]) == 2


def test_everything_refused_is_listed() -> None:
    with pytest.raises(CheckpointError) as caught:
        encode({"a": {1, 2}, "b": [print], "c": 1j, "d": object}, "the extra state of step 3")
    for said in (
        "the extra state of step 3",
        "a: builtins.set",
        "b.0: builtins.builtin_function_or_method",
        "c: builtins.complex",
        "d: builtins.type",
    ):
        assert said in str(caught.value)


def test_an_unknown_tag_is_corrupt() -> None:
    with pytest.raises(Corrupt, match="pickled"):
        decode({"$pickled": "gASVCAAAAA"}, {}.__getitem__)
