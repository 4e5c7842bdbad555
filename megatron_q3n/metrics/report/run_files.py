"""Reader of run directories for the report: any file may be missing or incomplete, as after a killed run."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.metrics import jsonl
from megatron_q3n.metrics.recorder import RECORDS_FILE

CONFIG_FILE = "config.yaml"
EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class RunFiles:
    """Contents of a run directory. A missing file is None; an unreadable one is also listed in `damaged`."""

    path: Path
    records: list[jsonl.Record]
    config_text: str | None
    config: dict[str, Any]
    environment: Any
    samples: Any
    expert_load: Any
    baseline: Any
    evaluation: Any
    summary: dict[str, Any]
    damaged: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the run, which is that of its directory."""
        return self.path.resolve().name

    @property
    def total_steps(self) -> int | None:
        """Number of steps in the configuration, or None."""
        steps = self.config.get("training", {}).get("steps")
        return steps if isinstance(steps, int) else None


def load(run_dir: Path) -> RunFiles:
    """Read a run directory.

    Raises: UserError if the directory does not exist or has neither metrics.jsonl nor config.yaml.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such directory. Give a run directory, e.g. runs/latest.")
    if not (run_dir / RECORDS_FILE).exists() and not (run_dir / CONFIG_FILE).exists():
        raise UserError(
            f"{run_dir}: not a run directory (it has neither {RECORDS_FILE} nor {CONFIG_FILE}). "
            "Give the directory of a run, e.g. runs/latest."
        )
    damaged: dict[str, str] = {}
    config_text = _text(run_dir / CONFIG_FILE)
    summary = _json(run_dir / "summary.json", damaged)
    return RunFiles(
        path=run_dir,
        records=jsonl.read(run_dir / RECORDS_FILE),
        config_text=config_text,
        config=_config(config_text, damaged),
        environment=_json(run_dir / "environment.json", damaged),
        samples=_json(run_dir / "samples.json", damaged),
        expert_load=_json(run_dir / "expert_load.json", damaged),
        baseline=_json(run_dir / "baseline.json", damaged),
        evaluation=_json(run_dir / EVALUATION_FILE, damaged),
        summary=summary if isinstance(summary, dict) else {},
        damaged=damaged,
    )


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return {"training.steps": 100, …} of a nested tree; a list is a leaf."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def not_default(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that differ from the defaults of this version of the code."""
    # without validation, because the defaults may be invalid with this process's WORLD_SIZE
    defaults = flatten(RunConfig.model_construct().model_dump(mode="json"))
    missing = object()
    return {name: value for name, value in flatten(config).items() if name and defaults.get(name, missing) != value}


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None


def _json(path: Path, damaged: dict[str, str]) -> Any:
    text = _text(path)
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        damaged[path.name] = str(error)
        return None


def _config(text: str | None, damaged: dict[str, str]) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text or "")
    except yaml.YAMLError as error:
        damaged[CONFIG_FILE] = str(error)
        return {}
    return tree if isinstance(tree, dict) else {}
