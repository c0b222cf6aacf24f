"""runtime/data.py: the ranks' rows are the global batches, exactly, in any world size."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ringfold.collectives.errors import ConfigError, Incompatible
from ringfold.runtime.data import ShardedData, shard
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)


@dataclass
class Axis:
    """The place of a rank, which is all that sharding asks of a communicator."""

    rank: int
    size: int


class Numbers(Dataset):
    """Sample i is i; remembers which samples were loaded in this process."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        self.loaded.append(index)
        return torch.tensor(index)


class Noisy(Numbers):
    """Sample i is i and a random number of the worker that loaded it."""

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, torch.rand(()).item()


def ranks(source: Any, size: int, **options: Any) -> list[ShardedData]:
    return [shard(source, Axis(rank, size), **options) for rank in range(size)]


def one_pass(shards: list[ShardedData]) -> list[list[int]]:
    """Return the global batches of one epoch, put together from all ranks' rows in rank order."""
    return [[int(i) for rows in batch for i in rows] for batch in zip(*shards, strict=True)]


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 60),
    batch_size=st.integers(1, 13),
    size=st.integers(1, 5),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_every_sample_is_given_exactly_once_an_epoch(count: int, batch_size: int, size: int, shuffle: bool, drop_last: bool) -> None:
    options = {"batch_size": batch_size, "shuffle": shuffle, "drop_last": drop_last, "seed": 5}
    shards = ranks(Numbers(count), size, **options)
    alone = ranks(Numbers(count), 1, **options)
    for _ in range(2):
        batches = one_pass(shards)
        assert batches == one_pass(alone)
        assert len(batches) == len(shards[0])
        seen = [i for batch in batches for i in batch]
        whole = count // batch_size * batch_size if drop_last else count
        assert len(seen) == len(set(seen)) == whole
        if not shuffle:
            assert seen == list(range(whole))


def test_a_rank_loads_only_its_own_rows() -> None:
    sources = [Numbers(20) for _ in range(3)]
    batches = [list(shard(source, Axis(rank, 3), batch_size=6)) for rank, source in enumerate(sources)]
    assert [len(rows) for rows in batches[0]] == [2, 2, 2, 1]
    assert sources[0].loaded == [0, 1, 6, 7, 12, 13, 18]
    assert sources[1].loaded == [2, 3, 8, 9, 14, 15, 19]


def test_a_rank_without_rows_gets_the_structure_with_zero_rows() -> None:
    source = TensorDataset(torch.arange(10.0).view(5, 2), torch.arange(5))
    x, y = list(shard(source, Axis(2, 3), batch_size=3))[-1]
    assert x.shape == (0, 2)
    assert y.shape == (0,)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


def test_epochs_are_shuffled_differently_and_the_same_again() -> None:
    data = shard(Numbers(50), Axis(0, 1), batch_size=7, shuffle=True, seed=3)
    first, second = one_pass([data]), one_pass([data])
    assert first != second
    data.set_epoch(0)
    assert one_pass([data]) == first
    assert one_pass([shard(Numbers(50), Axis(0, 1), batch_size=7, shuffle=True, seed=4)]) != first


def test_shuffling_neither_uses_nor_changes_the_programs_own_generators() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    before = one_pass([shard(Numbers(30), Axis(0, 1), batch_size=4, shuffle=True)])
    here = (torch.rand(()).item(), random.random(), np.random.rand())
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    assert (torch.rand(()).item(), random.random(), np.random.rand()) == here
    assert one_pass([shard(Numbers(30), Axis(0, 1), batch_size=4, shuffle=True)]) == before


@pytest.mark.parametrize(("size_before", "size_after"), [(1, 1), (2, 3), (4, 1)])
@pytest.mark.parametrize("consumed", [0, 1, 5, 7])
def test_it_resumes_at_the_exact_next_sample_in_another_world_size(size_before: int, size_after: int, consumed: int) -> None:
    options = {"batch_size": 8, "shuffle": True, "seed": 2}
    before = ranks(Numbers(53), size_before, **options)
    for data in before:
        data.set_epoch(4)
    given = [[int(i) for rows in batch for i in rows] for batch in islice(zip(*before, strict=True), consumed)]
    states = [data.state_dict() for data in before]
    assert all(state == states[0] for state in states)
    after = ranks(Numbers(53), size_after, **options)
    for data in after:
        data.load_state_dict(states[0])
    uninterrupted = shard(Numbers(53), Axis(0, 1), **options)
    uninterrupted.set_epoch(4)
    assert given + one_pass(after) == one_pass([uninterrupted])
    assert one_pass(after) == one_pass([uninterrupted])


