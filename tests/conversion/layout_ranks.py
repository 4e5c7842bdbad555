"""Program of test_layouts.py: ranks of several layouts load an imported checkpoint, write their logits, and save it.

It imports megatron-core once and forks the ranks. Arguments: the imported checkpoint, and an output folder.
"""

import gc
import json
import multiprocessing
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from megatron_q3n.config import validate
from megatron_q3n.device import quiet_known_warnings, select_device

LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2, "world_size": 2},
    "pp2-ep2": {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2, "world_size": 4},
}
ROWS, TOKENS = 2, 48


def configuration(checkpoint: Path, layout: str) -> Any:
    """Return the run's settings for one layout, with the imported model's dimensions."""
    return validate(
        {
            "model": json.loads((checkpoint / "checkpoint.json").read_text())["model"],
            "data": {"source": "blend", "train": [{"path": "unused"}]},
            "training": {
                "sequence_length": TOKENS,
                "micro_batch_size": ROWS,
                "global_batch_size": 2 * ROWS,
                "steps": 99,
            },
            "parallel": LAYOUTS[layout],
        }
    )


def logits_of(state: Any) -> list[Any]:
    """Run the fixed tokens through the pipeline; the last stage gets [logits], the others nothing."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    tokens = torch.randint(0, 96, (ROWS, TOKENS), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(TOKENS).expand_as(tokens)

    def forward(_: Any, model: Any) -> tuple[Any, Any]:
        output = model(tokens, positions, None, runtime_gather_output=True)
        return output, lambda logits, non_loss_data: logits

    for chunk in state.chunks:
        chunk.eval()
    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=None,
        model=state.chunks[0],
        num_microbatches=1,
        seq_length=TOKENS,
        micro_batch_size=ROWS,
        forward_only=True,
        collect_non_loss_data=True,
    )


def work(rank: int, layout: str, checkpoint: Path, folder: Path) -> None:
    """Be one rank."""
    import torch

    from megatron_q3n import checkpoint as checkpointing
    from megatron_q3n import parallel
    from megatron_q3n.training.state import build_state

    config = configuration(checkpoint, layout)
    device = select_device(config)
    world_size = config.parallel.world_size
    store = torch.distributed.FileStore(str(folder / f"{layout}-meeting"), world_size)
    group = parallel.initialize(config, device, parallel.Rendezvous(store, rank, world_size))
    state = build_state(config, device, group)
    checkpointing.load(state, checkpoint, resume=False, with_optimizer=False)
    with torch.no_grad():
        logits = logits_of(state)
    if group.is_last_stage:
        torch.save(logits[0], folder / f"{layout}-{rank}.pt")
    checkpointing.save(state, folder / layout)
    parallel.shutdown()


def main() -> int:
    """Fork the ranks of one layout after the other and return how many failed."""
    quiet_known_warnings()
    checkpoint, folder = map(Path, sys.argv[1:])
    select_device(configuration(checkpoint, "tp2"))  # the CPU shim, before megatron-core is imported
    import megatron_q3n.checkpoint.writer
    import megatron_q3n.training.step

    assert megatron_q3n.checkpoint.writer
    assert megatron_q3n.training.step
    gc.freeze()
    fork = multiprocessing.get_context("fork")
    failed = 0
    for layout, sizes in LAYOUTS.items():
        be = partial(work, layout=layout, checkpoint=checkpoint, folder=folder)
        ranks = [fork.Process(target=be, args=(rank,)) for rank in range(sizes["world_size"])]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        failed += sum(process.exitcode != 0 for process in ranks)
    return failed


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
