"""Progress display: the live line at several widths, and the plain lines of a log file. Colors are not covered."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from megatron_q3n.metrics.progress import Progress, clock_text

VALUES = {
    "tokens": 1_234_000,
    "loss/train": 1.23456,
    "loss/validation": 1.4567,
    "bits_per_byte/validation": 2.0911,
    "grad_norm": 0.4321,
    "learning_rate": 2e-3,
    "throughput/tokens_per_second": 12_345.6,
    "throughput/mfu": 0.412,
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def _progress(width: int, live: bool, total_steps: int = 2000) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=live, color_system=None)
    progress = Progress(console, live=live, first_step=1, total_steps=total_steps, interval_steps=10, clock=Clock())
    return progress, out


def _rendered(width: int, total_steps: int = 2000) -> str:
    progress, _ = _progress(width, live=True, total_steps=total_steps)
    for step in (1, 2, 3):
        progress.update(step, VALUES)
    # without colors rich leaves the rest of a bar blank
    console = Console(width=width, force_terminal=True, color_system="standard", no_color=False)
    with console.capture() as capture:
        console.print(progress)
    return Text.from_ansi(capture.get()).plain


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160, 240])
@pytest.mark.parametrize("total_steps", [50, 2000, 1_000_000])
def test_the_live_line_is_one_line_with_a_bar(width: int, total_steps: int) -> None:
    line = _rendered(width, total_steps)
    assert line.count("\n") == 1
    assert len(line.rstrip("\n")) <= width
    assert line.count("━") >= 10
    assert "loss 1.2346" in line
    assert f"3/{total_steps}" in line
    assert "…" not in line


def test_eighty_columns_keep_what_matters_most() -> None:
    line = _rendered(80)
    assert "val 1.4567" in line
    assert "12,346 tok/s" in line
    assert "ETA" in line
    assert "MFU" not in line


def test_a_wide_terminal_shows_everything() -> None:
    line = _rendered(160)
    for text in ("bits/byte 2.091", "grad 0.43", "lr 2.0e-03", "MFU 41.2%"):
        assert text in line


def test_plain_lines_come_at_the_interval_and_at_validations() -> None:
    progress, out = _progress(80, live=False, total_steps=26)
    for step in range(1, 27):
        progress.update(step, {"loss/validation": 3.0} if step == 15 else {"loss/train": 2.0})
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/26", "10/26", "15/26", "20/26", "26/26"]
    assert lines[2] == "step 15/26  val 3.0000  ETA 0:11"
    assert lines[3] == "step 20/26  loss 2.0000  ETA 0:06"


def test_messages_are_not_read_as_markup() -> None:
    progress, out = _progress(40, live=False)
    progress.message("a [bold]list[/bold] :smile: " + "x" * 60)
    assert out.getvalue() == "a [bold]list[/bold] :smile: " + "x" * 60 + "\n"


def test_messages_appear_above_the_live_line() -> None:
    progress, out = _progress(80, live=True)
    progress.start()
    progress.update(1, VALUES)
    progress.message("saved step 1")
    progress.close()
    text = out.getvalue()
    assert text.index("saved step 1") < text.rindex("loss 1.2346")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (3661, "1:01:01"), (90061, "1d 01:01")])
def test_clock_text(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text
