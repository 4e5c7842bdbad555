"""The ranks of a layout, or runs one after the other, as forks of a program that imports megatron-core once.

Used by the programs that tests start for several processes (…/layout_ranks.py and the like): each of them calls
`import_once`, then `fork_ranks` for every layout; a rank finds the others by `meeting`.
"""

import gc
import importlib
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_q3n.config import RunConfig
from megatron_q3n.device import choose_device, quiet_known_warnings

if TYPE_CHECKING:
    from megatron_q3n.parallel import Meeting  # it imports megatron-core, which `import_once` is for


def import_once(config: RunConfig, *modules: str) -> None:
    """Import what the forks need, behind the CPU shim, and leave it out of their garbage collections."""
    quiet_known_warnings()
    choose_device(config)  # the CPU shim, before megatron-core is imported
    for module in modules:
        importlib.import_module(module)
    gc.freeze()


def fork_ranks(work: Callable[[int], object], world: int) -> list[int]:
    """Run `work(rank)` in a fork for each rank and wait for all; return their exit codes."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=work, args=(rank,)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    codes = [process.exitcode for process in ranks]
    assert None not in codes
    return [code for code in codes if code is not None]


def meeting(folder: Path, name: str, rank: int, world: int) -> "Meeting":
    """Return where the ranks of one layout find each other."""
    import torch  # late, like megatron-core: this module is imported before the CPU shim is in place

    from megatron_q3n.parallel import Meeting

    store = torch.distributed.FileStore(str(folder / f"{name}-meeting"), world)
    return Meeting(store, rank, world)
