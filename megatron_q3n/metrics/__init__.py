"""Numbers about a run and where they go: names, meters, and sinks (terminal, metrics.jsonl, wandb, report.html).

The training loop knows one object, `Recorder`. What is not here: how a loss or a norm is computed (training, model).
"""

from megatron_q3n.metrics.meters import StepTimer, throughput
from megatron_q3n.metrics.recorder import Recorder

__all__ = ["Recorder", "StepTimer", "throughput"]
