"""What a recipe needs in memory on every rank, by arithmetic: the dry run. No torch, nothing is built.

    states.py       parameters held by a rank, and the bytes of weights, gradients and optimizer
    activations.py  bytes one micro-batch leaves for the backward pass, sublayer by sublayer
    schedule.py     how many micro-batches a pipeline rank holds at once
    plan.py         the three put together per pipeline rank, against a card
    table.py        the same for people

Sizes of tensors come from `config/sizes.py`; time and choice of layout do not live here.
"""

from megatron_q3n.planner.plan import H100, Card, Plan, StageMemory, plan
from megatron_q3n.planner.table import render, show

__all__ = ["H100", "Card", "Plan", "StageMemory", "plan", "render", "show"]
