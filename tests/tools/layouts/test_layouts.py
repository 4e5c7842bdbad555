"""Parallel layouts: each trains as one process does, step by step, and a run resumes unchanged in another layout.

One program for all: megatron-core is imported once and forked. Six steps in fp32 with MTP, balance loss and masked
targets, two rows per micro-batch; loss, MTP losses and balance losses within 1e-5, gradient norms within 1e-4, at every
step. A resumed run (weights, optimizer, expert loads, step) is compared with the run that saved, over the three steps
after the save. Packed documents, longer lists and other models: test_more_layouts.py. bf16 and GPUs are not covered.
"""

from collections.abc import Callable
from typing import Any

import pytest

from tools.checks.check_layout import LAYOUTS, RESHARDS

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def verdicts(check_layouts: Callable[..., Any]) -> Any:
    return check_layouts("--all", "--reshard", "--masked", "0.3", "--steps", "6")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_as_one_process_does(verdicts: Any, layout: str) -> None:
    assert verdicts[layout]["ok"], verdicts[layout]


@pytest.mark.parametrize("pair", RESHARDS)
def test_run_resumes_in_another_layout(verdicts: Any, pair: str) -> None:
    name = " → ".join(pair.split(":"))
    assert verdicts[name]["ok"], verdicts[name]
