"""The report's panels as a wandb workspace, made by code: sections in the report's order, tokens on every x axis.

The only file that imports `wandb_workspaces`. Saving needs wandb's server; building does not, so what would be saved
is tested here. `tools/wandb_workspace.py` is the command.
"""

import re
from typing import Any

from megatron_q3n.metrics import names
from megatron_q3n.metrics.names import TOKENS
from megatron_q3n.metrics.report.panels import EXPERTS, MORE, PANELS, SECTIONS, Panel
from megatron_q3n.metrics.wandb_sink import EXPERT_LOAD_PICTURE

OTHERS = "Reinforcement learning and others"


def build_workspace(entity: str, project: str, name: str) -> Any:
    """Return an unsaved workspace; `.save()` sends it and `.url` says where it is then.

    Raises: ImportError where wandb-workspaces is not installed.
    """
    import wandb_workspaces.workspaces as ws  # late: optional, and it imports wandb

    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(name=section, panels=panels, is_open=section not in (MORE, OTHERS))
            for section, panels in sections().items()
            if panels
        ],
        settings=ws.WorkspaceSettings(x_axis=TOKENS),
    )


def sections() -> dict[str, list[Any]]:
    """Return the panels of each section; the table's metrics that the report has no panel for come last."""
    import wandb_workspaces.reports.v2 as wr  # late, as above

    found = {section: [_plot(panel) for panel in PANELS if panel.section == section] for section in SECTIONS}
    found[EXPERTS].append(wr.MediaBrowser(title="Expert load", media_keys=[EXPERT_LOAD_PICTURE]))
    covered = {metric for panel in PANELS for metric in panel.metrics}
    rest = [m for m in names.METRICS if m.name not in covered and m.group != "progress"]
    return {**found, OTHERS: [_plot(Panel(OTHERS, m.name, (m.name,))) for m in rest]}


def _plot(panel: Panel) -> Any:
    """Return a line plot; a metric with a place for a number in its name becomes a pattern."""
    import wandb_workspaces.reports.v2 as wr  # late, as above

    how: dict[str, Any] = {"y": list(panel.metrics)}
    if any("<k>" in metric for metric in panel.metrics):
        how = {"metric_regex": pattern(panel.metrics)}
    if panel.noisy:
        how |= {"smoothing_type": "gaussian", "smoothing_factor": 5, "smoothing_show_original": True}
    return wr.LinePlot(
        title=panel.title,
        x=TOKENS,
        title_x="tokens",
        title_y=_unit(panel),
        ignore_outliers=panel.usual_range or None,
        layout=wr.Layout(w=8, h=6),
        **how,
    )


def pattern(metrics: tuple[str, ...]) -> str:
    """Return a regular expression for the names of these rows."""
    each = [re.escape(metric).replace(re.escape("<k>"), r"\d+") for metric in metrics]
    return f"^({'|'.join(each)})$"


def _unit(panel: Panel) -> str | None:
    metric = names.find(panel.metrics[0].replace("<k>", "0"))
    return None if metric is None or metric.unit == "1" else metric.unit
