"""HealthMonitor: the callback that detects bad steps, hangs and slow ranks, and applies the health policies.

Called at the moments of `training/callbacks.py`, in pretraining as in RL. `stages/session.py` starts and stops it and
carries out its verdict.
"""

import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_q3n.config import RunConfig, launch
from megatron_q3n.health import batch_order
from megatron_q3n.health.hang import HangDetector
from megatron_q3n.health.step_check import BadStep, StepCheck
from megatron_q3n.health.stragglers import RankTimer, Stragglers
from megatron_q3n.parallel import Parallel
from megatron_q3n.training.callbacks import Callback, Verdict
from megatron_q3n.training.step import StepReport


class HealthMonitor(Callback):
    """Health of one run on one rank. Every rank calls every method in the same order, except `heartbeat`.

    A process uses one object for the whole run, across all roll-backs.
    """

    def __init__(
        self,
        config: RunConfig,
        group: Parallel,
        run_dir: Path,
        note: Callable[[str], None],
        *,
        is_cuda: bool,
        model_config: Any,
    ) -> None:
        """Monitor the run in `run_dir`.

        `note` writes to the run's log. `model_config` is megatron-core's TransformerConfig, whose
        `finalize_model_grads_func` the timer wraps.
        """
        self._config, self._settings = config, config.health
        self._group, self._run_dir, self._note = group, run_dir, note
        host = launch.node_name() or platform.node()
        self._step_check = StepCheck(config.health)
        self._hang = HangDetector(config.health, run_dir, group.rank, host)
        self._stragglers = Stragglers(config.health, group, run_dir, host)
        self._rank_timer = RankTimer(is_cuda, model_config)
        self._bad_step: BadStep | None = None
        self._roll_backs: list[dict[str, Any]] = []

    def start(self) -> None:
        """Start hang detection; before the checkpoint is loaded."""
        self._hang.start()

    def stop(self) -> None:
        """Stop hang detection, because what follows the last step has no known duration. Safe to call twice."""
        self._hang.stop()

    def set_history(self, past_steps: list[tuple[float, float]]) -> None:
        """Set (loss, gradient norm) of the newest recorded steps, and read the run's roll-backs; the leader's count.

        A collective call.
        """
        self._bad_step = None
        history = json.dumps([past_steps, batch_order.read(self._run_dir)]) if self._group.is_leader else None
        past_steps, self._roll_backs = json.loads(self._group.from_leader(history))
        self._step_check.set_history((loss, grad_norm) for loss, grad_norm in past_steps)

    def order_batches[Batch](self, source: Callable[[int], Iterator[Batch]], first_step: int) -> Iterator[Batch]:
        """Yield the batches of the steps from `first_step` on, without skipped ones; `source(n)` starts at batch n."""
        return self._order().batches(source, first_step)

    def heartbeat(self) -> None:
        """Reset the hang detector's clock."""
        self._hang.heartbeat()

    def before_step(self, step: int) -> None:
        """Start this rank's timer."""
        self._rank_timer.start()

    def before_update(self, step: int, loss: float, grad_norm: float) -> bool:
        """Withhold the update of a bad step."""
        self._bad_step = self._step_check.check(step, loss, grad_norm)
        return self._bad_step is None

    def after_step(self, step: int, report: StepReport) -> dict[str, float]:
        """Log a withheld update, compare the ranks' times, and return metrics."""
        self._hang.heartbeat(report.step_seconds)
        self._stragglers.add(self._rank_timer.seconds(), report.data_seconds)
        metrics = self._stragglers.compare(step, self._note)
        bad_step = self._bad_step
        if bad_step is not None and bad_step.action == "skip":
            self._note(f"step {step}: {bad_step.description}: update withheld (health.{bad_step.kind}=skip)")
        if self._roll_backs:
            metrics["roll_backs"] = len(self._roll_backs)
        return metrics

    @property
    def verdict(self) -> Verdict:  # type: ignore[override]
        """The policy's action after the step just done."""
        if self._bad_step is None or self._bad_step.action == "skip":
            return "go_on"
        if self._bad_step.action == "roll_back" and len(self._roll_backs) < self._settings.max_roll_backs:
            return "roll_back"
        return "stop"

    def stop_message(self) -> str:
        """Return the message for the verdict "stop"."""
        bad_step = self._bad_step
        assert bad_step is not None
        reason = f"health.{bad_step.kind}={getattr(self._settings, bad_step.kind)}"
        if bad_step.action == "roll_back":
            reason = f"health.max_roll_backs={self._settings.max_roll_backs} are used up"
        return (
            f"step {bad_step.step}: {bad_step.description}. The run stops ({reason}); its update was withheld and the "
            f"newest checkpoint is untouched. To continue past this step, resume {self._run_dir} with "
            f"health.{bad_step.kind}=skip or roll_back."
        )

    def on_rollback(self, step: int) -> None:
        """Record the roll-back to the checkpoint of `step`, and the batches to skip from now on."""
        bad_step = self._bad_step
        assert bad_step is not None
        order, steps = self._order(), range(step, bad_step.step)
        numbers = [order.batch_of(number) for number in steps][-self._settings.skip_batches :]
        numbers = [number % self._config.training.steps for number in numbers]
        self._roll_backs.append(
            {
                "step": bad_step.step,
                "kind": bad_step.kind,
                "what": bad_step.description,
                "back_to": step,
                "batches": numbers,
            }
        )
        if self._group.is_leader:
            batch_order.write(self._run_dir, self._roll_backs)
        self._note(
            f"step {bad_step.step}: {bad_step.description}: going back to step {step}, leaving out batch "
            f"{', '.join(map(str, numbers))} (health.{bad_step.kind}=roll_back, "
            f"{len(self._roll_backs)} so far)"
        )
        self._group.barrier()

    def _order(self) -> batch_order.BatchOrder:
        return batch_order.BatchOrder(batch_order.skipped_batches(self._roll_backs), self._config.training.steps)
