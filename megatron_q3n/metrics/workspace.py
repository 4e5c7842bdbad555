"""wandb workspace with the report's panels: sections in the report's order, tokens as the x axis.

The only file that imports `wandb_workspaces`. Saving needs the wandb server; building does not, so tests cover
everything up to saving. The command is `tools/wandb_workspace.py`.
"""

from typing import Any

from megatron_q3n.metrics import names
from megatron_q3n.metrics.names import TOKENS
from megatron_q3n.metrics.report.panels import EXPERTS, MORE, PANELS, SECTIONS, Panel
from megatron_q3n.metrics.wandb_sink import EXPERT_LOAD_IMAGE

OTHERS = "Reinforcement learning and other metrics"


def build_workspace(entity: str, project: str, name: str) -> Any:
    """Return an unsaved workspace; `.save()` uploads it, after which `.url` is its address.

    Raises: ImportError if wandb-workspaces is not installed.
    """
    # imported here: optional, and it imports wandb
    import wandb_workspaces.workspaces as ws

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
    """Return the panels of each section; metrics of the table without a report panel come last."""
    import wandb_workspaces.reports.v2 as wr

    panels = {section: [_plot(panel) for panel in PANELS if panel.section == section] for section in SECTIONS}
    panels[EXPERTS].append(wr.MediaBrowser(title="Expert load", media_keys=[EXPERT_LOAD_IMAGE]))
    covered = {metric for panel in PANELS for metric in panel.metrics}
    others = [m for m in names.METRICS if m.name not in covered and m.group != "progress"]
    return {**panels, OTHERS: [_plot(Panel(OTHERS, m.name, (m.name,))) for m in others]}


def _plot(panel: Panel) -> Any:
    """Return a line plot; metric names with a placeholder become a regular expression."""
    import wandb_workspaces.reports.v2 as wr

    options: dict[str, Any] = {"y": list(panel.metrics)}
    if any(placeholder in metric for metric in panel.metrics for placeholder in names.PLACEHOLDERS):
        options = {"metric_regex": pattern(panel.metrics)}
    if panel.smoothed:
        options |= {"smoothing_type": "gaussian", "smoothing_factor": 5, "smoothing_show_original": True}
    return wr.LinePlot(
        title=panel.title,
        x=TOKENS,
        title_x="tokens",
        title_y=_unit(panel),
        ignore_outliers=panel.clip_outliers or None,
        layout=wr.Layout(w=8, h=6),
        **options,
    )


def pattern(metrics: tuple[str, ...]) -> str:
    """Return a regular expression that matches the names of these rows of the table."""
    return f"^({'|'.join(map(names.expression, metrics))})$"


def _unit(panel: Panel) -> str | None:
    name = panel.metrics[0]
    for placeholder in names.PLACEHOLDERS:
        name = name.replace(placeholder, "0")
    metric = names.find(name)
    return None if metric is None or metric.unit == "1" else metric.unit
