"""Faults put into a training process from outside, for tests: Python runs this file at start when its folder is on
PYTHONPATH.

$Q3N_FAULT is a list, separated by commas, of
    nan@K        batch K (from 0) has a loss mask of NaN
    spike@K      batch K has a loss mask of large numbers of both signs: a loss and a gradient far off
    hang@S:R     rank R sleeps for good at the start of step S
    slow@S:R     rank R sleeps 0.3 s in the forward pass of every step from S on
    crash@S:R    rank R ends itself with SIGKILL at the start of step S
    hold@S:R     rank R waits at the start of step S until it gets SIGTERM
With $Q3N_FAULT_ONCE (a file), hang, crash and hold happen only while that file does not exist; it is made then.
"""

import importlib.machinery
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

FAULTS = [fault.partition("@")[::2] for fault in os.environ.get("Q3N_FAULT", "").split(",")]


def numbers_of(kind: str) -> list[int]:
    """Return the batches that a fault of this kind is for."""
    return [int(place) for name, place in FAULTS if name == kind]


def poison_batches(module: Any) -> None:
    """Let PretrainData hand out poisoned training batches."""
    honest = module.PretrainData.train_batches

    def train_batches(self: Any, first_step: int, *place: int) -> Any:
        for number, batches in enumerate(honest(self, first_step, *place), start=first_step):
            yield [poisoned(batch, number) for batch in batches]

    module.PretrainData.train_batches = train_batches


def poisoned(batch: Any, number: int) -> Any:
    """Return the batch, spoiled if its number says so."""
    mask_BT = batch.loss_mask_BT.clone()
    if number in numbers_of("nan"):
        mask_BT[:] = float("nan")
    if number in numbers_of("spike"):
        mask_BT[:, ::2], mask_BT[:, 1::2] = 1000, -999
    return replace(batch, loss_mask_BT=mask_BT)


def disturb_steps(module: Any) -> None:
    """Let the loop's train_step hang, crash or dawdle."""
    honest = module.train_step
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))

    def train_step(state: Any, *arguments: Any) -> Any:
        for kind, place in FAULTS:
            step, _, who = place.partition(":")
            here_and_now = kind in ("hang", "crash", "hold", "slow") and (
                (state.step + 1, rank) == (int(step), int(who))
            )
            if here_and_now and kind != "slow" and first_time():
                print(f"fault: {kind} at step {step} on rank {rank}", flush=True)
                if kind == "crash":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(1e6) if kind == "hang" else wait_for_term()
            if here_and_now and kind == "slow":
                state.chunks[0].register_forward_pre_hook(lambda *_: time.sleep(0.3))
        return honest(state, *arguments)

    module.train_step = train_step


def wait_for_term() -> None:
    """Return when SIGTERM has come; the run's own handler gets it too."""
    told, handler = threading.Event(), signal.getsignal(signal.SIGTERM)

    def both(number: int, frame: Any) -> None:
        handler(number, frame)  # type: ignore[operator, misc]
        told.set()

    signal.signal(signal.SIGTERM, both)
    told.wait()


def first_time() -> bool:
    """Say whether a fault that comes once is still to come, and make a note that it did."""
    mark = os.environ.get("Q3N_FAULT_ONCE")
    if mark is None:
        return True
    if Path(mark).exists():
        return False
    Path(mark).touch()
    return True


class _After:
    """An import hook that changes a module once it is loaded."""

    def __init__(self, changes: dict[str, Callable[[Any], None]]) -> None:
        self.changes = changes

    def find_spec(self, name: str, path: Any, _: Any = None) -> Any:
        """Find the module as ever, and let its loader change it."""
        if name not in self.changes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        load, change = spec.loader.exec_module, self.changes[name]

        def load_and_change(module: Any) -> None:
            load(module)
            change(module)

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


if os.environ.get("Q3N_FAULT"):
    changes = {
        "megatron_q3n.data.pretrain": poison_batches,
        "megatron_q3n.training.fit": disturb_steps,
        "megatron_q3n.rl.loop": disturb_steps,
    }
    sys.meta_path.insert(0, _After(changes))  # type: ignore[arg-type]
