"""Progress of a preparation: a bar on a terminal, otherwise a line every half minute, for logs."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

LINE_INTERVAL_SECONDS = 30.0

# progress callback, called with the bytes of input whose tokens are written
Advance = Callable[[int], None]


@contextmanager
def progress(total_bytes: int, show: bool) -> Iterator[Advance]:
    """Show progress over the bytes of input on stderr."""
    console = Console(stderr=True)
    if not show:
        yield lambda _: None
    elif console.is_terminal:
        columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("", total=total_bytes)
            yield lambda position: bar.update(task, completed=position)
    else:
        yield _lines(console, total_bytes)


def _lines(console: Console, total_bytes: int) -> Advance:
    started = last = time.monotonic()

    def advance(position: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_INTERVAL_SECONDS and position < total_bytes:
            return
        last = now
        rate = position / max(now - started, 1e-9)
        left = (total_bytes - position) / max(rate, 1e-9)
        console.print(
            f"tokenizing: {100 * position / max(total_bytes, 1):.0f} % of {total_bytes / 1e6:,.1f} MB, "
            f"{rate / 1e6:.1f} MB/s, {left:.0f} s left",
            highlight=False,
            soft_wrap=True,
        )

    return advance
