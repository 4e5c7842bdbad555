#!/usr/bin/env python3
"""Balance of newly initialized routers on real text: weight rows of equal norm compared with plain initialization.

    tools/studies/router_balance.py                                          the tiny model, the standard library's text
    tools/studies/router_balance.py model.num_moe_experts=64 model.hidden_size=256
    tools/studies/router_balance.py --config-name pretrain-small --seeds 5 --rows 8

For each seed the same model is built twice, with a different initialization of the routers only. Printed, over layers
and seeds: the largest expert load over the mean (1 is even), the smallest, and the entropy of the routing over
log(experts) (1 is even). Training text, step 0, no update. On a CPU or a GPU, one process.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_q3n.config import EXIT_BAD_INPUT, RunConfig, UserError, validate
from megatron_q3n.recipe import configure, register_defaults

FIGURES = {
    "fullest / mean": lambda load: load.max().item() * len(load),
    "emptiest / mean": lambda load: load.min().item() * len(load),
    "entropy / log(experts)": lambda load: torch.special.entr(load).sum().item() / math.log(len(load)),
}


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", default="pretrain-tiny", metavar="RECIPE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16, help="of training.sequence_length tokens")
    options, overrides = parser.parse_known_args()
    register_defaults()
    try:
        config = configure(["--config-name", options.config_name, *overrides])
        loads = measure(config, options.seeds, options.rows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    model = config.model
    show(f"{model.num_moe_experts} experts, top {model.moe_router_topk}, {model.hidden_size} wide", loads)
    return 0


def measure(config: RunConfig, seeds: int, rows: int) -> dict[str, list[torch.Tensor]]:
    """Return {init: loads [E] of every layer of every seed's model}, over the same rows of training text."""
    from megatron_q3n import parallel  # late: imports megatron-core, which a bad option need not wait for
    from megatron_q3n.data.pretrain import build_pretrain_data
    from megatron_q3n.device import quiet_known_warnings, select_device

    quiet_known_warnings()
    device = select_device(config)
    group = parallel.initialize(config, device)
    text = torch.stack([torch.as_tensor(row[:-1]) for row in build_pretrain_data(config).train_sample_tokens(rows)])
    try:
        return {
            init: [
                load
                for seed in range(seeds)
                for load in initial_loads(_with_init(config, init == "equal norms"), seed, text, (device, group))
            ]
            for init in ("plain", "equal norms")
        }
    finally:
        parallel.shutdown()


def _with_init(config: RunConfig, normalized: bool) -> RunConfig:
    tree = config.model_dump(mode="json")
    tree["model"]["moe_router_normalized_init"] = normalized
    return validate(tree)


def initial_loads(config: RunConfig, seed: int, text_BT: torch.Tensor, process: Any) -> Iterator[torch.Tensor]:
    """Yield each trunk layer's load [E] over the text, of a model initialized from the seed."""
    from megatron_q3n import parallel  # late, as above
    from megatron_q3n.model.build import build_model
    from megatron_q3n.model.moe.router import finish_balance, routers_of

    device, group = process
    parallel.seed(seed)
    (model,) = build_model(config, device.model_backend, group.groups)
    model.to(device.torch_device).train()
    routers = [router for router in routers_of([model]).values() if not router.is_mtp_layer]
    for row in text_BT.to(device.torch_device).split(1):
        model(row, torch.arange(row.shape[1], device=row.device)[None], None)
    yield from finish_balance(routers, group.groups.tp_dp_cp)[0].cpu()


def show(title: str, loads: dict[str, list[torch.Tensor]]) -> None:
    """Print the mean and spread of each figure over layers and seeds."""
    table = Table(title=title)
    table.add_column("routers' init")
    for figure in FIGURES:
        table.add_column(figure, justify="right")
    for init, by_layer in loads.items():
        cells = []
        for measured in FIGURES.values():
            values = [measured(load) for load in by_layer]
            cells.append(f"{statistics.mean(values):.4f} ± {statistics.pstdev(values):.4f}")
        table.add_row(init, *cells)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    sys.exit(main())
