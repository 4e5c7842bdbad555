"""What the loop needs of instruments that look inside the model: the side of `instruments` that `fit` sees.

A stage that measures nothing lends `Unmeasured`.
"""

from typing import Any, Protocol

from megatron_q3n.training.step import StepReport


class Measuring(Protocol):
    """`instruments.Instruments` is one."""

    def before_step(self) -> None:
        """A step begins."""

    def after_step(self, batches: list[Any], report: StepReport) -> dict[str, float]:
        """A step on these micro-batches is done; return what was measured. A collective call."""


class Unmeasured:
    """A loop without instruments."""

    def before_step(self) -> None:
        """Nothing is wanted of the step."""

    def after_step(self, batches: list[Any], report: StepReport) -> dict[str, float]:
        """Add nothing."""
        return {}
