"""Imports of the fork server of tests/forked.py, done once before it forks.

Importing must compute nothing and start no thread, since threads do not survive a fork. wandb is left out and imported
by each program: its import creates a temporary folder, which the first program to end would delete for all others.
megatron-core would import wandb too, for logging that is not used here.
"""

import gc
import importlib
import sys
import threading

from megatron_q3n.device import quiet_known_warnings

quiet_known_warnings()
sys.modules["wandb"] = None  # type: ignore[assignment]
for name in ("pretrain", "sft", "mtp", "rl", "generate", "evaluate"):
    importlib.import_module(f"megatron_q3n.stages.{name}")
importlib.import_module("megatron_q3n.train")
del sys.modules["wandb"]
# a garbage collection in a fork would write to, and so copy, every page
gc.freeze()
assert threading.active_count() == 1
