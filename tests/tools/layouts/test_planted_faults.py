"""Planted faults: the layout check detects each omitted reduction or wait within four steps, and no other faults."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import forked

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Any]:
    script = Path(__file__).with_name("planted_faults.py")
    done = forked.run(script, seconds=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_without_a_fault_nothing_is_reported(verdicts: dict[str, Any]) -> None:
    assert verdicts.pop("none")["ok"]


def test_every_fault_is_detected(verdicts: dict[str, Any]) -> None:
    faults = {fault: verdict for fault, verdict in verdicts.items() if fault != "none"}
    assert len(faults) == 6
    for fault, verdict in faults.items():
        assert not verdict["ok"], fault
        # that one is refused when the checkpoint is loaded
        if "checkpoint" not in fault:
            assert not verdict["failed"], f"{fault}: did not run, so nothing was compared"
