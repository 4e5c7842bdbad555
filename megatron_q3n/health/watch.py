"""The judge, the order of batches, the hang watch and the straggler report, as the training loop calls them."""

import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from megatron_q3n.config import RunConfig, launch
from megatron_q3n.health import batch_order
from megatron_q3n.health.hang import HangWatch
from megatron_q3n.health.judge import Judge, Trouble
from megatron_q3n.health.stragglers import OwnTime, Stragglers
from megatron_q3n.parallel import Parallel


class Watch:
    """Watches one run on one rank. Every rank calls every method in the same order, `beat` excepted.

    One object serves a whole process, however often it goes back to a checkpoint.
    """

    def __init__(self, config: RunConfig, group: Parallel, run_dir: Path, *, is_cuda: bool, hooks: Any) -> None:
        """Watch the run in `run_dir`; `hooks` is megatron-core's config, which OwnTime listens at."""
        self._config, self._settings = config, config.health
        self._group, self._run_dir = group, run_dir
        host = launch.node_name() or platform.node()
        self._judge = Judge(config.health)
        self._hang = HangWatch(config.health, run_dir, group.rank, host)
        self._stragglers = Stragglers(config.health, group, run_dir, host)
        self._own_time = OwnTime(is_cuda, hooks)
        self._note: Callable[[str], None] = print
        self._trouble: Trouble | None = None
        self._roll_backs: list[dict[str, Any]] = []

    def begin(self, past: list[tuple[float, float]], note: Callable[[str], None]) -> None:
        """Take up a run that took `past` steps, (loss, gradient norm) of the newest; `note` speaks for it.

        What the leader knows of them rules.
        """
        self._note = note
        self._trouble = None
        known = json.dumps([past, batch_order.read(self._run_dir)]) if self._group.is_leader else None
        past, self._roll_backs = json.loads(self._group.from_leader(known))
        self._judge.remember((loss, norm) for loss, norm in past)

    def start(self) -> None:
        """Begin to look for hangs, before the checkpoint is loaded."""
        self._hang.start()

    def stop(self) -> None:
        """Look for hangs no longer: what follows the last step has no pace. Safe to call twice."""
        self._hang.stop()

    def batches[Batch](self, source: Callable[[int], Iterator[Batch]], first_step: int) -> Iterator[Batch]:
        """Yield the batches of the steps from `first_step` on, without those left out."""
        return self._order().batches(source, first_step)

    def beat(self, step_seconds: float | None = None) -> None:
        """Say that this process is alive."""
        self._hang.beat(step_seconds)

    def before_step(self) -> None:
        """Start this rank's own clock."""
        self._own_time.start()

    def admit(self, step: int, loss: float, norm: float) -> bool:
        """Say whether the update of this step may be made; asked after the backward pass."""
        self._trouble = self._judge.examine(step, loss, norm)
        return self._trouble is None

    def after_step(self, step: int, data_seconds: float) -> dict[str, float]:
        """Tell the log of a bad step, compare the ranks, and return metrics."""
        self._stragglers.add(self._own_time.seconds(), data_seconds)
        metrics = self._stragglers.compare(step, self._note)
        trouble = self._trouble
        if trouble is not None and trouble.action == "skip":
            self._note(f"step {step}: {trouble.what}: update withheld (health.{trouble.kind}=skip)")
        if self._roll_backs:
            metrics["roll_backs"] = len(self._roll_backs)
        return metrics

    @property
    def verdict(self) -> Literal["go_on", "roll_back", "stop"]:
        """What to do after the step just taken."""
        if self._trouble is None or self._trouble.action == "skip":
            return "go_on"
        if self._trouble.action == "roll_back" and len(self._roll_backs) < (self._settings.max_roll_backs):
            return "roll_back"
        return "stop"

    def why_stopped(self) -> str:
        """Return the message for a run that stops here."""
        trouble = self._trouble
        assert trouble is not None
        reason = f"health.{trouble.kind}={getattr(self._settings, trouble.kind)}"
        if trouble.action == "roll_back":
            reason = f"health.max_roll_backs={self._settings.max_roll_backs} are used up"
        return (
            f"step {trouble.step}: {trouble.what}. The run stops ({reason}); its update was withheld and the newest "
            f"checkpoint is untouched. To go on over it: resume {self._run_dir} with health.{trouble.kind}=skip or "
            "roll_back."
        )

    def leave_out(self, back_to: int) -> None:
        """Write down that the run goes back to the checkpoint of step `back_to`, without the bad batch."""
        trouble = self._trouble
        assert trouble is not None
        order, taken = self._order(), range(back_to, trouble.step)
        numbers = [order.batch_of(step) for step in taken][-self._settings.leave_out_batches :]
        numbers = [number % self._config.training.steps for number in numbers]
        entry = {
            "step": trouble.step,
            "kind": trouble.kind,
            "what": trouble.what,
            "back_to": back_to,
            "batches": numbers,
        }
        self._roll_backs.append(entry)
        if self._group.is_leader:
            batch_order.write(self._run_dir, self._roll_backs)
        self._note(
            f"step {trouble.step}: {trouble.what}: going back to step {back_to}, leaving out batch "
            f"{', '.join(map(str, numbers))} (health.{trouble.kind}=roll_back, "
            f"{len(self._roll_backs)} so far)"
        )
        self._group.barrier()

    def _order(self) -> batch_order.BatchOrder:
        return batch_order.BatchOrder(batch_order.left_out(self._roll_backs), self._config.training.steps)
