"""Worker program of test_layouts.py: ranks of several layouts load one checkpoint, generate, and write completions.

It imports megatron-core once and forks the ranks. Argument: the output folder.
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
from tests.inference.tiny_model import TINY, move_from_init, random_prompts

LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
    "tp2-ep2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "tp2-etp2": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
}
RUNS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "prefill_tokens": 20},
    "greedy-drafts": {"temperature": 0.0, "draft_depth": 2, "max_sequences": 2},
    "sampled-drafts": {"temperature": 1.0, "draft_depth": 2},
}
PROMPTS = random_prompts([5, 40, 1, 17, 30], 64)


def configuration(layout: str) -> Any:
    """Return the settings of one layout."""
    world = 1 if layout == "single" else 2
    return validate(
        {
            "model": TINY,
            "data": {"source": "blend", "train": [{"path": "unused"}]},
            "training": {"sequence_length": 32, "micro_batch_size": 2, "global_batch_size": 4},
            "parallel": {**LAYOUTS[layout], "world_size": world},
        }
    )


def completions(model: Any, share: list[int]) -> dict[str, Any]:
    """Return, for every run, {prompt's index: tokens} of this rank's prompts."""
    from megatron_q3n.inference.generate import generate
    from megatron_q3n.inference.sampling import Sampling

    tokens_by_run = {}
    for name, settings in RUNS.items():
        options = {k: v for k, v in settings.items() if k != "temperature"}
        sampling = Sampling(12, settings["temperature"], stop_tokens=frozenset({11, 12, 13}))
        done = generate(model, [PROMPTS[i] for i in share], sampling, seed=[f"1.{i}" for i in share], **options)
        tokens_by_run[name] = {index: c.tokens for index, c in zip(share, done)}
    return tokens_by_run


def work(rank: int, layout: str, folder: Path) -> None:
    """Run one rank."""
    import torch

    from megatron_q3n import checkpoint, parallel
    from megatron_q3n.checkpoint.weights import load_weights
    from megatron_q3n.model.build import build_model
    from megatron_q3n.training.state import build_state

    config = configuration(layout)
    device = select_device(config)
    store = torch.distributed.FileStore(str(folder / f"{layout}-rendezvous"), config.world_size)
    rendezvous = parallel.Rendezvous(store, rank, config.parallel.world_size or 1)
    group = parallel.initialize(config, device, rendezvous)
    if layout == "single":
        state = build_state(config, device, group)
        move_from_init(state.models[0])
        checkpoint.save(state, folder)
        model = state.models[0]
    else:
        model = build_model(config, device.model_backend, group.groups)[0]
        load_weights([model], config, group, checkpoint.find(folder))
    all_prompts = list(range(len(PROMPTS)))
    shares = {"all": all_prompts}
    if group.data_size > 1:
        shares["split"] = all_prompts[group.data_rank :: group.data_size]
        shares["idle"] = all_prompts if group.data_rank == 0 else []
    results = {name: completions(model, share) for name, share in shares.items()}
    (folder / f"{layout}-{rank}.json").write_text(json.dumps(results))
    parallel.shutdown()


def main() -> int:
    """Fork the ranks of one layout after the other and return how many failed."""
    quiet_known_warnings()
    folder = Path(sys.argv[1])
    select_device(configuration("single"))  # installs the CPU shim, before megatron-core is imported
    import megatron_q3n.checkpoint.weights
    import megatron_q3n.checkpoint.writer
    import megatron_q3n.inference.generate
    import megatron_q3n.training.step

    assert megatron_q3n.checkpoint.weights
    assert megatron_q3n.checkpoint.writer
    assert megatron_q3n.inference.generate
    assert megatron_q3n.training.step
    gc.freeze()
    fork = multiprocessing.get_context("fork")
    failed = 0
    for layout in LAYOUTS:
        world = 1 if layout == "single" else 2
        target = partial(work, layout=layout, folder=folder)
        ranks = [fork.Process(target=target, args=(rank,)) for rank in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        failed += sum(process.exitcode != 0 for process in ranks)
    return failed


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
