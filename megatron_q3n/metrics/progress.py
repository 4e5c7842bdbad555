"""Progress display: one live line on a terminal, plain lines in a log file.

On a narrow terminal the live line drops its least important parts first. It is redrawn only when a step is logged,
never by a background thread: data loader workers fork, and a lock held by such a thread would stay locked in the child.
"""

import time
from collections.abc import Callable, Mapping

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_q3n.metrics.meters import StepTimer

MIN_BAR_COLUMNS = 10
REDRAW_SECONDS = 0.25

# priority (0 is dropped last), label, value
Part = tuple[int, str, str]


class Progress:
    """Display of each step: a live line if `live`, else one line every `interval_steps` and at every validation."""

    def __init__(
        self,
        console: Console,
        *,
        live: bool,
        first_step: int,
        total_steps: int,
        interval_steps: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._step, self._first_step, self._total_steps = first_step - 1, first_step, total_steps
        self._interval_steps = interval_steps
        self._clock = clock
        self._timer = StepTimer(window_steps=100, clock=clock)
        self._shown: dict[str, float] = {}
        self._drawn = -REDRAW_SECONDS
        self._live = Live(self, console=console, auto_refresh=False) if live else None

    def start(self) -> None:
        """Start the live line; before that, messages are plain lines."""
        if self._live:
            self._live.start()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show the completed step. The live line keeps the previous value of a metric that this step did not log."""
        if self._step < self._first_step:
            # the first step includes warm-up and compilation, so it is excluded from the ETA
            self._timer.restart()
        else:
            self._timer.lap(0)
        self._step = step
        if not self._live:
            self._shown.clear()
        self._shown.update(values)
        if self._live:
            if self._clock() - self._drawn >= REDRAW_SECONDS:
                self._draw()
        elif self._prints_line(values):
            self._print(self.plain_line())

    def message(self, text: str | Text) -> None:
        """Print a line, above the live line if there is one."""
        self._print(text)

    def close(self) -> None:
        """Draw the final state and leave it on the screen."""
        if self._live:
            # stop() draws once more
            self._live.stop()

    def plain_line(self) -> str:
        """Return the state as one line without colors or bar."""
        width = len(str(self._total_steps))
        parts = [f"{label} {value}".strip() for _, label, value in self._parts()]
        return "  ".join([f"step {self._step:>{width}}/{self._total_steps}", *parts])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the live line: the texts, and a bar in the remaining width."""
        texts = self._texts_for(options.max_width)
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True, pad_edge=False)
        grid.add_column(ratio=1)
        for _ in texts:
            grid.add_column(no_wrap=True)
        bar = ProgressBar(self._total_steps, self._step, complete_style="blue", finished_style="green")
        grid.add_row(bar, *texts)
        yield grid

    def _texts_for(self, columns: int) -> list[Text]:
        parts: list[Part] = [(0, "", f"{self._step}/{self._total_steps}"), *self._parts()]
        while True:
            texts = [Text.assemble((f"{label} ".lstrip(), "dim"), value) for _, label, value in parts]
            used = sum(text.cell_len + 2 for text in texts)
            if used + MIN_BAR_COLUMNS <= columns or len(parts) == 1:
                return texts
            parts.remove(max(parts))

    def _parts(self) -> list[Part]:
        """Return the parts that have a value, in display order."""
        parts = [
            (1, "loss", self._format("loss/train", ".4f")),
            (3, "val", self._format("loss/validation", ".4f")),
            (6, "bits/byte", self._format("bits_per_byte/validation", ".3f")),
            (7, "grad", self._format("grad_norm", ".2f")),
            (8, "lr", self._format("learning_rate", ".1e")),
            (4, "", self._format("throughput/tokens_per_second", ",.0f", " tok/s")),
            (9, "MFU", self._format("throughput/mfu", ".1%")),
            (2, "ETA", self._eta()),
        ]
        return [part for part in parts if part[2]]

    def _format(self, name: str, format_spec: str, unit: str = "") -> str:
        return f"{self._shown[name]:{format_spec}}{unit}" if name in self._shown else ""

    def _eta(self) -> str:
        seconds = self._timer.eta_seconds(self._total_steps - self._step)
        if seconds is None or self._step >= self._total_steps:
            return ""
        return clock_text(seconds)

    def _prints_line(self, values: Mapping[str, float]) -> bool:
        return (
            self._step % self._interval_steps == 0
            or self._step in (self._first_step, self._total_steps)
            or "loss/validation" in values
        )

    def _draw(self) -> None:
        assert self._live is not None
        self._drawn = self._clock()
        self._live.refresh()

    def _print(self, text: str | Text) -> None:
        self._console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def clock_text(seconds: float) -> str:
    """Return 75 as "1:15", 3661 as "1:01:01", 90061 as "1d 01:01"."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
