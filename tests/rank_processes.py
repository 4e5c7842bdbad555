"""Forked ranks of a parallel layout, in a program that imports megatron-core once.

Used by the programs that tests start for several processes (e.g. tests/inference/layout_ranks.py): each calls
`import_once`, then `fork_ranks` for every layout; the ranks form their process group by `rendezvous`.
"""

import gc
import importlib
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_q3n.config import RunConfig
from megatron_q3n.device import quiet_known_warnings, select_device

if TYPE_CHECKING:
    from megatron_q3n.parallel import Rendezvous  # late: megatron-core is imported by `import_once`


def import_once(config: RunConfig, *modules: str) -> None:
    """Import the forks' modules after the CPU shim, and exclude them from garbage collection."""
    quiet_known_warnings()
    # installs the CPU shim, which must precede the import of megatron-core
    select_device(config)
    for module in modules:
        importlib.import_module(module)
    gc.freeze()


def fork_ranks(work: Callable[[int], object], world: int) -> list[int]:
    """Run `work(rank)` in a fork for each rank, wait for all, and return their exit codes."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=work, args=(rank,)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    codes = [process.exitcode for process in ranks]
    assert None not in codes
    return [code for code in codes if code is not None]


def rendezvous(folder: Path, name: str, rank: int, world: int) -> "Rendezvous":
    """Return the rendezvous by which the ranks of one layout form their process group."""
    import torch  # late: this module is imported before the CPU shim is installed

    from megatron_q3n.parallel import Rendezvous

    store = torch.distributed.FileStore(str(folder / f"{name}-rendezvous"), world)
    return Rendezvous(store, rank, world)
