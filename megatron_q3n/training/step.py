"""Optimizer step: forward and backward passes over the micro-batches (gradient accumulation), clipping, update, report.

How losses and gradients are normalized: `training/loss.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_q3n.data.batch import Batch
from megatron_q3n.kernels.moe import fp8_experts
from megatron_q3n.model.moe.router import finish_balance, routers_of
from megatron_q3n.model.mtp.loss import count_predictions
from megatron_q3n.training.loss import forward_step, reduce_losses
from megatron_q3n.training.optimizer import learning_rate
from megatron_q3n.training.state import TrainState


@dataclass
class StepReport:
    """Results of one optimizer step over the global batch; the same on every rank, except `batches` and the times.

    Losses are means in nats per token. `expert_load` holds, by name of the MoE layer, the fraction of token-expert
    assignments that each expert got.
    """

    loss: float
    grad_norm: float | None
    learning_rate: float
    mtp_losses: list[float]
    balance_losses: dict[str, float]
    expert_load: dict[str, list[float]]
    batches: list[Any] = field(default_factory=list)
    """This rank's micro-batches."""

    step_seconds: float = float("nan")
    """Wall time of the step, set by the loop; in RL with the step's part of the rollout."""

    data_seconds: float = 0.0
    """Time that this rank waited for the batch, set by the loop."""


ForwardStep = Callable[[Iterator[Any], Any], tuple[torch.Tensor, Any]]
"""`forward_step_func` of megatron-core's pipeline schedules: runs the forward pass of a micro-batch and returns its
output and the loss function."""


def train_step(state: TrainState, batches: Any, forward: ForwardStep = forward_step) -> StepReport:
    """Take one optimizer step on this rank's micro-batches of a global batch."""
    rate = learning_rate(state.optimizer)
    for chunk in state.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    _count_predictions(state, batches)
    reports = run_microbatches(state, batches, forward_only=False, forward=forward)
    total, tokens = reduce_losses(reports, state.parallel)
    state.loss = total / max(tokens, 1)
    updated, grad_norm, _ = state.optimizer.step()
    fp8_experts.invalidate_copies(state.expert_weights)
    state.schedule.step(1)
    state.step += 1
    state.skipped_steps += not updated
    loads, balance = _close_balance(state)
    return StepReport(
        loss=state.loss,
        grad_norm=None if grad_norm is None else float(grad_norm),
        learning_rate=rate,
        mtp_losses=_mtp_losses(state),
        balance_losses=balance,
        expert_load=loads,
        batches=batches,
    )


@torch.no_grad()
def evaluate(state: TrainState, global_batches: Any) -> tuple[float, float]:
    """Run forward passes over validation batches, with the model in eval mode.

    Returns: the sum of the losses in nats and the number of tokens, over all ranks.
    """
    for chunk in state.chunks:
        chunk.eval()
    total = tokens = 0.0
    for batches in global_batches:
        part, count = reduce_losses(run_microbatches(state, batches, forward_only=True), state.parallel)
        total, tokens = total + part, tokens + count
    return total, tokens


def run_microbatches(
    state: TrainState,
    batches: Any,
    *,
    forward_only: bool,
    forward: ForwardStep = forward_step,
    same_weights: bool = False,
) -> list[dict]:
    """Run megatron-core's pipeline schedule (no pipelining, 1F1B or interleaved 1F1B) over the micro-batches.

    Training passes are replayed as one CUDA graph if the state has one (training/step_graph.py) and `forward` is the
    default. Before training passes the FP8 copies of the experts' weights are invalidated, since the weights may have
    changed; `same_weights=True` keeps the copies, and is valid only if the weights are unchanged (benchmarks).
    Returns: one report of losses per micro-batch, on the last pipeline stage.
    """
    if not (forward_only or same_weights):
        fp8_experts.invalidate_copies(state.expert_weights)
    if state.graph is not None and not forward_only and forward is forward_step:
        run = partial(_run_schedule, state, forward_only=False, forward=forward)
        return state.graph.run(batches, run)
    return _run_schedule(state, batches, forward_only=forward_only, forward=forward)


def _run_schedule(state: TrainState, batches: list[Batch], *, forward_only: bool, forward: ForwardStep) -> list[dict]:
    training, chunks = state.config.training, state.chunks
    single = len(chunks) == 1
    # the plan has an exchange only for batches of one shape
    with chunks[0].module.config.pass_state.with_equal_tokens(state.config.tokens_per_rank):
        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(batches) if single else [iter(batches) for _ in chunks],
            model=chunks[0] if single else chunks,
            num_microbatches=len(batches),
            seq_length=training.sequence_length,
            micro_batch_size=training.micro_batch_size,
            decoder_seq_length=training.sequence_length,
            forward_only=forward_only,
        )


