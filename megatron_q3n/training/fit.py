"""The loop: step, report, validate, save, stop. It receives `save` and knows nothing of files or stages."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from megatron_q3n.config.sizes import flops_per_token
from megatron_q3n.data.batch import Batch
from megatron_q3n.data.pretrain import PretrainData
from megatron_q3n.training.measuring import Measuring, Unmeasured
from megatron_q3n.training.state import TrainState
from megatron_q3n.training.step import StepReport, evaluate, kept_drafts, train_step
from megatron_q3n.training.watch import Unwatched, Verdict, Watch


class StepLog(Protocol):
    """What the loop needs of a recorder; `metrics.recorder.Recorder` is one."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record one step's values."""

    def checkpointed(self, step: int) -> None:
        """Everything up to this step is safe on disk."""

    def note(self, message: str) -> None:
        """Tell the user something."""


@dataclass
class Pace:
    """What the caller lends to the loop."""

    save: Callable[[], object]  # may go on writing behind the training
    settle: Callable[[bool], list[int]]  # steps whose checkpoint is complete by now; True waits
    stop_reason: Callable[[], str | None]
    throughput: Callable[[int, float, float, float | None], dict[str, float]]
    peak_flops: float | None = None
    watch: Watch = field(default_factory=Unwatched)
    instruments: Measuring = field(default_factory=Unmeasured)


@dataclass
class FitResult:
    """How the loop ended: `stopped` is None when all steps are done, or the watch's verdict ended it."""

    stopped: str | None
    verdict: Verdict = "go_on"
    validation_loss: float | None = None
    bits_per_byte: float | None = None
    expert_load: dict[str, list[float]] = field(default_factory=dict)


def fit(state: TrainState, data: PretrainData, recorder: StepLog, pace: Pace) -> FitResult:
    """Train from state.step to the configured last step, or until `pace.stop_reason` names a reason.

    A stop saves first, a bad verdict of the watch does not. Every rank takes the same decisions.
    """
    settings, last, watch = state.config, state.config.training.steps, pace.watch
    flops = flops_per_token(settings.model, settings.training.sequence_length).total
    token_bytes = torch.from_numpy(np.asarray(data.tokenizer.token_num_bytes()))
    result = FitResult(stopped=None)
    rank, size = state.parallel.data_rank, state.parallel.data_size
    steps = watch.batches(lambda number: data.train_batches(number, rank, size), state.step)
    while state.step < last:
        asked = time.perf_counter()
        batches = next(steps)
        started = time.perf_counter()
        watch.before_step()
        pace.instruments.before_step()
        report = train_step(state, batches)
        state.device.synchronize()
        seconds = time.perf_counter() - started
        watch.beat(seconds)
        values = _values(state, report) | watch.after_step(state.step, started - asked)
        result.verdict = watch.verdict
        if result.verdict != "go_on":
            break
        values |= pace.throughput(settings.tokens_per_step, seconds, flops, pace.peak_flops)
        result.expert_load = report.expert_load
        values |= _measure(state, batches, report, pace)
        if _due(state.step, settings.validation.interval_steps, last):
            values |= _validate(state, data, token_bytes, result)
            watch.beat()
        recorder.log(state.step, values)
        reason = _agreed_stop(state, pace) if state.step < last else None
        if reason or _due(state.step, settings.checkpoint.interval_steps, last):
            pace.save()
            watch.beat()
        _report_checkpoints(recorder, pace, wait=False)
        if reason:
            result.stopped = reason
            break
    _report_checkpoints(recorder, pace, wait=True)
    return result


def _measure(state: TrainState, batches: list[Batch], report: StepReport, pace: Pace) -> dict[str, float]:
    """Look inside the model, if this step is one to be looked at, and say how long that took."""
    started = time.perf_counter()
    measured = pace.instruments.after_step(batches, report)
    if measured:
        state.device.synchronize()
        measured["throughput/instruments_seconds"] = time.perf_counter() - started
        pace.watch.beat()
    return measured


def _report_checkpoints(recorder: StepLog, pace: Pace, *, wait: bool) -> None:
    for step in pace.settle(wait):
        recorder.checkpointed(step)


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
        values["loss/balance"] = sum(report.balance_losses.values()) / len(report.balance_losses)
        values["experts/max_over_mean"] = max(max(load) * len(load) for load in loads)
        values["experts/dead"] = sum(share == 0 for load in loads for share in load)
    if state.skipped_steps:
        values["skipped_steps"] = state.skipped_steps
    return values


def _validate(state: TrainState, data: PretrainData, token_bytes: torch.Tensor, result: FitResult) -> dict[str, float]:
    """Measure the held-out loss per token and in bits per byte of the text it predicts."""
    rank, size = state.parallel.data_rank, state.parallel.data_size
    seen = 0.0

    def counted() -> object:
        nonlocal seen
        for batches in data.validation_batches(rank, size):
            seen += sum(_target_bytes(batch, token_bytes) for batch in batches)
            yield batches

    kept_drafts(state)  # what other evaluations left
    total, tokens = evaluate(state, counted())
    volume = torch.tensor([seen], dtype=torch.float64, device=torch.cuda.current_device())
    if state.parallel.world_size > 1:
        torch.distributed.all_reduce(volume, group=state.parallel.groups.dp)
    result.validation_loss = total / tokens
    result.bits_per_byte = total / math.log(2) / volume.item()
    return {
        "loss/validation": result.validation_loss,
        "bits_per_byte/validation": result.bits_per_byte,
        **acceptance_values(kept_drafts(state)),
    }


def acceptance_values(kept: list[list[float]]) -> dict[str, float]:
    """Name acceptance per depth, and the tokens a pass of the trunk yields by it: 1 + a₁ + a₁a₂ + …

    `kept`: (drafts judged, kept greedily, Σ min(p, q)) of each depth. Depths where none was judged are left out.
    """
    values: dict[str, float] = {}
    for name, column in (("greedy", 1), ("sampled", 2)):
        length = reached = 1.0
        for depth, counts in enumerate(kept, start=1):
            if counts[0] == 0:
                break
            share = counts[column] / counts[0]
            values[f"acceptance/{name}_{depth}"] = share
            reached *= share
            length += reached
        if kept:
            values[f"acceptance/{name}_length"] = length
    return values


def _target_bytes(batch: Batch, token_bytes: torch.Tensor) -> float:
    return float((token_bytes[batch.labels_BT.cpu()] * batch.loss_mask_BT.cpu()).sum())


def _due(step: int, interval: int, last: int) -> bool:
    return step == last or (interval > 0 and step % interval == 0)


def _agreed_stop(state: TrainState, pace: Pace) -> str | None:
    reason = pace.stop_reason()
    if state.parallel.any(reason is not None):
        return reason or "another process was asked to stop"
    return None
