"""Program of test_backends_gpu.py: CPU processes in several layouts save checkpoints, or resume from the test's.

It runs without visible GPUs, imports megatron-core once and forks the ranks. Arguments: a folder, then `save` or
`resume`. `save`: each layout trains, saves into <layout> and continues. `resume`: each resumes from the checkpoint at
`resume`. The losses of the continued training are written to <layout>.json.
"""

import gc
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from megatron_q3n.config import RunConfig
from megatron_q3n.device import quiet_known_warnings, select_device
from tests.backends import HERE, STEPS_AFTER, STEPS_BEFORE, train

LAYOUTS: dict[str, dict[str, int]] = {
    "single": {},
    "tp2": {"tensor_model_parallel_size": 2, "world_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2, "world_size": 2},
}


def configuration(layout: str) -> RunConfig:
    """Return the fp32 run's settings for one layout."""
    return HERE.config({"parallel": LAYOUTS[layout]})


def work(rank: int, layout: str, folder: Path, task: str) -> None:
    """Run one rank."""
    import torch

    from megatron_q3n import checkpoint, parallel
    from megatron_q3n.training.state import build_state

    config = configuration(layout)
    device = select_device(config)
    store = torch.distributed.FileStore(str(folder / f"{task}-{layout}-rendezvous"), config.world_size)
    rendezvous = parallel.Rendezvous(store, rank, config.world_size)
    group = parallel.initialize(config, device, rendezvous)
    state = build_state(config, device, group)
    if task == "save":
        train(state, STEPS_BEFORE)
        checkpoint.save(state, folder / layout)
    else:
        checkpoint.load(state, checkpoint.find(folder / "resume"), resume=True)
    losses = train(state, STEPS_AFTER)
    if rank == 0:
        (folder / f"{layout}.json").write_text(json.dumps(losses))
    parallel.shutdown()


def main() -> int:
    """Fork the ranks of one layout after the other and return how many failed."""
    quiet_known_warnings()
    folder, task = Path(sys.argv[1]), sys.argv[2]
    # installs the CPU shim, before megatron-core is imported
    select_device(configuration("single"))
    import megatron_q3n.checkpoint.writer
    import megatron_q3n.training.step

    assert megatron_q3n.checkpoint.writer
    assert megatron_q3n.training.step
    gc.freeze()
    fork = multiprocessing.get_context("fork")
    failed = 0
    for layout in LAYOUTS:
        ranks: list[Any] = [
            fork.Process(target=work, args=(rank, layout, folder, task))
            for rank in range(configuration(layout).world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        failed += sum(process.exitcode != 0 for process in ranks)
    return failed


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
