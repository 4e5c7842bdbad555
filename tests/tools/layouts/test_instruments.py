"""Instruments in every layout: their numbers are global, equal to those of one process within 1e-4 relative.

Four steps in fp32 with MTP and masked targets, measured at steps 1, 2 and 4. One run of the layout check measures the
whole global batch; in another, two replicas measure the part of it that one process does.
"""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]

LAYOUTS = ["tp2", "pp2", "pp2-vpp2", "ep2", "dp2-overlap", "cp2", "cp2-passing", "tp2-etp2", "tp2-pp2"]
PACKED = ["cp2", "cp2-passing", "tp2"]
OPTIONS = ["--steps", "4", "--masked", "0.3", "instruments.interval_steps=2"]


@pytest.fixture(scope="module")
def verdicts(check_layouts: Callable[..., Any]) -> Any:
    return check_layouts(*LAYOUTS, *OPTIONS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_are_those_of_one_process(verdicts: Any, layout: str) -> None:
    assert 0 < verdicts[layout]["inside"] <= 1e-4, verdicts[layout]
    assert verdicts[layout]["ok"], verdicts[layout]


def test_two_replicas_measure_the_rows_that_one_process_does(check_layouts: Callable[..., Any]) -> None:
    """The first 4 of 8 rows: two micro-batches of one process, one of each replica."""
    verdict = check_layouts("dp2", *OPTIONS, "instruments.global_rows=4")["dp2"]
    assert 0 < verdict["inside"] <= 1e-4, verdict


@pytest.mark.slow
@pytest.mark.parametrize("layout", PACKED)
def test_with_packed_documents(check_layouts: Callable[..., Any], layout: str) -> None:
    verdict = check_layouts(layout, "--packed", *OPTIONS)[layout]
    assert 0 < verdict["inside"] <= 1e-4, verdict
