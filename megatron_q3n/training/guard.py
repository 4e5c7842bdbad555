"""The last question before an update: are this step's loss and gradient sound?

megatron-core's optimizer computes the gradient's norm, clips, and then calls `step_with_ready_grads`; the
guard stands there. Loss and norm are the same on every rank by then, and so is the answer. A withheld update leaves
weights and moments as they were, and `train_step` counts it as skipped. What is sound is for others to say
(`health/judge.py`).
"""

from collections.abc import Callable
from typing import Any

from megatron_q3n.training.state import TrainState

Admit = Callable[[int, float, float], bool]
"""(number of the step, its loss in nats per token, its gradient norm) -> may the update be made?"""


class UpdateGuard:
    """Asks `admit` before every update of a TrainState; made once, it stays."""

    def __init__(self, state: TrainState, admit: Admit) -> None:
        self._state, self._admit = state, admit
        optimizer: Any = state.optimizer
        self._norm, self._update = optimizer.get_grad_norm, optimizer.step_with_ready_grads
        self._last_norm = float("nan")
        optimizer.get_grad_norm = self._remember_norm
        optimizer.step_with_ready_grads = self._update_if_admitted
        for chunk in state.chunks:
            # megatron-core's own check raises before anyone can be asked, and takes every bucket's norm a second time
            chunk.ddp_config.check_for_nan_in_grad = False

    def _remember_norm(self) -> Any:
        norm = self._norm()
        self._last_norm = 0.0 if norm is None else float(norm)
        return norm

    def _update_if_admitted(self) -> bool:
        admitted = self._admit(self._state.step + 1, self._state.loss, self._last_norm)
        return self._update() if admitted else False
