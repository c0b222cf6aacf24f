"""Every algorithm, proven for 1 to 17 ranks: what it promises, that every element is right, and what it costs."""

from __future__ import annotations

import pytest
from ringfold.collectives.algorithms import build, predict
from ringfold.collectives.codes import FOLDING
from ringfold.collectives.cost import Topology
from ringfold.collectives.errors import ConfigError
from ringfold.collectives.promise import verify
from ringfold.collectives.schedule import Kind
from ringfold.collectives.simulator import Order, simulate
from ringfold.collectives.vectors import Vectors

from tests.harness.replay import replay
from tests.harness.schedules import SUBJECTS, Subject, groupings

each_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=str)
MAX_SIZE = 17


@each_subject
def test_schedules_keep_their_promise_for_1_to_17_ranks_any_segments_and_several_roots(subject: Subject) -> None:
    for size in range(1, MAX_SIZE + 1):
        for schedules in subject.cases(size):
            verify(subject.op, schedules, count=1000)


def uneven(chunks: int) -> list[int]:
    return [(7 * chunk) % 5 * (chunk != chunks // 2) for chunk in range(chunks)]


def counts(subject: Subject, size: int) -> list[int | list[int]]:
    even: list[int | list[int]] = [0, 1, 3, size - 1, size, size + 1, 1000] if size <= 9 else [1, size + 1, 1000]
    if subject.op in ("reduce_scatter", "all_gather", "gather", "scatter"):
        even += [uneven(size), [0] * (size - 1) + [11]]
    if subject.op == "all_to_all":
        even += [uneven(size * size)]
    return even


@pytest.mark.parametrize("subject", [subject for subject in SUBJECTS if subject.op != "barrier"], ids=str)
def test_every_element_of_small_large_and_uneven_vectors_is_right(subject: Subject) -> None:
    for size in (*range(1, 9), 11, MAX_SIZE):
        schedules = subject.schedules(size, 1 + size % 3, root=size // 2)
        in_place = size % 2 == 0
        result = simulate(schedules, 0, in_place=in_place)
        for count in counts(subject, size):
            lengths = Vectors(schedules[0], in_place).lengths(count, 16 if count == 1000 else 1)
            replay(schedules, result, lengths, in_place)
        if schedules[0].fallback is not None:
            continued = [schedule.continued for schedule in schedules]
            replay(continued, simulate(continued, 0, in_place=in_place, read_only=True), lengths, in_place)


def normal(order: Order) -> object:
    """An order of folds without regard to which operand is left and which right: floating-point addition commutes exactly."""
    return frozenset(normal(operand) for operand in order) if isinstance(order, tuple) else order


@pytest.mark.parametrize("subject", [subject for subject in SUBJECTS if subject.op in FOLDING and subject.algorithm == "direct"], ids=str)
def test_direct_folds_in_rank_order_whatever_the_variant(subject: Subject) -> None:
    for size in (2, 3, 5, 8):
        in_rank_order: Order = 0
        for rank in range(1, size):
            in_rank_order = (in_rank_order, rank)
        result = simulate(subject.schedules(size, segments=2), 100)
        assert {normal(contents.order) for cells in result.outputs for contents in cells.values()} == {normal(in_rank_order)}


@each_subject
def test_cost_counts_the_steps_and_bytes_that_the_simulator_sees(subject: Subject) -> None:
    for size in range(1, 10):
        for hosts in groupings(size) if subject.algorithm == "hierarchical" else [(0,) * size]:
            count = 64 * 1260 * len(set(hosts))  # cut evenly into up to 10 chunks and slices of them
            result = simulate(subject.schedules(size, 1, 0, hosts), count)
            cost = predict(subject.op, subject.algorithm, subject.variant, Topology(hosts), count, 1)
            assert cost.wire_nbytes == (max(result.sent) if subject.op != "barrier" else 0), (hosts, cost)
            if subject.algorithm in ("direct", "ring") or subject.variant == "binomial":
                assert cost.steps == result.rounds, (hosts, cost)
            else:
                # Not every chunk takes part in every step; and in two trees one may wait for the other where both use one channel.
                assert cost.steps - 2 <= result.rounds <= cost.steps + (subject.variant == "double"), (hosts, cost)


def test_ring_sends_the_least_possible_number_of_elements_and_the_same_from_every_rank() -> None:
    for size in range(2, 10):
        assert set(simulate(Subject("all_reduce", "ring", "pipelined").schedules(size, 4), 120 * size).sent) == {2 * 120 * (size - 1)}


@each_subject
def test_one_rank_has_nothing_to_do_but_to_copy_what_is_not_in_place(subject: Subject) -> None:
    kinds = {step.kind for step in subject.schedules(1, segments=2)[0].steps}
    assert kinds == (set() if subject.op in ("all_reduce", "broadcast", "reduce", "barrier") else {Kind.COPY})


def test_an_unknown_algorithm_is_refused_with_the_nearest_known() -> None:
    with pytest.raises(ConfigError, match="did you mean 'all_reduce ring pipelined'"):
        build("all_reduce", "ring", "pipeline", 0, 2)
