"""Two processes, and four, draw the samples that one does, think the same of them, and learn the same from them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.rl.layout_ranks import LAYOUTS, world_of


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rl")
    done = subprocess.run(
        [sys.executable, "-m", "tests.rl.layout_ranks", str(folder)],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def found(folder: Path, layout: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{layout}-{rank}.json").read_text())


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_layout_does_what_one_process_does(left: Path, layout: str) -> None:
    wanted = found(left, "single")
    for rank in range(world_of(layout)):
        mine = found(left, layout, rank)
        assert mine.get("drawn", wanted["drawn"]) == wanted["drawn"]
        assert mine.get("routes", wanted["routes"]) == wanted["routes"]
        for old, expected in zip(mine["old"], wanted["old"], strict=True):
            assert old == pytest.approx(expected, abs=2e-5)
        assert mine["mismatch"][0] < 1e-4
        assert max(mine["mismatch"][1:]) == 0.0
        for values, expected in zip(mine["learnt"], wanted["learnt"], strict=True):
            assert values == pytest.approx(expected, rel=2e-3, abs=2e-5)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_single_process_learnt_something(left: Path) -> None:
    """Else the comparison above would show little: answers and scores differ, and the second update is off-policy."""
    wanted = found(left, "single")
    assert len({tuple(tokens) for _, tokens, _, _ in wanted["drawn"]}) > 6
    assert len({advantage for *_, advantage in wanted["drawn"]}) > 3
    (_, _, first_ratio, *_), (_, second_norm, second_ratio, *_) = wanted["learnt"]
    assert first_ratio == pytest.approx(1, abs=1e-6)
    assert abs(second_ratio - 1) > 1e-4
    assert second_norm > 0