def test_resuming_does_not_load_what_was_given_before() -> None:
    source = Numbers(40)
    data = shard(source, Axis(0, 1), batch_size=8)
    data.load_state_dict({"epoch": 0, "batches": 3, "seed": 0, "samples": 40, "batch_size": 8})
    list(data)
    assert source.loaded == list(range(24, 40))


def test_a_pass_left_early_is_taken_up_where_it_stopped() -> None:
    data = shard(Numbers(10), Axis(0, 1), batch_size=2)
    for batch in data:
        if 5 in batch:
            break
    assert (data.epoch, data.batches) == (0, 3)
    assert one_pass([data]) == [[6, 7], [8, 9]]
    assert (data.epoch, data.batches) == (1, 0)


def test_a_position_in_other_data_is_refused_with_all_differences() -> None:
    state = shard(Numbers(40), Axis(0, 1), batch_size=8, seed=1).state_dict()
    with pytest.raises(Incompatible) as caught:
        shard(Numbers(41), Axis(0, 1), batch_size=4, seed=1).load_state_dict(state)
    assert "samples: 40 in the checkpoint, 41 here" in str(caught.value)
    assert "batch_size: 8 in the checkpoint, 4 here" in str(caught.value)
    assert "seed" not in str(caught.value).split("set_epoch")[0].replace("samples", "")


