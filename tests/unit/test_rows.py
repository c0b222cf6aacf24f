"""runtime/rows.py: every row goes to one rank, and a nested batch is cut in all its parts alike."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ringfold.collectives.errors import ConfigError
from ringfold.runtime.rows import row_count, row_range, take_rows

Pair = namedtuple("Pair", "x y")


@dataclass
class Record:
    x: torch.Tensor
    name: str


@given(count=st.integers(0, 1000), size=st.integers(1, 17))
def test_row_ranges_cover_every_row_once_in_order_and_differ_by_at_most_one(count: int, size: int) -> None:
    ranges = [row_range(count, rank, size) for rank in range(size)]
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(count))
    lengths = [stop - start for start, stop in ranges]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


def test_take_rows_cuts_every_nested_part_and_leaves_what_has_no_rows() -> None:
    x = torch.arange(15.0).view(5, 3)
    batch = {
        "x": x,
        "nested": (x[:, 0], [np.arange(5), {"deep": x.bool()}]),
        "pair": Pair(x, torch.tensor(2.5)),
        "record": Record(x, "whole"),
        "ordered": OrderedDict(b=x, a=x + 1),
        "names": ["a", "b", "c", "d", "e"],
        "columns": ("v", "w", "x", "y", "z"),
        "epoch": 3,
        "none": None,
    }
    assert row_count(batch) == 5
    cut = take_rows(batch, 1, 4)
    assert row_count(cut) == 3
    assert torch.equal(cut["x"], x[1:4])
    assert cut["x"].data_ptr() == x[1:].data_ptr()
    assert torch.equal(cut["nested"][0], x[1:4, 0])
    assert cut["nested"][1][0].tolist() == [1, 2, 3]
    assert cut["nested"][1][1]["deep"].dtype == torch.bool
    assert isinstance(cut["pair"], Pair)
    assert cut["pair"].y == 2.5
    assert cut["record"].name == "whole"
    assert len(cut["record"].x) == 3
    assert type(cut["ordered"]) is OrderedDict
    assert list(cut["ordered"]) == ["b", "a"]
    assert cut["names"] == ["b", "c", "d"]
    assert cut["columns"] == ("w", "x", "y")
    assert (cut["epoch"], cut["none"]) == (3, None)


def test_parts_with_different_row_counts_are_all_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        row_count({"x": torch.zeros(4, 2), "y": (torch.zeros(3), ["a", "b"])})
    for said in ("batch['x']: 4", "batch['y'][0]: 3", "batch['y'][1]: 2"):
        assert said in str(caught.value)


def test_a_batch_without_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="no rows"):
        row_count({"step": 3, "scale": torch.tensor(1.0)})
