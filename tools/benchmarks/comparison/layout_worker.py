"""One rank of `tools/benchmarks/bench.py layouts`, under torchrun: whole optimizer steps of each row, in one start.

torchrun --nproc-per-node N -m tools.benchmarks.comparison.layout_worker ROW,ROW RESULTS.json STEPS
"""

import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from megatron_q3n.config.sizes import flops_per_token
from megatron_q3n.recipe import configure, register_defaults
from tools.benchmarks.comparison.layout_rows import Row, rows_named

# two eager steps, and the one that captures
WARMUP_STEPS = 3


def main(names: str, results: Path, steps: int) -> None:
    """Measure the rows and write the figures after each."""
    register_defaults()
    figures: dict[str, Any] = {}
    qualified: dict[str, Any] = {}
    for row in rows_named(names):
        config = configure(list(row.settings))
        try:
            figures[row.name] = _measured(row, config, steps, qualified)
        except Exception as error:
            # one row must not hide the others; a rank that waits for another ends by the time-out of its parent
            figures[row.name] = {"failure": f"{type(error).__name__}: {error}"[:1500]}
        results.write_text(json.dumps(figures))
        print(row.name, figures[row.name], flush=True)


def _measured(row: Row, config: Any, steps: int, qualified: dict[str, Any]) -> dict[str, Any]:
    # late: torch is imported after the configuration is checked
    import torch

    from megatron_q3n import parallel
    from megatron_q3n.device import measured_matmul_flops, quiet_known_warnings, select_device
    from megatron_q3n.kernels.startup.qualification import qualify
    from megatron_q3n.model.transformer_config import compute_dtype
    from megatron_q3n.training.state import build_state
    from megatron_q3n.training.step import train_step
    from tools.benchmarks.comparison.steps import random_batches

    quiet_known_warnings()
    started = time.monotonic()
    device = select_device(config)
    group = parallel.initialize(config, device)
    kernels = qualify(config, device.torch_device, compute_dtype(config))
    if "rate" not in qualified:
        qualified["rate"] = measured_matmul_flops(device, group.world_size)
    state: Any = build_state(config, device, group)
    batches = next(random_batches(config, group.data_rank))
    losses, seconds = [], []
    torch.cuda.reset_peak_memory_stats()
    for step in range(WARMUP_STEPS + steps):
        device.synchronize()
        group.barrier()
        began = time.perf_counter()
        losses.append(train_step(state, batches).loss)
        device.synchronize()
        if step == 0:
            first_step = time.monotonic() - started
        if step >= WARMUP_STEPS:
            seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    flops = flops_per_token(config.model, config.training.sequence_length).total * config.tokens_per_step / median
    found = {
        "milliseconds": 1000 * median,
        "milliseconds_range": [1000 * min(seconds), 1000 * max(seconds)],
        "tokens_per_second": config.tokens_per_step / median,
        "tflops_per_second": flops / group.world_size / 1e12,
        "mfu": flops / qualified["rate"],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "graph": bool(state.graph and state.graph.is_captured),
        "repeated_steps": state.graph.num_repeated_steps if state.graph else 0,
        "step": str(state.models[0].config.plan.training_step),
        "exchange": str(state.models[0].config.plan.moe.symmetric_memory),
        "losses": losses,
        "first_step_seconds": first_step,
        "refused": [f"{name}: {why}" for name, why in kernels.items() if why.startswith("torch:")],
    }
    state.graph = None
    del state
    parallel.leave_groups()
    gc.collect()
    torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    main(sys.argv[1], Path(f"{sys.argv[2]}.{os.environ['RANK']}"), int(sys.argv[3]))
