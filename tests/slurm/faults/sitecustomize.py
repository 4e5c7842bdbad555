"""Fault injection into training processes, for tests: Python imports this file if its folder is on PYTHONPATH.

$Q3N_FAULT is a list, separated by commas, of
    nan@K        batch K (from 0) has a loss mask of NaN
    spike@K      batch K has a loss mask of large numbers of both signs: a loss and gradient spike
    hang@S:R     rank R sleeps forever at the start of step S
    slow@S:R     rank R sleeps 0.3 s in the forward pass of every step from S on
    crash@S:R    rank R kills itself with SIGKILL at the start of step S
    hold@S:R     rank R waits at the start of step S until it receives SIGTERM
With $Q3N_FAULT_ONCE (a file path), hang, crash and hold happen only if that file does not exist; they create it.
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
    """Return the batch numbers of the faults of a kind."""
    return [int(argument) for name, argument in FAULTS if name == kind]


def poison_batches(module: Any) -> None:
    """Patch PretrainData.train_batches to yield faulty batches."""
    original = module.PretrainData.train_batches

    def train_batches(self: Any, first_step: int, *rank_arguments: int) -> Any:
        for number, batches in enumerate(original(self, first_step, *rank_arguments), start=first_step):
            yield [poisoned(batch, number) for batch in batches]

    module.PretrainData.train_batches = train_batches


def poisoned(batch: Any, number: int) -> Any:
    """Return the batch, with a faulty loss mask if its number is in the list of faults."""
    mask_BT = batch.loss_mask_BT.clone()
    if number in numbers_of("nan"):
        mask_BT[:] = float("nan")
    if number in numbers_of("spike"):
        mask_BT[:, ::2], mask_BT[:, 1::2] = 1000, -999
    return replace(batch, loss_mask_BT=mask_BT)


def disturb_steps(module: Any) -> None:
    """Patch train_step to hang, crash, wait or slow down."""
    original = module.train_step
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))

    def train_step(state: Any, *arguments: Any) -> Any:
        for kind, argument in FAULTS:
            step, _, fault_rank = argument.partition(":")
            is_due = kind in ("hang", "crash", "hold", "slow") and (
                (state.step + 1, rank) == (int(step), int(fault_rank))
            )
            if is_due and kind != "slow" and first_time():
                print(f"fault: {kind} at step {step} on rank {rank}", flush=True)
                if kind == "crash":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(1e6) if kind == "hang" else wait_for_term()
            if is_due and kind == "slow":
                state.chunks[0].register_forward_pre_hook(lambda *_: time.sleep(0.3))
        return original(state, *arguments)

    module.train_step = train_step


def wait_for_term() -> None:
    """Wait for SIGTERM; the run's own handler is called too."""
    received, handler = threading.Event(), signal.getsignal(signal.SIGTERM)

    def call_both(number: int, frame: Any) -> None:
        handler(number, frame)  # type: ignore[operator, misc]
        received.set()

    signal.signal(signal.SIGTERM, call_both)
    received.wait()


def first_time() -> bool:
    """Return whether a one-time fault has not happened yet, and record that it has."""
    marker = os.environ.get("Q3N_FAULT_ONCE")
    if marker is None:
        return True
    if Path(marker).exists():
        return False
    Path(marker).touch()
    return True


class _PatchOnImport:
    """Import hook that patches a module after it is loaded."""

    def __init__(self, changes: dict[str, Callable[[Any], None]]) -> None:
        self.changes = changes

    def find_spec(self, name: str, path: Any, _: Any = None) -> Any:
        """Return the module's usual spec, with a loader that also applies the patch."""
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
    sys.meta_path.insert(0, _PatchOnImport(changes))  # type: ignore[arg-type]
