"""Metrics of a run: names, throughput meters, and sinks (terminal, metrics.jsonl, wandb, report.html).

The training loop uses one object, `Recorder`. Losses and norms are computed in the training and model packages.
"""

from megatron_q3n.metrics.meters import StepTimer, throughput
from megatron_q3n.metrics.recorder import Recorder

__all__ = ["Recorder", "StepTimer", "throughput"]
