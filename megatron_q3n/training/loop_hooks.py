"""LoopHooks: what a training loop gets from its session, and the parts of a step that both loops share.

The loops are `training/fit.py` and RL's in `stages/rl.py`; the session is `stages/session.py`. A loop handles neither
files nor health policies: it reports and records finished steps, saves when a save is due, and stops on request.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_q3n.training.callbacks import Callback, Verdict
from megatron_q3n.training.state import TrainState
from megatron_q3n.training.step import StepReport


class StepLog(Protocol):
    """The part of `metrics.recorder.Recorder` that a loop uses."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record one step's values."""

    def checkpointed(self, step: int) -> None:
        """Note that the checkpoint of this step is complete."""

    def note(self, message: str) -> None:
        """Show a message and write it to the run's log."""


@dataclass
class LoopResult:
    """How a loop ended. `stopped` is the reason of an early stop; None if all steps are done or `verdict` ended it."""

    stopped: str | None = None
    verdict: Verdict = "go_on"


@dataclass
class LoopHooks:
    """Recording, saving, stopping and callbacks of a training loop. Every rank calls every method in the same order."""

    state: TrainState
    recorder: StepLog
    callbacks: Callback
    save: Callable[[], object]
    """Begins a checkpoint; with checkpoint.asynchronous it is written in the background."""

    wait_for_save: Callable[[bool], list[int]]
    """Returns the steps whose checkpoint became complete since the last call; with True it waits for all that began."""

    stop_reason: Callable[[], str | None]
    """Returns the reason why this process must stop early (a signal or the time limit), or None."""

    order_batches: Callable[[Callable[[int], Iterator[Any]], int], Iterator[Any]]
    """Yields the batches from a step on, without those that a roll-back skips (health/batch_order.py)."""

    def finish_step(self, report: StepReport, seconds: float, data_seconds: float = 0.0) -> dict[str, float]:
        """Pass a finished step to the callbacks. Returns: their metrics."""
        report.step_seconds, report.data_seconds = seconds, data_seconds
        metrics = dict(self.callbacks.after_step(self.state.step, report) or {})
        if metrics:
            # a measurement may have taken long
            self.callbacks.heartbeat()
        return metrics

    def validated(self, metrics: dict[str, float]) -> None:
        """Pass a validation to the callbacks."""
        self.callbacks.after_validation(self.state.step, metrics)
        self.callbacks.heartbeat()

    def is_due(self, interval_steps: int) -> bool:
        """Whether something done every `interval_steps` (0: only at the end) is due after the step just done."""
        step, last = self.state.step, self.state.config.training.steps
        return step == last or (interval_steps > 0 and step % interval_steps == 0)

    def agreed_stop(self) -> str | None:
        """Return why the run stops early, if any process must stop; None after the last step. A collective call."""
        if self.state.step == self.state.config.training.steps:
            return None
        reason = self.stop_reason()
        if self.state.parallel.any(reason is not None):
            return reason or "another process received a stop request"
        return None

    def save_checkpoint(self) -> None:
        """Begin a checkpoint of the present state."""
        self.callbacks.before_save(self.state.step)
        self.save()
        self.callbacks.heartbeat()

    def report_saved(self, *, wait: bool) -> None:
        """Record the checkpoints that became complete; with `wait`, first wait for all that began."""
        for step in self.wait_for_save(wait):
            self.recorder.checkpointed(step)
            self.callbacks.after_save(step)
