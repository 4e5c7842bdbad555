"""What the loop tells of itself while it runs, and what it is told: the side of `health` that `fit` sees.

The loop knows no policy; it asks after every step whether to go on. A stage that watches nothing lends `Unwatched`.
"""

from collections.abc import Callable, Iterator
from typing import Literal, Protocol

Verdict = Literal["go_on", "roll_back", "stop"]


class Watch(Protocol):
    """What the loop needs of a watch over its health; `health.watch.Watch` is one."""

    def batches[Item](self, source: Callable[[int], Iterator[Item]], first_step: int) -> Iterator[Item]:
        """Yield the batches of the steps from `first_step` on; `source(n)` yields batch n and the next ones."""

    def beat(self, step_seconds: float | None = None) -> None:
        """This process is alive; after a step, how long it took."""

    def before_step(self) -> None:
        """A step begins."""

    def after_step(self, step: int, data_seconds: float) -> dict[str, float]:
        """A step is done; return what it adds to the step's metrics."""

    @property
    def verdict(self) -> Verdict:
        """What to do after the step just taken."""


class Unwatched:
    """A loop without a watch: every batch in its order, and nothing is ever wrong."""

    verdict: Verdict = "go_on"

    def batches[Item](self, source: Callable[[int], Iterator[Item]], first_step: int) -> Iterator[Item]:
        """Yield every batch."""
        return source(first_step)

    def beat(self, step_seconds: float | None = None) -> None:
        """Nobody listens."""

    def before_step(self) -> None:
        """No clock runs."""

    def after_step(self, step: int, data_seconds: float) -> dict[str, float]:
        """Add nothing."""
        return {}
