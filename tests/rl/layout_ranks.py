"""Ranks of several layouts draw, look back and learn, and leave what came of it.

A program, started by test_layouts.py: it imports megatron-core once and forks the ranks. The single process saves its
weights and, with their advantages, its samples; every layout begins from these weights, draws samples of its own, and
learns from the single process's. Pipeline stages do not generate. Argument: a folder to leave things in.
"""

import json
import os
import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

from megatron_q3n.device import choose_device
from tests.rank_processes import fork_ranks, import_once, meeting
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
    """Return how many processes a layout has here."""
    return WORLDS.get(layout, 2)


def work(rank: int, layout: str, folder: Path) -> None:
    """Be one rank."""
    from megatron_q3n import checkpoint, parallel
    from megatron_q3n.rl.rewards import Graders

    world, rl = world_of(layout), {}
    if layout == "pp2":  # it answers elsewhere; here samples are given to it
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
    if layout == "pp2":  # replay's own rule is about engines, and the samples given to it have routes
        replaying = config.rl.model_copy(update={"routing_replay": True})
        config = config.model_copy(update={"rl": replaying})
    device = choose_device(config)
    group = parallel.initialize(config, device, meeting(folder, layout, rank, world))
    with Graders(config.rl.reward) as graders:
        loop = tiny_loop(config, device, group, graders)
        if layout == "single":
            checkpoint.save(loop.state, folder)
        else:
            source = checkpoint.find(folder)
            checkpoint.load(loop.state, source, resume=False, with_optimizer=False)
        found: dict[str, Any] = {}
        if layout != "pp2":
            drawn, _ = loop.draw()
            loop.judge(drawn)
            found["drawn"] = [(s.name, s.tokens, s.score, s.advantage) for s in drawn]
            found["routes"] = [s.routes.tolist() for s in drawn if s.routes is not None]
        if layout == "single":
            (folder / "samples.pickle").write_bytes(pickle.dumps(drawn))
    samples = pickle.loads((folder / "samples.pickle").read_bytes())
    mismatch = loop.look_back(samples)
    found["old"] = [s.old_logprobs.tolist() for s in samples]
    found["mismatch"] = [mismatch.logprob_max, *mismatch.routes_used]
    found["learnt"] = []
    for _ in range(UPDATES):
        values = loop.learn(samples).values
        names = ("loss/policy", "grad_norm", "rl/ratio", "rl/clipped", "rl/entropy", "rl/kl_to_old")
        found["learnt"].append([values[name] for name in names])
    (folder / f"{layout}-{rank}.json").write_text(json.dumps(found))
    parallel.shutdown()


def main() -> int:
    """Fork the ranks of one layout after the other and return how many failed."""
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
