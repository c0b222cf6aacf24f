"""The cost model's choices: what is picked where, that all ranks pick alike, and what the explanation says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringfold.collectives.algorithms import BUILDERS, build
from ringfold.collectives.cost import LINKS, SHM, TCP, Link
from ringfold.collectives.errors import ConfigError
from ringfold.collectives.promise import verify
from ringfold.collectives.select import MAX_SEGMENTS, SEGMENT_NBYTES, choose, size_class

OPS = sorted({key[0] for key in BUILDERS})
KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_on_one_host_small_all_reduces_are_one_shot_and_large_operations_use_registered_memory(size: int) -> None:
    for nbytes in (0, 1, 4, KIB):
        assert choose("all_reduce", size, nbytes, "shm").variant == "one_shot"
    for op in ("all_reduce", "reduce_scatter", "all_gather", "broadcast"):
        for nbytes in (64 * KIB, MIB, 64 * MIB):
            picked = choose(op, size, nbytes, "shm")
            assert (picked.algorithm, picked.variant) == ("direct", "registered"), (op, nbytes)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_over_tcp_small_all_reduces_take_one_step_and_large_ones_the_ring(size: int) -> None:
    for nbytes in (4, KIB):
        assert choose("all_reduce", size, nbytes, "tcp").variant == "one_shot"
    for op in ("all_reduce", "reduce_scatter", "all_gather", "broadcast"):
        assert choose(op, size, 16 * MIB, "tcp").algorithm == "ring", op


def test_registered_memory_is_never_wanted_over_tcp() -> None:
    for op in OPS:
        for nbytes in (4, MIB):
            choice = choose(op, 4, nbytes, "tcp", "direct")
            assert "registered" not in {candidate.variant for candidate in (choice.picked, *choice.alternatives)}


@given(
    op=st.sampled_from(OPS),
    size=st.integers(1, 64),
    nbytes=st.integers(0, 1 << 34),
    transport=st.sampled_from(sorted(LINKS)),
    algorithm=st.sampled_from([None, "direct"]),
)
def test_the_choice_is_the_least_of_all_predictions_and_one_of_a_few_segment_counts(
    op: str, size: int, nbytes: int, transport: str, algorithm: str | None
) -> None:
    choice = choose(op, size, nbytes, transport, algorithm)
    assert all(choice.cost.seconds <= other.cost.seconds for other in choice.alternatives)
    assert (op, choice.algorithm, choice.variant) in BUILDERS
    assert choice.segments in (1, 2, 4, 8, 16, 32, 64, 128)
    assert choice.cost.seconds >= 0
    if algorithm is not None:
        assert choice.algorithm == algorithm


@given(nbytes=st.integers(0, 1 << 40))
def test_sizes_of_one_class_share_their_choice(nbytes: int) -> None:
    limit = size_class(nbytes)
    assert nbytes <= limit < max(2 * nbytes, 65)
    assert size_class(limit) == limit
    assert choose("all_reduce", 4, nbytes, "shm") is choose("all_reduce", 4, limit, "shm")


def test_segments_are_of_about_a_quarter_mebibyte_until_there_are_32() -> None:
    for exponent in range(6, 34):
        choice = choose("all_reduce", 2, 1 << exponent, "tcp", "ring")
        segment_nbytes = (1 << exponent) / 2 / choice.segments
        if choice.segments == MAX_SEGMENTS:
            assert segment_nbytes >= SEGMENT_NBYTES / 2
        else:
            assert segment_nbytes <= SEGMENT_NBYTES
            assert choice.segments == 1 or segment_nbytes > SEGMENT_NBYTES / 2


@pytest.mark.parametrize("transport", sorted(LINKS))
@pytest.mark.parametrize("op", OPS)
def test_more_bytes_never_cost_less(op: str, transport: str) -> None:
    for size in (2, 5):
        costs = [choose(op, size, 1 << exponent, transport).cost.seconds for exponent in range(6, 31)]
        assert costs == sorted(costs)


def test_every_choice_for_a_few_ranks_builds_schedules_that_keep_their_promise() -> None:
    for transport in sorted(LINKS):
        for op in OPS:
            for size in (1, 2, 3, 5):
                for nbytes in (4, 100_000, 3 * MIB):
                    choice = choose(op, size, nbytes, transport)
                    schedules = [build(op, choice.algorithm, choice.variant, rank, size, choice.segments, root=0) for rank in range(size)]
                    verify(op, schedules, nbytes // 4, align=16)


def test_the_explanation_names_the_pick_its_time_every_alternative_and_the_reason() -> None:
    text = str(choose("all_reduce", 2, 64 * MIB, "shm"))
    assert text.splitlines()[0] == "all_reduce of up to 64 MiB on 2 ranks over shm: direct (registered)"
    assert "predicted 4.48 ms: 2 steps, 0 B sent by a rank, 128 segments a chunk" in text
    assert "because it is predicted to be the fastest: the ranks work where the vectors lie" in text
    for alternative in ("ring (pipelined)", "direct (exchange)", "direct (one_shot)"):
        assert alternative in text
    assert "64 MiB sent by a rank, 128 segments a chunk, 3.26 times the time" in text
    assert "alpha 1 us a step" in text
    assert max(map(len, text.splitlines())) <= 160


def test_the_explanation_of_a_forced_choice_of_a_tie_of_one_rank_and_of_a_barrier_says_so() -> None:
    assert "because algorithm='ring' was asked for" in str(choose("all_reduce", 4, MIB, "shm", "ring"))
    assert "nothing is faster, and it comes before direct (exchange) in the list" in str(choose("all_reduce", 2, 16 * MIB, "tcp"))
    assert "one rank has nobody to talk to" in str(choose("all_reduce", 1, MIB, "shm"))
    assert str(choose("barrier", 5, 0, "tcp")).startswith("barrier on 5 ranks over tcp: direct (dissemination)\n  predicted 18 us: 3 steps")


def test_unknown_names_are_refused_all_at_once_with_the_nearest_known() -> None:
    with pytest.raises(ConfigError) as caught:
        choose("all_reduse", 2, 4, "smh", None)
    assert "did you mean 'all_reduce'?" in str(caught.value)
    assert "did you mean 'shm'?" in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean 'ring'"):
        choose("all_reduce", 2, 4, "shm", "rinng")
    with pytest.raises(ConfigError, match=r"unknown algorithm 'ring'.* Known: direct"):
        choose("barrier", 2, 0, "shm", "ring")


@pytest.mark.parametrize("link", [SHM, TCP], ids=lambda link: link.name)
def test_a_message_nobody_waits_for_is_cheaper_than_one_that_is_waited_for_but_not_free(link: Link) -> None:
    chain = link.seconds(rounds=4, messages=4, wire_nbytes=0)
    flood = link.seconds(rounds=1, messages=4, wire_nbytes=0)
    assert link.alpha_s < flood < chain == 4 * link.alpha_s
