"""Callbacks: extensions of a training run that are called at named moments of the loop.

A run is extended by a subclass of `Callback` in a package of the user, named in the recipe:

    callbacks:
      - path: my_package.my_module.MyCallback
        arguments: {interval_steps: 100}

Every training stage (pretrain, longcontext, sft, mtp, rl) calls the same moments. The health monitor
(health/monitor.py), the instruments (instruments/instruments.py) and the position in RL's prompts (stages/rl.py) are
callbacks too; they are called before those of the recipe, which follow in its order.

All moments are called on every rank, in the same order, so a moment may communicate. They must not draw random numbers
from the global generators of torch, numpy or Python: the run uses these, so a resumed run would differ.
"""

import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_q3n.config import UserError
from megatron_q3n.config.callbacks import CallbackConfig
from megatron_q3n.metrics import names

if TYPE_CHECKING:
    from collections.abc import Callable

    from megatron_q3n.training.state import TrainState
    from megatron_q3n.training.step import StepReport

Verdict = Literal["go_on", "roll_back", "stop"]
"""What happens after a step: the next one, a return to the newest checkpoint, or the end of the run with code 2."""

RunStatus = Literal["done", "stopped", "failed"]


@dataclass(frozen=True)
class RunContext:
    """The run that a callback belongs to."""

    state: "TrainState"
    """Configuration, model chunks, optimizer, schedule, process groups (`state.parallel`), and `state.step`."""

    run_dir: Path
    note: "Callable[[str], None]"
    """Writes a line to the terminal and to logs/events.log; on ranks other than 0 it does nothing."""


