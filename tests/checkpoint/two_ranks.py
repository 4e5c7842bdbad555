"""Program of test_two_ranks.py: two processes, one pipeline stage each, save, fall back and fail together.

It imports megatron-core once and forks the ranks.
"""

import gc
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_q3n.checkpoint import integrity, newest_in
from megatron_q3n.config import UserError, validate
from megatron_q3n.device import quiet_known_warnings, select_device
from tests.checkpoint.tiny_state import TINY

LAYOUT = {
    **TINY,
    "training": TINY["training"] | {"micro_batch_size": 1},
    "parallel": {"pipeline_model_parallel_size": 2, "world_size": 2},
    "checkpoint": {"keep_last": 3, "asynchronous": True},
}


def train(state: Any, steps: int) -> None:
    """Take steps of two micro-batches, which depend on the step alone."""
    import torch

    from megatron_q3n.data.batch import causal_batch
    from megatron_q3n.training.step import train_step

    for _ in range(steps):
        generator = torch.Generator().manual_seed(state.step)
        rows = torch.randint(0, 64, (2, 1, 33), generator=generator)
        ones = torch.ones(1, 32)
        train_step(state, [causal_batch(row[:, :-1], row[:, 1:].contiguous(), ones) for row in rows])


def work(rank: int, folder: Path) -> None:
    """Run one rank."""
    import torch

    from megatron_q3n import checkpoint, parallel
    from megatron_q3n.training.state import build_state
    from tests.checkpoint.tiny_state import fingerprint

    config = validate(LAYOUT)
    device = select_device(config)
    store = torch.distributed.FileStore(str(folder / "meeting"), 2)
    group = parallel.initialize(config, device, parallel.Rendezvous(store, rank, 2))
    state = build_state(config, device, group)
    run_dir = folder / "run"
    saver = checkpoint.Saver(state, run_dir)
    prints = {}
    # each save but the first begins while the previous one is being written
    for _ in range(3):
        train(state, 1)
        prints[state.step] = fingerprint(state)
        saver.save()
    train(state, 2)
    assert saver.wait_for_save(True) == [1, 2, 3]

    checkpoint.resume(state, run_dir)
    assert (state.step, fingerprint(state)) == (3, prints[3])

    group.barrier()
    stage_1 = run_dir / "checkpoints/step_0000003/__1_0.distcp"
    if rank == 0:
        content = bytearray(stage_1.read_bytes())
        content[len(content) // 2] ^= 4
        stage_1.write_bytes(content)
    group.barrier()
    resumed = checkpoint.resume(state, run_dir)
    assert resumed.checkpoint == newest_in(run_dir)
    assert (state.step, fingerprint(state)) == (2, prints[2])
    assert len(resumed.notes) == 1
    assert "__1_0.distcp does not match its digest" in resumed.notes[0]

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    train(state, 2)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    saver.save()
    with pytest.raises(UserError, match=r"step_0000004 could not be written.*File too large"):
        # the error of rank 1 is raised on both ranks
        saver.wait_for_save(True)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest_in(run_dir) == resumed.checkpoint
    assert checkpoint.save(state, run_dir).name == "step_0000004"
    assert integrity.find_damage(run_dir / "checkpoints/step_0000004", "full") == []
    parallel.shutdown()


def main() -> int:
    """Fork the ranks and return how many failed."""
    quiet_known_warnings()
    # installs the CPU shim, before megatron-core is imported
    select_device(validate(LAYOUT))
    import megatron_q3n.checkpoint.writer
    import megatron_q3n.training.step

    assert megatron_q3n.checkpoint.writer
    assert megatron_q3n.training.step
    gc.freeze()
    fork = multiprocessing.get_context("fork")
    folder = Path(sys.argv[1])
    ranks = [fork.Process(target=work, args=(rank, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return sum(process.exitcode != 0 for process in ranks)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
