"""One rank of the tests on two GPUs (test_layouts.py), under torchrun: trains every layout, writes losses and norms.

    torchrun --nproc-per-node N tests/multigpu/worker.py FOLDER

One process starts from the seed and saves a checkpoint; two processes load it in every layout, since layouts draw other
initial weights. All layouts run in one start: importing and qualifying kernels takes longer than the steps.
"""

import gc
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_q3n import checkpoint, parallel
from megatron_q3n.config import RunConfig, validate
from megatron_q3n.data.batch import causal_batch
from megatron_q3n.device import Device, select_device
from megatron_q3n.kernels.startup.qualification import qualify
from megatron_q3n.model.transformer_config import compute_dtype
from megatron_q3n.training.state import build_state
from megatron_q3n.training.step import train_step
from tests.multigpu.layouts import ALONE, LAYOUTS, MODEL, ROWS, STEPS, TOKENS, VOCABULARY


def main(folder: Path) -> None:
    """Run the layouts of this number of processes that have no result yet; every rank writes a file after each."""
    results: dict[str, Any] = {}
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    layouts = ALONE if world_size == 1 else LAYOUTS
    earlier = folder / f"results-{world_size}.{rank}.json"
    if earlier.exists():
        results = json.loads(earlier.read_text())
    for name in [name for name in layouts if name not in results]:
        config = config_of(*layouts[name])
        device = select_device(config)
        group = parallel.initialize(config, device)
        started = time.monotonic()
        try:
            results[name] = run(name, config, device, group, folder)
        except Exception as error:
            # the other rank may wait for this one: torchrun ends it, and the test starts again with the next layout
            results[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
            earlier.write_text(json.dumps(results))
            os._exit(1)
        results[name]["seconds"] = time.monotonic() - started
        earlier.write_text(json.dumps(results))
        parallel.leave_groups()
        gc.collect()
        torch.cuda.empty_cache()
        if group.is_leader:
            print(name, {k: v for k, v in results[name].items() if k != "plan"}, flush=True)
    parallel.shutdown()


def config_of(layout: dict[str, Any], training: dict[str, Any], fp8: str | None) -> RunConfig:
    """Return the configuration of a layout for this number of processes."""
    sizes = {"sequence_length": TOKENS, "steps": 100, "micro_batch_size": 2, "global_batch_size": ROWS}
    return validate(
        {
            "model": MODEL,
            "data": {"source": "blend", "train": [{"path": "unused"}]},
            "precision": {"compute": "bf16", "fp8": fp8},
            "training": sizes | training,
            "schedule": {"lr": 5e-3, "min_lr": 5e-3, "warmup_steps": 0},
            "parallel": layout,
        }
    )


def run(name: str, config: RunConfig, device: Device, group: parallel.Parallel, folder: Path) -> dict[str, Any]:
    """Train one layout from the common checkpoint. Returns: losses, gradient norms and which paths ran."""
    kernels = qualify(config, device.torch_device, compute_dtype(config))
    state = build_state(config, replace(device, model_backend="transformer_engine"), group)
    start = folder / "start"
    if group.world_size == 1 and not start.exists():
        checkpoint.save(state, start)
    checkpoint.load(state, checkpoint.find(start), resume=False, with_optimizer=False)
    if name == "ep2 overflow":
        assert state.graph is not None
        assert state.graph._capacity is not None
        state.graph._capacity.headroom = 0.5
    reports = [train_step(state, batches_of(step, config, group)) for step in range(STEPS)]
    plan = state.models[0].config.plan
    return {
        "losses": [report.loss for report in reports],
        "mtp": [loss for report in reports for loss in report.mtp_losses],
        "norms": [report.grad_norm for report in reports],
        "balance": [value for report in reports for value in report.balance_losses.values()],
        "graph": bool(state.graph and state.graph.is_captured),
        "repeated": state.graph.num_repeated_steps if state.graph else 0,
        "plan": plan.as_tree(),
        "refused": [f"{kernel}: {verdict}" for kernel, verdict in kernels.items() if verdict.startswith("torch:")],
    }


def batches_of(step: int, config: RunConfig, group: parallel.Parallel) -> list[Any]:
    """Return this rank's micro-batches of a step: random walks, the same global batch in every layout."""
    generator = torch.Generator().manual_seed(step)
    walks = torch.randint(1, 4, (ROWS, TOKENS + 1), generator=generator).cumsum(1) % VOCABULARY
    size = config.training.micro_batch_size
    batches = []
    for first in range(group.data_rank * size, ROWS, group.data_size * size):
        rows = walks[first : first + size]
        batches.append(causal_batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.ones(size, TOKENS)))
    return batches


if __name__ == "__main__":
    main(Path(sys.argv[1]))