class Callback:
    """Base class of callbacks: override the moments that are needed, the others do nothing.

    The constructor gets the recipe's `arguments`. It runs before process groups and model exist; set up in
    `on_run_start`.
    """

    verdict: Verdict = "go_on"
    """Read after this callback's `after_step`. With "roll_back" or "stop" the step is not recorded and no further
    callback sees it. Only the health monitor sets it; to withhold an update, return False from `before_update`."""

    def on_run_start(self, run: RunContext) -> None:
        """Set up. Called once per process, with the first weights in place, before the first step."""

    def after_load(self, step: int) -> None:
        """Update internal state to the loaded step. Called at start, after `on_run_start`, and again after every
        roll-back; `step` optimizer steps are done, 0 for fresh weights."""

    def before_step(self, step: int) -> None:
        """Prepare for a step. Called with the number of the step that begins, from 1, before its forward pass; in RL
        after the rollout."""

    def before_update(self, step: int, loss: float, grad_norm: float) -> bool | None:
        """Decide on an update. Called after the backward pass and before clipping and the optimizer.

        `loss` (nats per token; in RL the policy loss) and `grad_norm` are of the global batch and the same on every
        rank.
        Returns: False to withhold the update, which then counts in the metric skipped_steps; the same on every rank.
        """

    def after_step(self, step: int, report: "StepReport") -> Mapping[str, float] | None:
        """Inspect a finished step. Called after the optimizer, with the device synchronized; `report` also holds this
        rank's micro-batches.

        Returns: metrics to record with the step; those of rank 0 are written. A name is `custom/<name>`, or one of
        metrics/names.py.
        """

    def after_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Inspect a validation (in RL the evaluation on held-out prompts): its metrics, the same on every rank."""

    def before_save(self, step: int) -> None:
        """Write what belongs to the checkpoint of this step. Called before the state is copied; the state may not be
        changed."""

    def after_save(self, step: int) -> None:
        """React to a complete checkpoint. Called once the checkpoint of `step` is verified and in place; with
        checkpoint.asynchronous some steps later."""

    def on_rollback(self, step: int) -> None:
        """Prepare for a return to the checkpoint of `step`. Called before its weights are loaded."""

    def on_stop(self, reason: str) -> None:
        """React to an early end: a signal, the time limit, or a bad step with policy `stop`. Except for the latter,
        everything is saved."""

    def on_run_end(self, status: RunStatus) -> None:
        """Clean up. Called once per process at an orderly end: all steps done, stopped early, or failed on a bad step.
        Not called when the run crashes."""

    def heartbeat(self) -> None:
        """Register progress, for hang detection. Called after every long operation other than the step itself: a
        validation, a save, a measurement, and while RL generates (then on this rank alone: do not communicate)."""


class CallbackList(Callback):
    """Several callbacks as one; each moment is passed on in order."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self._callbacks = list(callbacks)

    @property
    def verdict(self) -> Verdict:  # type: ignore[override]
        """The first verdict that is not "go_on"."""
        verdicts = (callback.verdict for callback in self._callbacks)
        return next((verdict for verdict in verdicts if verdict != "go_on"), "go_on")

    def on_run_start(self, run: RunContext) -> None:
        """Forward the call to every callback."""
        for callback in self._callbacks:
            callback.on_run_start(run)

    def after_load(self, step: int) -> None:
        """Forward the call to every callback."""
        for callback in self._callbacks:
            callback.after_load(step)

    def before_step(self, step: int) -> None:
        """Forward the call to every callback."""
        for callback in self._callbacks:
            callback.before_step(step)

    def before_update(self, step: int, loss: float, grad_norm: float) -> bool:
        """Call every callback. Returns: False if any of them withholds the update."""
        decisions = [callback.before_update(step, loss, grad_norm) for callback in self._callbacks]
        return all(decision is not False for decision in decisions)

    def after_step(self, step: int, report: "StepReport") -> dict[str, float]:
        """Collect the callbacks' metrics, up to the first callback whose verdict ends the session.

        Raises: UserError for a metric without a name in metrics/names.py.
        """
        metrics: dict[str, float] = {}
        for callback in self._callbacks:
            metrics |= _checked(callback, callback.after_step(step, report) or {})
            if callback.verdict != "go_on":
                break
        return metrics

    def after_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Forward the call to every callback."""
        for callback in self._callbacks:
            callback.after_validation(step, metrics)

    def before_save(self, step: int) -> None:
        """Forward the call to every callback."""
        for callback in self._callbacks:
            callback.before_save(step)

    def after_save(self, step: int) -> None:
        """Forward the call to every callback."""
        for callback in self._callbacks:
            callback.after_save(step)

    def on_rollback(self, step: int) -> None:
        """Forward the call to every callback."""
        for callback in self._callbacks:
            callback.on_rollback(step)

    def on_stop(self, reason: str) -> None:
        """Forward the call to every callback."""
        for callback in self._callbacks:
            callback.on_stop(reason)

    def on_run_end(self, status: RunStatus) -> None:
        """Forward the call to every callback."""
        for callback in self._callbacks:
            callback.on_run_end(status)

    def heartbeat(self) -> None:
        """Forward the call to every callback."""
        for callback in self._callbacks:
            callback.heartbeat()


def load_callbacks(settings: list[CallbackConfig]) -> list[Callback]:
    """Import and construct the callbacks of a recipe.

    Raises: UserError naming the setting, if a class cannot be imported, is no Callback, or rejects its arguments.
    """
    return [_load(f"callbacks[{index}]", setting) for index, setting in enumerate(settings)]


def _load(where: str, setting: CallbackConfig) -> Callback:
    module_name, _, class_name = setting.path.rpartition(".")
    where = f"{where}: path={setting.path}"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{where} cannot be imported: {error}. Give the import path of a class (my_package.my_module.MyCallback) "
            "in a package that is installed, on PYTHONPATH, or in the working folder."
        ) from None
    kind = getattr(module, class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, Callback)):
        allowed = [name for name, value in vars(module).items() if _is_own_callback(module_name, value)]
        raise UserError(
            f"{where} is not a subclass of megatron_q3n.training.callbacks.Callback; {module_name} defines "
            f"{', '.join(allowed) or 'none'}. Correct the path, or derive the class from Callback."
        )
    try:
        inspect.signature(kind).bind(**setting.arguments)
    except TypeError as error:
        raise UserError(
            f"{where} does not take arguments={setting.arguments}: {error}. It takes "
            f"{class_name}{inspect.signature(kind)}; change `arguments`."
        ) from None
    return kind(**setting.arguments)


def _is_own_callback(module_name: str, value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Callback) and value.__module__ == module_name


def _checked(callback: Callback, metrics: Mapping[str, float]) -> dict[str, float]:
    for name in metrics:
        if names.find(name) is None:
            raise UserError(
                f"callback {type(callback).__module__}.{type(callback).__name__}: after_step returned the metric "
                f"{name!r}. Allowed are {names.CUSTOM}<name> with letters, digits and _-./, and the names of "
                "megatron_q3n/metrics/names.py; rename it."
            )
    return {name: float(value) for name, value in metrics.items()}
