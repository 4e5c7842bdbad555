"""Recorder of a run: the single entry point for all metrics and messages of a training loop.

It writes to the sinks (metrics.jsonl, wandb, the terminal) in a fixed order: metrics.jsonl first, because the wandb
sink reads from it and a resumed run truncates it. It also raises the alerts of each step. Only the leader writes; on
all other ranks the same calls do nothing.
"""

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.text import Text

from megatron_q3n.config import RunConfig
from megatron_q3n.metrics import jsonl, wandb_sink
from megatron_q3n.metrics.alerts import AlertDetector, num_experts
from megatron_q3n.metrics.names import STEP, TIME, TOKENS, check
from megatron_q3n.metrics.progress import Progress

RECORDS_FILE = "metrics.jsonl"
EVENTS_FILE = "logs/events.log"

Status = Literal["done", "stopped", "failed"]


class Recorder:
    """Recorder of the steps `first_step`…`total_steps` of one run directory.

    Steps count from 1. A new run has first_step=1. A run resumed from the checkpoint of step S has first_step=S+1, and
    records of an earlier process after S are removed.
    """

    def __init__(self, run_dir: Path, config: RunConfig, *, first_step: int, total_steps: int, enabled: bool) -> None:
        """Open the sinks.

        Raises: UserError if the directory cannot be written or the wandb mode is not available.
        """
        assert 1 <= first_step <= total_steps + 1, (first_step, total_steps)
        self.enabled = enabled
        self._next_step = first_step
        if enabled:
            self._open(run_dir, config, first_step, total_steps)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record one step. Call once per step, in order, with metric names of `metrics/names.py`.

        `values` must contain "tokens"; "step" and "time" are added. Metrics measured between steps (a validation)
        belong to the preceding step.
        """
        if not self.enabled:
            return
        assert step == self._next_step, f"step {step} logged, step {self._next_step} expected"
        assert TOKENS in values, f"step {step} logged without {TOKENS!r}: the x axis of every panel"
        for name in values:
            check(name)
        self._next_step += 1
        self._records.append({STEP: step, TIME: time.time(), **values})
        if self._wandb and self._wandb.online:
            self._wandb.follow(step)
        self._progress.update(step, values)
        for alert in self._alerts.update(step, values):
            self.note(f"alert at step {step}: {alert.kind}: {alert.message}")
            if self._wandb:
                self._wandb.alert(alert)

    def checkpointed(self, step: int) -> None:
        """Mark all steps up to `step` as covered by a checkpoint: a resume will not repeat them."""
        if not self.enabled:
            return
        self._records.sync()
        if self._wandb:
            self._wandb.follow(step)

    def note(self, message: str, in_color: Text | None = None) -> None:
        """Show a message above the progress bar and append it to logs/events.log with a timestamp.

        `in_color` is the message as it is shown; a console that is no terminal prints it without color.
        """
        if not self.enabled:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            with self._events_path.open("a", encoding="utf-8") as file:
                file.writelines(f"{now} {line}\n" for line in message.splitlines())
        except OSError as error:
            raise jsonl.cannot_write(self._events_path, error) from error
        self._progress.message(message if in_color is None else in_color)

    def close(self, status: Status) -> None:
        """Close the sinks and send the remaining records to wandb; "stopped" runs can be resumed."""
        if not self.enabled:
            return
        self.enabled = False
        self._progress.close()
        self._records.sync()
        self._records.close()
        if self._wandb:
            self._wandb.follow(self._next_step - 1)
            self._wandb.close(exit_code=1 if status == "failed" else 0)

    def _open(self, run_dir: Path, config: RunConfig, first_step: int, total_steps: int) -> None:
        self._records = jsonl.open_at(run_dir / RECORDS_FILE, first_step - 1)
        self._events_path = run_dir / EVENTS_FILE
        self._events_path.parent.mkdir(exist_ok=True)
        show_live = config.logging.progress
        console = Console(force_terminal=show_live or None)
        self._progress = Progress(
            console,
            live=console.is_terminal and show_live is not False,
            first_step=first_step,
            total_steps=total_steps,
            interval_steps=config.logging.interval_steps,
        )
        if self._records.cut_lines:
            self.note(
                f"metrics.jsonl: truncated to step {first_step - 1} ({self._records.cut_lines} lines removed); "
                "these steps run again"
            )
        self._alerts = AlertDetector(config.alerts, num_experts(config.model.model_dump()))
        for record in jsonl.read(self._records.path):
            self._alerts.update(int(record[STEP]), record)
        self._wandb = wandb_sink.open_sink(run_dir, config, self._records.path, self.note)
        self._progress.start()