def evens(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(rows) * 2


def test_a_data_loader_is_taken_over_with_its_batch_size_as_the_global_one() -> None:
    for shuffle in (False, True):
        loader = DataLoader(Numbers(23), batch_size=6, shuffle=shuffle, collate_fn=evens, drop_last=True)
        batches = one_pass(ranks(loader, 4))
        assert [len(batch) for batch in batches] == [6, 6, 6]
        seen = [i // 2 for batch in batches for i in batch]
        assert len(set(seen)) == 18
        assert (seen == list(range(18))) is not shuffle
        assert batches == one_pass(ranks(loader, 1))


@pytest.mark.parametrize(
    "sampler",
    [
        SubsetRandomSampler([3, 1, 4, 15, 9, 2, 6]),
        WeightedRandomSampler([1.0, 2.0, 3.0, 4.0], num_samples=11),
        RandomSampler(range(9), replacement=True, num_samples=14),
    ],
)
def test_ranks_agree_on_the_order_of_any_torch_sampler(sampler: Any) -> None:
    loader = DataLoader(Numbers(20), batch_size=4, sampler=sampler)
    shards = ranks(loader, 3)
    batches = one_pass(shards)
    assert batches == one_pass(ranks(loader, 1))
    assert sum(map(len, batches)) == len(sampler)
    assert one_pass(shards) != batches
    assert sampler.generator is None


class PythonShuffle:
    """A sampler of the user's own that draws from Python's generator."""

    def __iter__(self) -> Any:
        return iter(random.sample(range(12), 12))

    def __len__(self) -> int:
        return 12


def test_ranks_agree_on_a_sampler_that_draws_from_pythons_generator() -> None:
    loader = DataLoader(Numbers(12), batch_size=5, sampler=PythonShuffle())
    random.seed(1)
    first = one_pass(ranks(loader, 2))
    random.seed(2)
    assert one_pass(ranks(loader, 3)) == first


def test_the_batches_of_a_users_batch_sampler_are_the_global_batches() -> None:
    chosen = [[0, 3, 5, 7], [1], [2, 4, 6]]
    shards = ranks(DataLoader(Numbers(8), batch_sampler=chosen), 3)
    assert one_pass(shards) == chosen
    assert len(shards[0]) == 3
    bucketed = BatchSampler(SequentialSampler(range(8)), 3, drop_last=False)
    assert one_pass(ranks(DataLoader(Numbers(8), batch_sampler=bucketed), 2)) == [[0, 1, 2], [3, 4, 5], [6, 7]]


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_load_a_ranks_rows_epoch_after_epoch(persistent: bool) -> None:
    loader = DataLoader(Numbers(11), batch_size=4, shuffle=True, num_workers=2, persistent_workers=persistent)
    shards = ranks(loader, 2)
    plain = ranks(DataLoader(Numbers(11), batch_size=4, shuffle=True), 1)
    for _ in range(2):
        batches = one_pass(shards)
        assert batches == one_pass(plain)
        assert sorted(i for batch in batches for i in batch) == list(range(11))


def test_workers_of_different_ranks_draw_different_numbers_and_the_same_again() -> None:
    def drawn(rank: int) -> list[float]:
        return [value for _, values in shard(Noisy(8), Axis(rank, 2), batch_size=4, num_workers=1) for value in values.tolist()]

    torch.manual_seed(0)
    first, second = drawn(0), drawn(1)
    assert not set(first) & set(second)
    torch.manual_seed(1)
    assert drawn(0) == first


def test_rows_of_global_batches_are_cut_whatever_their_number() -> None:
    batches = [(torch.arange(n), torch.arange(n) * 10) for n in (7, 4, 1, 9, 0)]
    for size in (1, 2, 3, 4):
        shards = ranks(batches, size)
        assert len(shards[0]) == 5
        for whole, parts in zip(batches, zip(*shards, strict=True), strict=True):
            assert torch.equal(torch.cat([x for x, _ in parts]), whole[0])
            assert torch.equal(torch.cat([y for _, y in parts]), whole[1])


class Stream(IterableDataset):
    """Batches that depend on the epoch, and have no length."""

    def __init__(self) -> None:
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return iter([torch.arange(5) + 100 * self.epoch, torch.arange(3) + 100 * self.epoch])


def test_an_iterable_is_told_the_epoch_and_may_have_no_length() -> None:
    data = shard(Stream(), Axis(1, 2))
    assert [rows.tolist() for rows in data] == [[3, 4], [2]]
    assert [rows.tolist() for rows in data] == [[103, 104], [102]]
    with pytest.raises(TypeError):
        len(data)


def test_a_loader_of_an_iterable_dataset_yields_global_batches() -> None:
    loader = DataLoader(Stream(), batch_size=None)
    shards = ranks(loader, 2)
    assert [[len(rows) for rows in data] for data in shards] == [[3, 2], [2, 1]]


def test_an_iterator_is_passed_over_once_and_taken_up_again_but_not_restarted() -> None:
    data = shard((torch.arange(4) for _ in range(5)), Axis(0, 2))
    assert len(list(islice(data, 2))) == 2
    assert data.batches == 2
    assert len(list(data)) == 3
    with pytest.raises(ConfigError, match="iterator"):
        list(data)


def test_an_iterator_in_a_new_process_skips_what_was_given_before() -> None:
    data = shard((torch.full((2,), i) for i in range(6)), Axis(1, 2))
    data.load_state_dict({"epoch": 0, "batches": 4})
    assert [rows.item() for rows in data] == [4, 5]


class Mesh(Axis):
    layout = "dp2"


@pytest.mark.parametrize(
    ("source", "axis", "options", "said"),
    [
        (Numbers(4), Axis(0, 2), {}, "needs batch_size="),
        (Numbers(4), Axis(0, 2), {"batch_size": 0}, "at least 1"),
        (DataLoader(Numbers(4)), Axis(0, 2), {"batch_size": 2}, "brings its own"),
        (DataLoader(Numbers(4)), Axis(0, 2), {"shuffle": True, "num_workers": 1}, "shuffle, num_workers"),
        (Stream(), Axis(0, 2), {"batch_size": 2}, "map-style"),
        (DataLoader(Numbers(4), sampler=DistributedSampler(Numbers(4), 2, 0)), Axis(0, 2), {}, "DistributedSampler"),
        (7, Axis(0, 2), {}, "int"),
        ([torch.zeros(2)], "dp", {}, "Communicator"),
        ([torch.zeros(2)], Mesh(0, 2), {}, 'mesh\\["dp"\\]'),
    ],
)
def test_what_cannot_be_sharded_is_refused(source: Any, axis: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        shard(source, axis, **options)
