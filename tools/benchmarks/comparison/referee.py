"""The turns of a comparison: who runs when, and what becomes of one that fails.

All workers start at once and wait. Then, case by case and round by round, each contestant is visited with one and
with two periods, the order reversed every other round, so that a drift of the machine hits everybody alike. A
contestant whose process ends is out, with the end of its log; the others go on.
"""

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from megatron_q3n.config import RunConfig, UserError
from tools.benchmarks.comparison.cases import PERIODS, Case, Contestant, Part
from tools.benchmarks.comparison.worker import MATMUL, Reading, Ready, Visit, serve

LOG_LINES = 25


@dataclass(frozen=True)
class Options:
    """How long and how often, and what is particular to a contestant."""

    part: Part
    rounds: int
    iterations: int
    warmup: int
    profiled_steps: int
    stock: dict[str, Any]
    transformers_gradients: Literal["bf16", "fp32"]


@dataclass
class Player:
    """A contestant at play: its process, what it said of itself, and every reading by case, periods and round."""

    contestant: Contestant
    process: Any
    connection: Connection
    log: Path
    ready: Ready | None = None
    readings: dict[tuple[Case, int], list[Reading]] = field(default_factory=dict)
    first_step_seconds: float | None = None
    failure: str = ""

    def ask(self, order: Any) -> Any:
        """Send an order and wait for its answer; None, with `failure` set, if the process ended instead."""
        with contextlib.suppress(ConnectionError):  # that it ended shows when we listen
            self.connection.send(order)
        return self.hear()

    def hear(self) -> Any:
        """Wait for the worker's next word; None, with `failure` set, if the process ended instead."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
            lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            self.failure = "\n".join([f"ended with status {self.process.exitcode}", *lines])
            return None


Configurations = dict[tuple[Case, Contestant, int], RunConfig]


def play(
    configurations: Configurations, options: Options, logs: Path, tell: Callable[[str], None]
) -> tuple[list[Player], float | None]:
    """Run the whole comparison.

    Returns: the players with their readings, and the device's measured matmul rate in FLOP/s.
    Raises: UserError where a contestant cannot run on this machine.
    """
    contestants = list(dict.fromkeys(contestant for _, contestant, _ in configurations))
    players = [_started(c, configurations, options, logs) for c in contestants]
    try:
        for player in players:
            player.ready = player.hear()
            if player.ready and player.ready.refused:
                raise UserError(player.ready.refused)
            tell(f"{player.contestant.label}: {_first_words(player)}")
        flops = next((p.ask(MATMUL) for p in players if not p.failure), None)
        for case in dict.fromkeys(case for case, _, _ in configurations):
            _play_case(case, players, configurations, options, tell)
    finally:
        _stop(players)
    return players, flops


def _play_case(case: Case, players: list[Player], configurations: Configurations, options: Options, tell: Any) -> None:
    sizes = PERIODS if options.part == "step" else PERIODS[:1]
    for turn in range(options.rounds):
        for periods in sizes:
            for player in players if turn % 2 == 0 else players[::-1]:
                if player.failure:
                    continue
                config = configurations[case, player.contestant, periods]
                profiled = options.profiled_steps if turn == options.rounds - 1 else 0
                visit = Visit(config, options.part, options.warmup, options.iterations, profiled)
                began = time.perf_counter()
                reading = player.ask(visit)
                if reading is not None:
                    player.readings.setdefault((case, periods), []).append(reading)
                    _note_first_step(player, reading)
                shown = _shown(reading, player)
                tell(
                    f"[{time.perf_counter() - began:5.1f} s] {case.label}, {periods} period(s), "
                    f"round {turn + 1}, {player.contestant.label}: {shown}"
                )


def _note_first_step(player: Player, reading: Reading) -> None:
    if player.first_step_seconds is None and not reading.failure and player.ready:
        first = reading.build_seconds + reading.first_step_seconds
        player.first_step_seconds = player.ready.seconds + first


def _started(contestant: Contestant, configurations: Configurations, options: Options, logs: Path) -> Player:
    context = multiprocessing.get_context("spawn")  # a fork cannot share a CUDA context
    here, there = context.Pipe()
    log = logs / f"{contestant.label.replace(':', '-')}.log"
    log.unlink(missing_ok=True)
    config = next(c for (_, whose, _), c in configurations.items() if whose == contestant)
    process = context.Process(target=serve, args=(there, contestant, config, options, log), daemon=True)
    process.start()
    there.close()
    return Player(contestant, process, here, log)


def _stop(players: list[Player]) -> None:
    for player in players:
        if player.process.is_alive():
            with contextlib.suppress(ConnectionError):  # it may end in between
                player.connection.send(None)
    for player in players:
        player.process.join(20)
        if player.process.is_alive():
            player.process.terminate()


def _first_words(player: Player) -> str:
    if player.ready is None:
        return f"failed: {player.failure}"
    about = "; ".join(f"{name} {value}" for name, value in player.ready.about.items())
    return f"ready after {player.ready.seconds:.1f} s; {about}"


def _shown(reading: Reading | None, player: Player) -> str:
    if reading is None:
        return f"failed: {player.failure}"
    if reading.failure:
        return reading.failure
    left = f", {reading.left_gib:.1f} GiB not let go" if reading.left_gib > 0.5 else ""
    return (
        f"{reading.median * 1000:.1f} ms a step, peak {reading.peak_allocated_gib:.1f} GiB, "
        f"build {reading.build_seconds:.1f} s, first step {reading.first_step_seconds:.1f} s{left}"
    )
