"""Layout: its grammar, what it refuses, and the arithmetic of its constraints."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringfold.collectives.errors import LayoutError
from ringfold.parallel.layout import AXES, BUILT, CP_ALGORITHMS, PRECISIONS, SCHEDULES, Layout

WORLDS = (1, 2, 3, 4, 6, 7, 8, 12, 16, 24, 64)
small = st.integers(1, 12)
layouts = st.builds(
    Layout,
    dp=st.none() | small,
    tp=small,
    pp=small,
    schedule=st.sampled_from(sorted(SCHEDULES)),
    virtual_stages=st.integers(1, 4),
    cp=small,
    cp_algorithm=st.sampled_from(CP_ALGORITHMS),
    ep=small,
    zero=st.integers(0, 3),
    offload=st.sampled_from([None, "cpu", "nvme=/fast/disk", "nvme=D"]),
    zero_group=st.none() | small,
    precision=st.sampled_from(PRECISIONS),
    recompute=st.sampled_from([None, "full", "selective", "budget=1536", "budget=3KiB", "budget=2GiB", "budget=1TiB"]),
    micro=small,
    exact=st.none() | small,
)


@given(layouts, st.randoms())
def test_text_is_the_inverse_of_parse_in_any_order_of_words(layout: Layout, random) -> None:
    words = str(layout).split()
    random.shuffle(words)
    assert Layout.parse("  ".join(words)) == layout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Layout()),
        ("dp3", Layout(dp=3)),
        ("tp2 dp3", Layout(dp=3, tp=2)),
        ("pp4", Layout(pp=4)),
        ("pp4:1f1b:1", Layout(pp=4)),
        ("pp4:gpipe", Layout(pp=4, schedule="gpipe")),
        ("pp2:interleaved", Layout(pp=2, schedule="interleaved", virtual_stages=2)),
        ("pp2:interleaved:3", Layout(pp=2, schedule="interleaved", virtual_stages=3)),
        ("cp2:ring", Layout(cp=2)),
        ("cp2:ulysses", Layout(cp=2, cp_algorithm="ulysses")),
        ("ep4", Layout(ep=4)),
        ("zero0", Layout()),
        ("zero2", Layout(zero=2)),
        ("zero3:cpu", Layout(zero=3, offload="cpu")),
        ("zero3:nvme=/Fast/Disk:group4", Layout(zero=3, offload="nvme=/Fast/Disk", zero_group=4)),
        ("zero1:group4", Layout(zero=1, zero_group=4)),
        ("fp32", Layout()),
        ("bf16", Layout(precision="bf16")),
        ("recompute", Layout(recompute="full")),
        ("recompute:selective", Layout(recompute="selective")),
        ("recompute:budget=2048MiB", Layout(recompute="budget=2GiB")),
        ("recompute:budget=1500", Layout(recompute="budget=1500")),
        ("micro8", Layout(micro=8)),
        ("exact8", Layout(exact=8)),
        ("dp2 tp2 pp2:1f1b zero2 bf16 micro8", Layout(dp=2, tp=2, pp=2, zero=2, precision="bf16", micro=8)),
    ],
)
def test_every_word_of_the_grammar_is_read(text: str, expected: Layout) -> None:
    assert Layout.parse(text) == expected
    assert Layout.parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tq2", 'did you mean "tp2"?'),
        ("ddp4", 'did you mean "dp4"?'),
        ("DP4", 'did you mean "dp4"?'),
        ("dp=4", 'did you mean "dp4"?'),
        ("mirco8", 'did you mean "micro8"?'),
        ("bf61", 'did you mean "bf16"?'),
        ("recomputed:selective", 'did you mean "recompute:selective"?'),
        ("hello", "the words are dpN"),
        ("dp", "it takes a number"),
        ("zero", "it takes a number"),
        ("dp0", "at least 1"),
        ("dp-2", '"dp-2"'),
        ("dp2.5", '"dp2.5"'),
        ("dp99999999999999999999", '"dp99999999999999999999"'),
        ("zero4", "one of 0, 1, 2, 3"),
        ("zero3:gpu", 'did you mean "cpu"?'),
        ("zero3:cpu:nvme=x", "does not belong here"),
        ("zero3:nvme=", "DIR"),
        ("pp2:1fb1", 'did you mean "1f1b"?'),
        ("pp2:1f1b:x", "not a number"),
        ("pp2:1f1b:0", "at least 1"),
        ("pp2:1f1b:1:1", "does not belong here"),
        ("cp2:rung", 'did you mean "ring"?'),
        ("tp2:fast", "does not belong here"),
        ("bf16:x", "does not belong here"),
        ("recompute:budget=0", "at least 1 byte"),
        ("recompute:budget=lots", "budget=BYTES"),
        ("dp2 dp4", 'already given by "dp2"'),
        ("fp32 bf16", 'already given by "fp32"'),
    ],
)
def test_a_word_that_is_wrong_is_named_with_what_was_meant(text: str, said: str) -> None:
    with pytest.raises(LayoutError) as caught:
        Layout.parse(text)
    assert said in str(caught.value)
    assert f'"{text}"' in str(caught.value)
    assert caught.value.exit_code == 2


def test_all_wrong_words_are_named_at_once() -> None:
    with pytest.raises(LayoutError) as caught:
        Layout.parse("dp2 tq2 micro0 zero9 bf16 cp2:rung")
    for word in ('"tq2"', "micro is 0", "zero is 9", '"cp2:rung"'):
        assert word in str(caught.value)
    assert "bf16" not in "".join(str(caught.value).splitlines()[1:])


def test_a_layout_made_by_hand_is_held_to_the_same_ranges() -> None:
    with pytest.raises(LayoutError, match=r"dp is 0[\s\S]*precision is fp31"):
        Layout(dp=0, precision="fp31")
    with pytest.raises(LayoutError, match="write it budget=1GiB"):
        Layout(recompute="budget=1024MiB")


def test_a_layout_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Layout(dp=2).dp = 3  # type: ignore[misc]
    assert {Layout(dp=2): 1}[Layout.parse("dp2")] == 1


def test_the_arithmetic_of_a_world_that_does_not_fit_is_shown_with_one_that_does() -> None:
    assert Layout.parse("dp2 tp2 pp2").check(6) == ['dp2 x tp2 x pp2 needs 8 workers, world_size is 6. Try "dp3 tp2", or start with -n 8.']
    assert Layout.parse("tp2 pp2").check(6) == ['tp2 x pp2 needs a multiple of 4 workers, world_size is 6. Try "dp3 tp2", or start with -n 8.']
    assert Layout.parse("dp3").check(2) == ['dp3 needs 3 workers, world_size is 2. Try "dp2", or start with -n 3.']


@given(layouts, st.sampled_from(WORLDS))
def test_the_layout_suggested_for_a_world_fits_it(layout: Layout, world_size: int) -> None:
    problem = layout._world_problem(world_size)
    if problem:
        text, start = problem.split('Try "')[1].split('", or start with -n ')
        assert Layout.parse(text).check(world_size) == []
        assert layout._world_problem(int(start.rstrip("."))) is None


def test_every_violated_constraint_is_returned_at_once() -> None:
    problems = Layout.parse("tp4 pp3:interleaved micro2 ep5 exact8 zero0:cpu cp2:ulysses").check(
        25, {"num_attention_heads": 6, "num_key_value_heads": 4, "n_layer": 2, "num_experts": 3}
    )
    expected = [
        "tp4 x pp3 x cp2 needs a multiple of 24 workers, world_size is 25",
        "tp does not go with exact",
        "cp does not go with exact",
        "ep5 must divide dp x cp = 1 x 2 = 2",
        "zero0 shards nothing",
        "needs a multiple of pp 3 microbatches, micro is 2. Try micro3",
        "exact8 runs 8 / dp 1 = 8 microbatches on each rank, not 2",
        "tp4 must divide the model's 6 attention heads. Try tp2",
        "3 x 2 = 6 stages need as many layers, the model has 2",
        "ep5 must divide the model's 3 experts",
    ]
    assert len(problems) == len(expected)
    for problem, start in zip(problems, expected, strict=True):
        assert start in problem


@pytest.mark.parametrize(
    ("text", "world_size", "problem"),
    [
        ("ep3", 4, "ep3 must divide dp x cp = 4 x 1 = 4. Try ep1"),
        ("zero1:group3", 4, "zero group3 must divide dp x cp = 4 x 1 = 4. Try group1"),
        ("exact8", 3, "exact8 sums over ranks in pairs, so dp must be a power of two, not 3. Try dp2"),
        ("pp2:1f1b:2", 2, "schedule 1f1b has 1 virtual stage per rank, not 2"),
        ("pp2:interleaved:1 micro2", 2, "nothing to interleave"),
    ],
)
def test_each_constraint_is_checked(text: str, world_size: int, problem: str) -> None:
    (found,) = Layout.parse(text).check(world_size)
    assert problem in found


@pytest.mark.parametrize(
    "text", ["", "dp4", "tp2", "tp2 pp2", "cp4 ep4 zero3:group2", "exact8", "exact8 micro2", "pp2:interleaved micro4", "pp2:zbv"]
)
def test_a_layout_that_fits_has_no_problem(text: str) -> None:
    assert Layout.parse(text).check(4, {"num_attention_heads": 4, "n_layer": 4, "num_experts": 4}) == []


def test_dp_fills_what_is_left_of_the_world() -> None:
    assert Layout.parse("tp2 pp3").resolve(24) == Layout(dp=4, tp=2, pp=3)
    assert Layout().resolve(7) == Layout(dp=7)
    with pytest.raises(LayoutError, match="needs a multiple of 6 workers"):
        Layout.parse("tp2 pp3").resolve(8)
    with pytest.raises(LayoutError, match=r"does not fit:\n.*needs 2 workers[\s\S]*zero0 shards nothing"):
        Layout.parse("dp2 zero0:cpu").resolve(3)
    with pytest.raises(LayoutError, match="leaves dp open"):
        _ = Layout().sizes


def test_what_is_not_built_is_refused_by_one_error_that_lists_it_all() -> None:
    layout = Layout.parse("dp2 tp2 pp2:gpipe cp2:ulysses ep2 zero2:cpu fp8 recompute micro4 exact8")
    refused = ["pp2:gpipe", "ep2"]
    assert layout.unsupported() == refused
    with pytest.raises(LayoutError) as caught:
        layout.require_built()
    assert ", ".join(refused) in str(caught.value)
    assert "bf16 cpN dpN exactN fp16 fp32 fp64 fp8 microN offload recompute tpN" in str(caught.value)


@pytest.mark.parametrize("text", ["", "dp4", "dp2 tp1 pp1:gpipe cp1 ep1 zero0 fp64 micro8", "fp32", "recompute:budget=1GiB"])
def test_what_is_built_is_not_refused(text: str) -> None:
    assert Layout.parse(text).unsupported() == []
    Layout.parse(text).require_built()


def test_every_feature_that_is_built_is_one_that_layouts_ask_for() -> None:
    every = "dp2 tp2 pp2 cp2 ep2 zero3:cpu:group2 fp64 recompute micro2 exact2"
    asked = {need for text in [every, "zero1", "zero2", "zero3", *PRECISIONS] for _, needs in Layout.parse(text)._words() for need in needs}
    assert asked >= BUILT - {"fp32"}


@pytest.mark.parametrize("text", ["dp3", "dp2 tp2", "dp2 tp3 pp2 cp2", "tp2 pp3 dp1"])
def test_coordinate_and_rank_are_inverses_with_tp_fastest(text: str) -> None:
    layout = Layout.parse(text)
    coordinates = [layout.coordinate(rank) for rank in range(layout.world_size)]
    assert [layout.rank_at(coordinate) for coordinate in coordinates] == list(range(layout.world_size))
    assert coordinates == sorted(coordinates, key=lambda c: (c["pp"], c["dp"], c["cp"], c["tp"]))
    assert tuple(layout.sizes) == AXES
    assert Layout.parse(" ".join(reversed(text.split()))).coordinate(1) == coordinates[1]


def test_every_field_shows_in_the_text() -> None:
    other = Layout.parse("dp2 tp2 pp2:interleaved:3 cp2:ulysses ep2 zero3:cpu:group2 bf16 recompute micro2 exact2")
    for field in fields(Layout):
        changed = replace(Layout(), **{field.name: getattr(other, field.name)})
        assert str(changed) != str(Layout()), field.name


@pytest.mark.parametrize(("text", "nbytes"), [("", None), ("recompute", None), ("recompute:budget=3KiB", 3072), ("recompute:budget=1500", 1500)])
def test_a_recompute_budget_is_told_in_bytes(text: str, nbytes: int | None) -> None:
    assert Layout.parse(text).recompute_budget == nbytes


def test_layout_does_not_import_torch() -> None:
    subprocess.run([sys.executable, "-c", "import ringfold.parallel.layout, sys; assert 'torch' not in sys.modules"], check=True)


def test_pairs_that_do_not_go_together_are_refused_with_the_reason_each() -> None:
    from ringfold.parallel.strategy import REFUSED

    words = {"exact": "exact8", "tp": "tp2", "cp": "cp2", "fp8": "fp8"}
    for refusal in REFUSED:
        problems = Layout.parse(f"dp2 {words[refusal.one]} {words[refusal.other]}").check(4)
        assert problems == [f"{refusal.one} does not go with {refusal.other}: {refusal.reason}."]
