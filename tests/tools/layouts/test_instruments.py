"""Instruments in every layout: their numbers are global, equal to those of one process within 1e-4 relative.

One run of the layout check; all micro-batches are measured, since the default, each data-parallel rank's first, is a
different sample in each layout. Four steps in fp32 with MTP and masked targets, measured at steps 1, 2 and 4.
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


@pytest.mark.slow
@pytest.mark.parametrize("layout", PACKED)
def test_with_packed_documents(check_layouts: Callable[..., Any], layout: str) -> None:
    verdict = check_layouts(layout, "--packed", *OPTIONS)[layout]
    assert 0 < verdict["inside"] <= 1e-4, verdict
