"""Training loop on batches of a data set: step, callbacks, validation, record, checkpoint, stop.

Files, health policies and stages are outside of it: `training/loop_hooks.py` is what it gets from its session.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_q3n.data.batch import Batch
from megatron_q3n.data.pretrain import PretrainData
from megatron_q3n.training.loop_hooks import LoopHooks, LoopResult
from megatron_q3n.training.state import TrainState
from megatron_q3n.training.step import StepReport, acceptance_counts, evaluate, train_step


@dataclass
class FitResult(LoopResult):
    """How the loop ended, with its last validation and the expert load of its last step."""

    validation_loss: float | None = None
    bits_per_byte: float | None = None
    expert_load: dict[str, list[float]] = field(default_factory=dict)


def fit(
    state: TrainState, data: PretrainData, hooks: LoopHooks, throughput: Callable[[float], dict[str, float]]
) -> FitResult:
    """Train from state.step to the configured last step, or until `hooks.stop_reason` returns a reason.

    A stop saves first; a verdict of the callbacks that ends the session does not. Every rank takes the same decisions.
    `throughput` returns the metrics of a step that took so many seconds.
    """
    settings, result = state.config, FitResult()
    token_bytes_V = torch.from_numpy(np.asarray(data.tokenizer.token_num_bytes()))
    rank, size = state.parallel.data_rank, state.parallel.data_size
    steps = hooks.order_batches(lambda number: data.train_batches(number, rank, size), state.step)
    while state.step < settings.training.steps:
        requested = time.perf_counter()
        batches = next(steps)
        started = time.perf_counter()
        hooks.callbacks.before_step(state.step + 1)
        report = train_step(state, batches)
        state.device.synchronize()
        seconds = time.perf_counter() - started
        values = _values(state, report) | throughput(seconds)
        values |= hooks.finish_step(report, seconds, started - requested)
        result.verdict = hooks.callbacks.verdict
        if result.verdict != "go_on":
            break
        result.expert_load = report.expert_load
        if hooks.is_due(settings.validation.interval_steps):
            validation = _validate(state, data, token_bytes_V, result)
            hooks.validated(validation)
            values |= validation
        hooks.recorder.log(state.step, values)
        result.stopped = hooks.agreed_stop()
        if result.stopped or hooks.is_due(settings.checkpoint.interval_steps):
            hooks.save_checkpoint()
        hooks.report_saved(wait=False)
        if result.stopped:
            break
    hooks.report_saved(wait=True)
    return result


def _values(state: TrainState, report: StepReport) -> dict[str, float]:
    values: dict[str, float] = {
        "tokens": state.tokens,
        "loss/train": report.loss,
        "learning_rate": report.learning_rate,
        "memory/peak_gib": state.device.peak_memory_gib(),
    }
    if report.grad_norm is not None:
        values["grad_norm"] = report.grad_norm
    for depth, loss in enumerate(report.mtp_losses, start=1):
        values[f"loss/mtp_{depth}"] = loss
    if report.expert_load:
        loads = report.expert_load.values()
        values["loss/load_balancing"] = sum(report.balance_losses.values()) / len(report.balance_losses)
        values["experts/load_imbalance"] = max(max(load) * len(load) for load in loads)
        values["experts/dead"] = sum(share == 0 for load in loads for share in load)
    if state.skipped_steps:
        values["skipped_steps"] = state.skipped_steps
    if state.graph is not None and state.graph.num_repeated_steps:
        values["repeated_steps"] = state.graph.num_repeated_steps
    return values


def _validate(
    state: TrainState, data: PretrainData, token_bytes_V: torch.Tensor, result: FitResult
) -> dict[str, float]:
    """Measure the held-out loss per token, and in bits per byte of the text it predicts."""
    rank, size = state.parallel.data_rank, state.parallel.data_size
    num_bytes = 0.0

    def counted() -> Iterator[list[Batch]]:
        nonlocal num_bytes
        for batches in data.validation_batches(rank, size):
            num_bytes += sum(_target_bytes(batch, token_bytes_V) for batch in batches)
            yield batches

    # reset the counts, which the instruments' evaluation adds to as well
    acceptance_counts(state)
    total, tokens = evaluate(state, counted())
    total_bytes = torch.tensor([num_bytes], dtype=torch.float64, device=torch.cuda.current_device())
    if state.parallel.world_size > 1:
        torch.distributed.all_reduce(total_bytes, group=state.parallel.groups.dp)
    result.validation_loss = total / tokens
    result.bits_per_byte = total / math.log(2) / total_bytes.item()
    return {
        "loss/validation": result.validation_loss,
        "bits_per_byte/validation": result.bits_per_byte,
        **acceptance_values(acceptance_counts(state)),
        **_validate_sources(state, data),
    }


def _validate_sources(state: TrainState, data: PretrainData) -> dict[str, float]:
    """Measure the held-out loss of each source of a blend; {} for a single source."""
    values = {}
    for name, batches in data.validation_sources(state.parallel.data_rank, state.parallel.data_size):
        total, tokens = evaluate(state, batches)
        values[f"loss/validation/{name}"] = total / tokens
    return values


def acceptance_values(counts_per_depth: list[list[float]]) -> dict[str, float]:
    """Return acceptance rates per depth, and acceptance lengths: tokens per verification pass, 1 + a₁ + a₁a₂ + …

    `counts_per_depth`: (drafts verified, accepted greedily, Σ min(p, q)) of each depth. Depths from the first one
    without a verified draft on are left out.
    """
    values: dict[str, float] = {}
    for name, column in (("greedy", 1), ("sampled", 2)):
        length = accepted_so_far = 1.0
        for depth, counts in enumerate(counts_per_depth, start=1):
            if counts[0] == 0:
                break
            rate = counts[column] / counts[0]
            values[f"acceptance_rate/{name}_{depth}"] = rate
            accepted_so_far *= rate
            length += accepted_so_far
        if counts_per_depth:
            values[f"acceptance_length/{name}"] = length
    return values


def _target_bytes(batch: Batch, token_bytes_V: torch.Tensor) -> float:
    return float((token_bytes_V[batch.labels_BT.cpu()] * batch.loss_mask_BT.cpu()).sum())
