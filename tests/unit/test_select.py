"""The cost model's choices: what is picked where, that all ranks pick alike, and what the explanation says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringfold.collectives.algorithms import BUILDERS, build
from ringfold.collectives.codes import FOLDING
from ringfold.collectives.cost import SHM, TCP, Link, Topology, everyone
from ringfold.collectives.errors import ConfigError
from ringfold.collectives.promise import verify
from ringfold.collectives.schedule import FULL_BUFFERS
from ringfold.collectives.select import MAX_SEGMENTS, SEGMENT_NBYTES, Choice, choose, size_class

OPS = sorted(FULL_BUFFERS)
KIB, MIB = 1 << 10, 1 << 20
shm, tcp = Topology.on_one_host, Topology.over_tcp
PAIRS = Topology((0, 0, 1, 1, 2, 2, 3, 3))
TOPOLOGIES = [shm(1), shm(2), shm(5, remote_reads=True), tcp(2), tcp(5), PAIRS, Topology((0, 1, 1, 0, 2))]
each_topology = pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_on_one_host_small_all_reduces_move_whole_vectors_and_large_operations_use_registered_memory(size: int) -> None:
    for nbytes in (0, 1, 4, KIB):
        assert choose("all_reduce", nbytes, shm(size)).variant in ("one_shot", "whole")
    for op in set(OPS) - {"barrier"}:
        for nbytes in (64 * KIB, MIB, 64 * MIB):
            picked = choose(op, nbytes, shm(size))
            assert (picked.algorithm, picked.variant) == ("direct", "registered"), (op, nbytes)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_over_tcp_small_all_reduces_move_whole_vectors_and_large_operations_a_pipeline(size: int) -> None:
    for nbytes in (4, KIB):
        assert choose("all_reduce", nbytes, tcp(size)).variant in ("one_shot", "whole")
    for op in ("all_reduce", "reduce_scatter", "all_gather"):
        assert choose(op, 16 * MIB, tcp(size)).algorithm == "ring", op
    for op in ("broadcast", "reduce"):
        assert choose(op, 16 * MIB, tcp(size)).variant in ("pipelined", "double"), op


def test_over_tcp_many_ranks_take_a_number_of_steps_that_grows_with_the_logarithm() -> None:
    for op, nbytes in (("all_reduce", 4 * KIB), ("all_reduce", 64 * KIB), ("reduce_scatter", 64 * KIB), ("all_gather", 64 * KIB)):
        assert choose(op, nbytes, tcp(64)).algorithm in ("halving_doubling", "tree"), (op, nbytes)
    for op in ("broadcast", "reduce"):
        assert choose(op, 4, tcp(64)).picked.name == "tree (binomial)"
        assert choose(op, 4 * MIB, tcp(64)).picked.name == "tree (double)"


def test_several_ranks_a_host_fold_there_before_anything_crosses_the_network() -> None:
    for op in ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce"):
        assert choose(op, 16 * MIB, PAIRS).algorithm == "hierarchical", op
    for topology in (shm(8), tcp(8)):
        assert "hierarchical" not in {candidate.algorithm for candidate in candidates(choose("all_reduce", MIB, topology))}


def candidates(choice: Choice) -> tuple[object, ...]:
    return (choice.picked, *choice.alternatives)


def test_registered_memory_is_never_wanted_between_hosts() -> None:
    for op in OPS:
        for nbytes in (4, MIB):
            for topology in (tcp(4), PAIRS):
                assert "registered" not in {candidate.variant for candidate in candidates(choose(op, nbytes, topology, "direct"))}


def test_large_unregistered_vectors_are_read_where_they_lie_if_that_is_possible_and_faster() -> None:
    for op in sorted(set(OPS) - {"barrier"}):
        assert choose(op, 64 * MIB, shm(4)).fallback == "exchange"
        assert choose(op, 64 * MIB, shm(2, remote_reads=True), "direct").fallback == "exchange", op
    # Measured where ranks share no cache.
    fast = replace(SHM, read_s_per_byte=0.3 * SHM.beta_s_per_byte)
    for op in ("all_gather", "all_to_all", "broadcast", "gather", "scatter"):
        assert choose(op, 64 * MIB, replace(shm(4, remote_reads=True), near=fast), "direct").fallback == "remote", op
    # Small ones are not worth a call of the kernel.
    assert choose("all_gather", 4 * KIB, replace(shm(4, remote_reads=True), near=fast), "direct").fallback == "exchange"


def test_no_measurement_decides_how_a_fold_rounds() -> None:
    for read_s_per_byte in (0.0, 1.0):
        measured = replace(shm(4, remote_reads=True), near=replace(SHM, read_s_per_byte=read_s_per_byte))
        for op in sorted(FOLDING):
            for nbytes in (4 * KIB, MIB, 64 * MIB):
                usual = choose(op, nbytes, shm(4, remote_reads=True), "direct")
                assert choose(op, nbytes, measured, "direct").fallback == usual.fallback


def test_a_size_that_ranks_know_differently_has_one_fixed_choice() -> None:
    assert choose("all_to_all", -1, shm(4)).variant == "registered"
    assert choose("all_to_all", -1, tcp(4)).variant == "exchange"
    assert "all_to_all of uneven pieces on 4 ranks over shm" in str(choose("all_to_all", -1, shm(4)))


@given(
    op=st.sampled_from(OPS),
    size=st.integers(1, 24),
    nbytes=st.integers(0, 1 << 34),
    grouping=st.sampled_from([1, 2, 3, 24]),
    algorithm=st.sampled_from([None, "direct"]),
)
def test_the_choice_is_the_least_of_all_predictions_and_one_of_a_few_segment_counts(
    op: str, size: int, nbytes: int, grouping: int, algorithm: str | None
) -> None:
    choice = choose(op, nbytes, Topology(tuple(rank // grouping for rank in range(size))), algorithm)
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
    assert choose("all_reduce", nbytes, shm(4)) is choose("all_reduce", limit, shm(4))


def test_hosts_are_told_apart_and_not_by_their_number() -> None:
    assert Topology((7, 7, 3)) == Topology((0, 0, 1))
    assert choose("all_reduce", MIB, Topology((7, 7, 3))) is choose("all_reduce", MIB, Topology((1, 1, 0)))


def test_segments_are_of_about_a_quarter_mebibyte_until_there_are_128() -> None:
    for exponent in range(6, 34):
        choice = choose("all_reduce", 1 << exponent, tcp(2), "ring")
        segment_nbytes = (1 << exponent) / 2 / choice.segments
        if choice.segments == MAX_SEGMENTS:
            assert segment_nbytes >= SEGMENT_NBYTES / 2
        else:
            assert segment_nbytes <= SEGMENT_NBYTES
            assert choice.segments == 1 or segment_nbytes > SEGMENT_NBYTES / 2


@each_topology
def test_more_bytes_never_cost_less(topology: Topology) -> None:
    for op in OPS:
        costs = [choose(op, 1 << exponent, topology).cost.seconds for exponent in range(6, 31)]
        assert costs == sorted(costs), op


@each_topology
def test_every_choice_for_a_few_ranks_builds_schedules_that_keep_their_promise(topology: Topology) -> None:
    for op in OPS:
        for nbytes in (4, 100_000, 3 * MIB):
            choice = choose(op, nbytes, topology)
            name, size = (op, choice.algorithm, choice.variant), topology.size
            schedules = [build(*name, rank, size, choice.segments, root=0, fallback=choice.fallback, hosts=topology.hosts) for rank in range(size)]
            verify(op, schedules, nbytes // 4, align=16)


def test_the_explanation_names_the_pick_its_time_every_alternative_and_the_reason() -> None:
    text = str(choose("all_reduce", 64 * MIB, shm(2)))
    assert text.splitlines()[0] == "all_reduce of up to 64 MiB on 2 ranks over shm: direct (registered)"
    assert "predicted 4.48 ms: 2 steps, 0 B sent by a rank, 128 segments a chunk" in text
    assert "because it is predicted to be the fastest: the ranks work where the vectors lie" in text
    assert "vectors outside registered memory: sent through the transport" in text
    for alternative in ("ring (pipelined)", "direct (exchange)", "direct (one_shot)", "halving_doubling (chunks)", "tree (double)"):
        assert alternative in text
    assert "64 MiB sent by a rank, 128 segments a chunk, 3.26 times the time" in text
    assert "alpha 1 us a step" in text


@each_topology
def test_every_explanation_fits_its_lines(topology: Topology) -> None:
    for op in OPS:
        for nbytes in (4, 64 * MIB):
            text = str(choose(op, nbytes, topology))
            assert max(map(len, text.splitlines())) <= 160
            assert text.startswith(op)
    assert "model of shm: alpha 1 us" in str(choose("all_reduce", 4, PAIRS))
    assert "8 ranks of 4 hosts over shm and tcp" in str(choose("all_reduce", 4, PAIRS))


def test_an_explanation_of_a_wish_a_tie_a_lone_rank_and_of_a_barrier_says_so() -> None:
    assert "because algorithm='ring' was asked for" in str(choose("all_reduce", MIB, shm(4), "ring"))
    assert "nothing is faster, and it comes before direct (exchange) in the list" in str(choose("all_reduce", 16 * MIB, tcp(2)))
    assert "one rank has nobody to talk to" in str(choose("all_reduce", MIB, shm(1)))
    assert str(choose("barrier", 0, tcp(5))).startswith("barrier on 5 ranks over tcp: direct (dissemination)\n  predicted 18 us: 3 steps")


def test_unknown_names_are_refused_with_the_nearest_known() -> None:
    with pytest.raises(ConfigError, match="did you mean 'all_reduce'"):
        choose("all_reduse", 4, shm(2))
    with pytest.raises(ConfigError, match="did you mean 'ring'"):
        choose("all_reduce", 4, shm(2), "rinng")
    with pytest.raises(ConfigError, match=r"unknown algorithm 'ring'.* Known: direct"):
        choose("barrier", 0, shm(2), "ring")
    with pytest.raises(ConfigError, match="on 2 ranks over shm: hierarchical needs several hosts"):
        choose("all_reduce", 4, shm(2), "hierarchical")


@pytest.mark.parametrize("link", [SHM, TCP], ids=lambda link: link.name)
def test_a_message_nobody_waits_for_is_cheaper_than_one_that_is_waited_for_but_not_free(link: Link) -> None:
    assert link.alpha_s < link.latency_s(1, 4) < link.latency_s(4, 4) == 4 * link.alpha_s


def test_ranks_of_one_host_share_its_network_but_not_its_memory() -> None:
    def seconds(topology: Topology, *pairs: tuple[int, int]) -> float:
        return topology.seconds(pairs, MIB, rounds=0, messages=0)

    assert seconds(shm(4), (0, 1), (2, 3)) == seconds(shm(4), (0, 1)) == MIB * SHM.beta_s_per_byte
    two = Topology((0, 0, 1, 1))
    assert seconds(two, (0, 2), (1, 3)) == 2 * seconds(two, (0, 2)) == 2 * MIB * TCP.beta_s_per_byte
    assert seconds(two, (0, 2), (3, 1)) == seconds(two, (0, 2))  # both directions at once
    assert seconds(shm(4), *everyone(4)) == 3 * MIB * SHM.beta_s_per_byte
