"""A model that does not fit under zero0 trains under a layout that shards it: each rank has a limit of memory that the kernel enforces."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from tests.cli import launching
from tests.harness.cgroups import MemoryGroups, missing_feature

RANK = Path(__file__).with_name("limited_rank.py")
DEADLINE_S = 100.0  # for a job: it imports torch on ranks that share few cores
_missing = functools.cache(missing_feature)


def train(groups: MemoryGroups, ranks: int, layout: str, losses: Path) -> tuple[int, str]:
    """Train in these groups and return exit code and verdict."""
    arguments = ["run", "-n", str(ranks), "--layout", layout, str(RANK), groups.prefix, str(losses)]
    code, out, err = launching.finish(launching.start(*arguments), DEADLINE_S)
    return code, out + err


@pytest.mark.slow
@pytest.mark.timeout(4 * DEADLINE_S)
@pytest.mark.parametrize(("ranks", "layout"), [(4, "zero3"), (1, "zero3:nvme=DIR")])
def test_with_two_thirds_of_what_zero0_needs_zero0_is_killed_and_this_layout_trains_to_the_same_losses(
    ranks: int, layout: str, tmp_path: Path
) -> None:
    reason = _missing()
    if reason is not None:
        pytest.skip(reason)
    with MemoryGroups(ranks) as free:
        code, said = train(free, ranks, "zero0", tmp_path / "zero0")
        assert code == 0, said
        limit = min(free.peaks()) * 2 // 3
    with MemoryGroups(ranks, limit) as bounded:
        code, said = train(bounded, ranks, "zero0", tmp_path / "killed")
        assert any(bounded.killed()), said
        assert code == 137, said
        assert "was killed by SIGKILL (out of memory?" in said
    (disk := tmp_path / "disk").mkdir()
    with MemoryGroups(ranks, limit) as bounded:
        code, said = train(bounded, ranks, layout.replace("DIR", str(disk)), tmp_path / "sharded")
        assert code == 0, f"{said}\nlimit {limit}, charged {bounded.peaks()}"
        assert max(bounded.peaks()) <= limit
    expected, found = (json.loads((tmp_path / name).read_text()) for name in ("zero0", "sharded"))
    assert found == pytest.approx(expected, rel=1e-6)
