"""Memory planner: estimate of a recipe's memory on every rank (`dry_run=true`), without torch and without a model.

    states.py       parameters of a rank, and the bytes of weights, gradient buffers and optimizer states
    activations.py  activation bytes of one micro-batch, sublayer by sublayer
    recompute.py    activation memory of a pipeline rank under activation checkpointing (recompute)
    schedule.py     number of micro-batches in flight on a pipeline rank (1F1B, interleaved)
    plan.py         the total per pipeline rank, compared with a GPU's memory
    execution.py    the ExecutionPlan on a GPU: which path each part takes
    table.py        both plans as tables for the terminal

Shapes of tensors come from `config/sizes.py`. Run time and the choice of a layout are not planned here.
"""

from megatron_q3n.planner.plan import H100, Gpu, Plan, StageMemory, plan
from megatron_q3n.planner.table import render, show

__all__ = ["H100", "Gpu", "Plan", "StageMemory", "plan", "render", "show"]
