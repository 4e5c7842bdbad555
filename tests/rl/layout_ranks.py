"""Program of test_layouts.py: ranks of several layouts generate, compute old log-probs and update.

It imports megatron-core once and forks the ranks. The single process saves its weights and its samples with their
advantages; every layout starts from these weights, generates samples, and trains on the single process's samples.
Pipeline stages do not generate. Argument: the output folder.
"""

import json
import os
import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

from megatron_q3n.device import select_device
from tests.rank_processes import fork_ranks, import_once, rendezvous
from tests.rl.tiny_loop import tiny_config, tiny_loop

LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "dp2": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
    "tp2_ep2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "dp2_tp2_ep2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
}
WORLDS = {"single": 1, "dp2_tp2_ep2": 4}
UPDATES = 2


def world_of(layout: str) -> int:
    """Return the number of processes of a layout."""
    return WORLDS.get(layout, 2)


def work(rank: int, layout: str, folder: Path) -> None:
    """Run one rank and write its results."""
    from megatron_q3n import checkpoint, parallel
    from megatron_q3n.rl.reward_workers import RewardWorkers

    world, rl = world_of(layout), {}
    # pipeline stages need the HTTP engine; this test passes them samples instead
    if layout == "pp2":
        rl = {
            "rollout": {
                "engine": "http",
                "urls": ["http://unused/v1"],
                "prompts": 4,
                "samples_per_prompt": 3,
                "max_new_tokens": 7,
            },
            "routing_replay": False,
        }
    config = tiny_config(folder, rl, parallel={**LAYOUTS[layout], "world_size": world})
    # validation rejects replay with the HTTP engine, but the samples passed here have routes
    if layout == "pp2":
        replaying = config.rl.model_copy(update={"routing_replay": True})
        config = config.model_copy(update={"rl": replaying})
    device = select_device(config)
    group = parallel.initialize(config, device, rendezvous(folder, layout, rank, world))
    with RewardWorkers(config.rl.reward) as reward_workers:
        loop = tiny_loop(config, device, group, reward_workers)
        if layout == "single":
            checkpoint.save(loop.state, folder)
        else:
            source = checkpoint.find(folder)
            checkpoint.load(loop.state, source, resume=False, with_optimizer=False)
        results: dict[str, Any] = {}
        if layout != "pp2":
            generated, _ = loop.generate()
            loop.compute_advantages(generated)
            results["samples"] = [(s.key, s.tokens, s.score, s.advantage) for s in generated]
            results["routes"] = [s.routes.tolist() for s in generated if s.routes is not None]
        if layout == "single":
            (folder / "samples.pickle").write_bytes(pickle.dumps(generated))
    samples = pickle.loads((folder / "samples.pickle").read_bytes())
    mismatch = loop.compute_old_logprobs(samples)
    results["old"] = [s.old_logprobs.tolist() for s in samples]
    results["mismatch"] = [mismatch.logprob_diff_max, *mismatch.routing_mismatch_after_replay]
    results["updates"] = []
    for _ in range(UPDATES):
        values = loop.update(samples).values
        names = ("loss/policy", "grad_norm", "rl/ratio", "rl/clip_fraction", "rl/entropy", "rl/kl_to_old")
        results["updates"].append([values[name] for name in names])
    (folder / f"{layout}-{rank}.json").write_text(json.dumps(results))
    parallel.shutdown()


def main() -> int:
    """Fork the ranks of one layout after the other and return the number of failed ranks."""
    folder = Path(sys.argv[1])
    import_once(tiny_config(folder), "megatron_q3n.checkpoint.writer", "megatron_q3n.rl.loop")
    failed = 0
    for layout in LAYOUTS:
        codes = fork_ranks(partial(work, layout=layout, folder=folder), world_of(layout))
        failed += sum(code != 0 for code in codes)
    return failed


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
