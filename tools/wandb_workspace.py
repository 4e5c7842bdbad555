#!/usr/bin/env python
"""A wandb workspace with the panels of report.html, grouped, with tokens on the x axis.

tools/wandb_workspace.py --entity TEAM --project megatron_q3n       saves it and prints its URL
tools/wandb_workspace.py --project megatron_q3n --print             prints it without saving

Requires wandb-workspaces (version in requirements-dev.txt), and a login to save (`wandb login`).
"""

import argparse
import importlib.util
import json
import sys

from megatron_q3n.config import EXIT_BAD_INPUT
from megatron_q3n.metrics.workspace import build_workspace


def main() -> int:
    """Build the workspace, and save or print it."""
    arguments = _parse()
    if importlib.util.find_spec("wandb_workspaces") is None:
        return _refuse(
            "wandb-workspaces is not installed: .venv/bin/pip install wandb-workspaces (requirements-dev.txt has the "
            "tested version)"
        )
    workspace = build_workspace(arguments.entity or "", arguments.project, arguments.name)
    if arguments.print:
        print(json.dumps(_outline(workspace), indent=1))
        return 0
    if not arguments.entity:
        return _refuse("--entity is missing: the user or team of the project")
    import wandb  # late: takes half a second, and only saving needs it

    try:
        workspace.save()
    except (wandb.errors.Error, wandb.errors.CommError, ValueError, OSError) as error:
        return _refuse(
            f"wandb did not take the workspace ({error}). Run `wandb login`, check the network, and that the project "
            f"{arguments.entity}/{arguments.project} exists (a run creates it)."
        )
    print(workspace.url)
    return 0


def _outline(workspace: object) -> dict[str, list[dict[str, object]]]:
    """Return the sections with each panel's title and metrics."""
    return {
        section.name: [
            {
                "title": panel.title,
                "metrics": getattr(panel, "metric_regex", None) or getattr(panel, "y", None) or panel.media_keys,
            }
            for panel in section.panels
        ]
        for section in workspace.sections  # type: ignore[attr-defined]
    }


def _refuse(message: str) -> int:
    print(message, file=sys.stderr)
    return EXIT_BAD_INPUT


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--entity", help="user or team")
    parser.add_argument("--project", default="megatron_q3n", help="logging.wandb.project")
    parser.add_argument("--name", default="megatron_q3n", help="of the workspace view")
    parser.add_argument("--print", action="store_true", help="print it instead of saving it")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
