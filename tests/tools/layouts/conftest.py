"""Fixture that runs the layout check (tools/checks/check_layout.py) in another process, since it forks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import forked

ROOT = Path(__file__).parents[3]

Verdicts = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def check_layouts(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Verdicts]:
    """Return a function that runs the check and returns its verdicts by layout; its output is printed."""

    def check(*arguments: str) -> Verdicts:
        figures = tmp_path_factory.mktemp("layouts") / "figures.json"
        tool = ROOT / "tools/checks/check_layout.py"
        done = forked.run(tool, *arguments, "--json", figures, seconds=1100)
        print(done.stdout, done.stderr)
        verdicts = json.loads(figures.read_text())["verdicts"]
        return {verdict["layout"]: verdict for verdict in verdicts}

    return check
