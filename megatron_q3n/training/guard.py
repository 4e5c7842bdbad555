"""UpdateGuard: the check between a step's backward pass and its update, which may withhold the update.

megatron-core's optimizer computes the gradient norm, clips, and calls `step_with_ready_grads`; the guard wraps that
call. By then loss and norm are the same on every rank, and so is the decision. A withheld update leaves weights and
moments unchanged, and `train_step` counts the step as skipped. The decision is the callbacks'
(`Callback.before_update`), foremost the health monitor's (health/step_check.py).
"""

from collections.abc import Callable
from typing import Any

from megatron_q3n.training.state import TrainState

BeforeUpdate = Callable[[int, float, float], bool | None]
"""(number of the step, loss in nats per token, gradient norm) -> False to withhold the update."""


class UpdateGuard:
    """Calls `before_update` before every update of a TrainState. Installed once, for the lifetime of the state."""

    def __init__(self, state: TrainState, before_update: BeforeUpdate) -> None:
        self._state, self._before_update = state, before_update
        optimizer: Any = state.optimizer
        self._grad_norm, self._update = optimizer.get_grad_norm, optimizer.step_with_ready_grads
        self._last_norm = float("nan")
        optimizer.get_grad_norm = self._record_norm
        optimizer.step_with_ready_grads = self._update_if_allowed
        for chunk in state.chunks:
            # megatron-core's own check raises before a policy can apply, and computes every bucket's norm again
            chunk.ddp_config.check_for_nan_in_grad = False

    def _record_norm(self) -> Any:
        norm = self._grad_norm()
        self._last_norm = 0.0 if norm is None else float(norm)
        return norm

    def _update_if_allowed(self) -> bool:
        is_withheld = self._before_update(self._state.step + 1, self._state.loss, self._last_norm) is False
        return False if is_withheld else self._update()
