"""wandb workspace before saving: the report's panels, names from the metric table, tokens as the x axis.

Not covered: saving to a server.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("wandb_workspaces", reason="optional: tools/wandb_workspace.py")

from megatron_q3n.metrics import names
from megatron_q3n.metrics.report.panels import PANELS, SECTIONS
from megatron_q3n.metrics.workspace import OTHERS, build_workspace, pattern

TOOL = Path(__file__).parents[2] / "tools/wandb_workspace.py"


def test_the_workspace_before_saving() -> None:
    workspace = build_workspace("team", "project", "name")
    assert [section.name for section in workspace.sections] == [*SECTIONS[:-1], OTHERS]
    spec = workspace._to_model().model_dump(by_alias=True, exclude_none=True)["spec"]
    plots = [p for s in spec["section"]["panelBankConfig"]["sections"] for p in s["panels"]]
    shown = " ".join(json.dumps(plot["config"]) for plot in plots)
    assert "experts/load" in shown
    for plot in plots:
        if plot["viewType"] == "Run History Line Plot":
            assert plot["config"]["xAxis"] == "tokens", plot
            assert plot["config"].get("metrics") or plot["config"].get("metricRegex"), plot
            for name in plot["config"].get("metrics", []):
                names.check(name)
    titles = [plot["config"].get("chartTitle") for plot in plots]
    assert {panel.title for panel in PANELS} <= set(titles)


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("experts/dead_layer_11", True),
        ("experts/dead_mtp", True),
        ("experts/dead", False),
        ("experts/dead_layer_11x", False),
    ],
)
def test_patterns_match_their_rows_only(name: str, fits: bool) -> None:
    expression = pattern(("experts/dead_layer_<k>", "experts/dead_mtp"))
    assert bool(re.search(expression, name)) is fits


def test_the_tool_prints_and_fails_without_a_login(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"NETRC": str(tmp_path / "none"), "HOME": str(tmp_path)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOL), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    outline = json.loads(run("--print").stdout)
    assert "Attention weight on the first token" in [p["title"] for p in outline["Attention and activations"]]
    refused = run("--entity", "nobody")
    assert refused.returncode == 2
    assert "wandb did not take the workspace" in refused.stderr
    assert "Traceback" not in refused.stderr