def _close_balance(state: TrainState) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Close the global batch's expert counts, which the next batch's load balancing loss uses.

    Returns: each MoE layer's expert load and load balancing loss, by name, of all pipeline stages.
    """
    routers = list(routers_of(state.models).values())
    loads: dict[str, list[float]] = {}
    balance: dict[str, float] = {}
    if routers:
        load_LE, balance_L = finish_balance(routers, state.parallel.groups.tp_dp_cp)
        for name, load, loss in zip(_layer_names(routers), load_LE.tolist(), balance_L.tolist()):
            # the routers of a frozen trunk count nothing
            if any(load):
                loads[name], balance[name] = load, loss
    pipeline = state.parallel.groups.pp
    if pipeline.size() > 1:
        gathered: list[Any] = [None] * pipeline.size()
        torch.distributed.all_gather_object(gathered, (loads, balance), group=pipeline)
        loads = {name: load for part, _ in gathered for name, load in part.items()}
        balance = {name: loss for _, part in gathered for name, loss in part.items()}
    return loads, balance


def _layer_names(routers: list[Any]) -> list[str]:
    """Return "layer 3", "mtp", "mtp 2"; mixer and MoE, two layers of megatron-core, are one layer, counted from 0."""
    depths = count(1)
    return [
        ("mtp" if (depth := next(depths)) == 1 else f"mtp {depth}")
        if router.is_mtp_layer
        else f"layer {router.layer_number // 2 - 1}"
        for router in routers
    ]


def _count_predictions(state: TrainState, batches: list[Batch]) -> None:
    """Count the global batch's predictions and tokens before the passes.

    Sets the scales of the loss, of the balance losses and of each MTP depth.
    """
    depths = state.config.model.mtp_num_layers
    predictions = sum(count_predictions(b.loss_mask_BT, b.packing, depths) for b in batches)
    assert isinstance(predictions, torch.Tensor)
    num_tokens = predictions.new_tensor([sum(batch.num_used_tokens for batch in batches)])
    counts = torch.cat([predictions, num_tokens]).to(torch.cuda.current_device())
    if state.parallel.data_size > 1:
        torch.distributed.all_reduce(counts, group=state.parallel.groups.dp)
    state.loss_scale.copy_(1 / counts[0].clamp(min=1))
    balance_scale = counts[0].clamp(min=1) / counts[-1].clamp(min=1)
    for model in state.models:
        model.config.pass_state.set_balance_scale(balance_scale)  # type: ignore[union-attr]
    if depths:
        for model in state.models:
            model.config.pass_state.mtp.set_ratios(counts[0] / counts[1:-1].clamp(min=1))  # type: ignore[union-attr]
            model.config.pass_state.mtp.set_step(state.step)  # type: ignore[union-attr]


def _mtp_losses(state: TrainState) -> list[float]:
    """Return the mean loss of each MTP depth over the global batch."""
    if state.config.model.mtp_num_layers == 0:
        return []
    totals = _all_reduced(state, state.models[-1].config.pass_state.mtp.pop_totals())  # type: ignore[union-attr]
    return (totals[:, 0] / totals[:, 1].clamp(min=1)).tolist()


def acceptance_counts(state: TrainState) -> list[list[float]]:
    """Return and reset (drafts verified, accepted greedily, Σ min(p, q)) per depth of the validation passes so far.

    A collective call. Empty if validation does not draft (mtp.acceptance_depth=0).
    """
    if state.config.mtp.acceptance_depth == 0:
        return []
    return _all_reduced(state, state.models[-1].config.pass_state.mtp.pop_acceptance()).tolist()  # type: ignore[union-attr]


def _all_reduced(state: TrainState, sums: torch.Tensor) -> torch.Tensor:
    """Sum over the data and context parallel ranks of the last pipeline stage. Returns: the same on every rank."""
    parallel = state.parallel
    if parallel.world_size > 1:
        torch.distributed.all_reduce(sums, group=parallel.groups.dp_cp)
        if parallel.groups.pp.size() > 1:
            last = torch.distributed.get_process_group_ranks(parallel.groups.pp)[-1]
            torch.distributed.broadcast(sums, src=last, group=parallel.groups.pp)
    return sums
