"""What the server of tests/forked.py imports before it forks.

Importing computes nothing and starts no thread, which a fork could not carry. wandb is left to each program: importing
it makes a temporary folder, which the first program to end would take from the others. megatron-core would import it
too, for logging that nothing here uses.
"""

import gc
import importlib
import sys
import threading

from megatron_q3n.device import quiet_known_warnings

quiet_known_warnings()
sys.modules["wandb"] = None  # type: ignore[assignment]
for name in ("run_directory", "pretrain", "sft", "mtp", "rl", "generate", "evaluate"):
    importlib.import_module(f"megatron_q3n.stages.{name}")
importlib.import_module("megatron_q3n.train")
del sys.modules["wandb"]
gc.freeze()  # a collection in a fork would touch, and so copy, every page
assert threading.active_count() == 1
