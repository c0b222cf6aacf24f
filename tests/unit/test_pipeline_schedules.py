"""Pipeline schedules are proven and cost what is published: bubbles, activations; what is wrong with one's own is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from ringfold.collectives.errors import ConfigError
from ringfold.parallel.pipeline.drawing import draw_png, draw_text
from ringfold.parallel.pipeline.schedule import Schedule, Step
from ringfold.parallel.pipeline.schedules import SCHEDULES, least_micro, make_schedule
from ringfold.parallel.pipeline.simulation import Costs, simulate

RANKS = [1, 2, 3, 4, 8]
# (p, m, v) -> idle time over ideal time where F = I = W
BUBBLES = {
    "gpipe": lambda p, m, _: (p - 1) / m,
    "1f1b": lambda p, m, _: (p - 1) / m,
    "interleaved": lambda p, m, v: (p - 1) / (m * v),
    "zbh1": lambda p, m, _: (p - 1) / m / 3,
    "zbv": lambda *_: 0.0,
    "dualpipev": lambda p, m, _: (p - 1) / (6 * m),  # of 6 units a microbatch: what its first paired backward waits for
}
# the most activations that a rank holds, in microbatches of one stage
PEAKS = {
    "gpipe": lambda _, m, __: m,
    "1f1b": lambda p, *_: p,
    "interleaved": lambda p, _, v: v * p + p - 1,  # p (1 + (p - 1) / (p v)) of a rank's v stages
    "zbh1": lambda p, *_: p,
    "zbv": lambda p, *_: 2 * p,  # of half as large stages
    "dualpipev": lambda p, *_: 2 * p + 1,
}


def virtual(name: str) -> list[int]:
    return [2, 3] if name == "interleaved" else [1]


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_bubbles_and_activations_are_those_published(name: str, p: int) -> None:
    for m in (2 * p, 3 * p, 4 * p):
        for v in virtual(name):
            schedule = make_schedule(name, p, m, v)
            schedule.prove()
            found = simulate(schedule)
            assert found.bubble == pytest.approx(BUBBLES[name](p, m, v), abs=1e-12)
            assert max(found.peaks) <= PEAKS[name](p, m, v)
            assert all(schedule.stages_of(rank) for rank in range(p))


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_number_of_microbatches_from_the_least_on_is_proven(name: str, p: int) -> None:
    for m in range(least_micro(name, p), 3 * p + 2, p if name == "interleaved" else 1):
        for v in virtual(name):
            make_schedule(name, p, m, v).prove()


def test_1f1b_holds_fewer_activations_the_later_the_rank() -> None:
    assert simulate(make_schedule("1f1b", 4, 9)).peaks == (4, 3, 2, 1)


def test_other_costs_change_times_and_no_order() -> None:
    found = simulate(make_schedule("zbh1", 4, 8), Costs(forward=1.0, inputs=1.5, weights=0.5))
    assert found.makespan - found.ideal == pytest.approx(3 * (1.0 + 2.0 - 2 * 0.5))  # (p - 1)(F + B - 2W), B the whole backward
    slower = simulate(make_schedule("1f1b", 2, 4), message=0.25)
    # Rank 0: F0, F1 until 2; B0 comes back at 1.25 + 1 + 2 + 0.25 = 4.5. From there one message is waited for in each of three rounds.
    assert slower.makespan == 16.0


def lists(text: str) -> list[list[Step]]:
    return [[Step.parse(word) for word in line.split()] for line in text.strip().splitlines()]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0F0 0B0 0F1 0B1\n1F0 1B0 1F1", ["the gradient of what stage 1 is given by microbatch 1 is computed 0 times"]),
        ("0F0 0F0 0B0\n1F0 1B0", ["0F0 is done 2 times"]),
        ("0B0 0F0\n1F0 1B0", ["rank 0 cannot do 0B0, its step 0", "rank 1 cannot do 1F0"]),
        ("0F0 0F1 0B1 0B0\n1F0 1B0 1F1 1B1", []),
        ("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1", ["rank 0 cannot do 0B0, its step 1: 0I0".replace("0I0", "1I0"), "rank 1 cannot do 1F1"]),
        ("0F0 0I0\n1F0 1B0", ["the gradient of the parameters of stage 0 by microbatch 0 is computed 0 times"]),
        ("0F0 0W0 0I0\n1F0 1B0", ["rank 0 cannot do 0W0"]),
    ],
)
def test_what_is_wrong_with_a_schedule_is_said_in_full(text: str, said: list[str]) -> None:
    schedule = Schedule.of_steps("mine", lists(text))
    if not said:
        schedule.prove()
        return
    with pytest.raises(ConfigError) as caught:
        schedule.prove()
    assert all(part in str(caught.value) for part in said), caught.value


def test_a_stage_on_two_ranks_and_a_cell_that_is_no_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage 0 is on ranks \[0, 1\]"):
        Schedule.of_steps("mine", lists("0F0\n0B0 1F0"))
    (tmp_path / "mine.csv").write_text("0F0,0X0\n")
    with pytest.raises(ConfigError, match="'0X0' is no step; write stage, kind"):
        Schedule.from_csv(tmp_path / "mine.csv")


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_is_written_is_read_again(name: str, tmp_path: Path) -> None:
    schedule = make_schedule(name, 4, 8, 2 if name == "interleaved" else 1)
    schedule.to_csv(tmp_path / f"{name}.csv")
    assert Schedule.from_csv(tmp_path / f"{name}.csv") == schedule


def test_dropping_any_step_is_noticed() -> None:
    for name in SCHEDULES:
        schedule = make_schedule(name, 2, 4, 2 if name == "interleaved" else 1)
        for rank, of_rank in enumerate(schedule.steps):
            for place in range(len(of_rank)):
                steps = [list(one) for one in schedule.steps]
                del steps[rank][place]
                broken = Schedule(name, schedule.ranks, schedule.micro, tuple(map(tuple, steps)))
                with pytest.raises(ConfigError):
                    broken.prove()


def test_a_picture_of_1f1b() -> None:
    assert draw_text(simulate(make_schedule("1f1b", 2, 3))).splitlines() == [
        "rank 0  F0 F1 .. .. B0 B0 F2 B1 B1 .. B2 B2",
        "rank 1  .. F0 B0 B0 F1 B1 B1 F2 B2 B2 .. ..",
        "33.3% of the time of the longest rank is idle; ranks hold at most 2, 1 activations",
    ]


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in SCHEDULES:
        simulation = simulate(make_schedule(name, 4, 8, 2 if name == "interleaved" else 1))
        lines = draw_text(simulation).splitlines()
        assert [line.split("  ")[0] for line in lines[:4]] == [f"rank {rank}" for rank in range(4)]
        assert len({len(line) for line in lines[:4]}) <= 2
        draw_png(simulation, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
