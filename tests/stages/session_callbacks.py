"""Not a test: callbacks that the runs of test_session.py name by import path."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from megatron_q3n.training.callbacks import Callback, RunContext
from megatron_q3n.training.step import StepReport


class MomentLog(Callback):
    """Writes every moment of the run to moments.jsonl in the run directory, and returns a metric."""

    def __init__(self, label: str) -> None:
        self.label = label

    def _write(self, moment: str, *values: Any) -> None:
        with (self.run.run_dir / "moments.jsonl").open("a") as file:
            file.write(json.dumps([moment, *values]) + "\n")

    def on_run_start(self, run: RunContext) -> None:
        self.run = run
        self._write("on_run_start", self.label)
        run.note(f"moments of {self.label}")

    def after_load(self, step: int) -> None:
        assert step == self.run.state.step
        self._write("after_load", step)

    def before_step(self, step: int) -> None:
        self._write("before_step", step)

    def before_update(self, step: int, loss: float, grad_norm: float) -> None:
        self._write("before_update", step)

    def after_step(self, step: int, report: StepReport) -> dict[str, float]:
        self._write("after_step", step)
        assert report.step_seconds > 0
        return {"custom/microbatches": len(report.batches)}

    def after_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write("after_validation", step, sorted(metrics))

    def before_save(self, step: int) -> None:
        self._write("before_save", step)

    def after_save(self, step: int) -> None:
        self._write("after_save", step)

    def on_rollback(self, step: int) -> None:
        self._write("on_rollback", step)

    def on_stop(self, reason: str) -> None:
        self._write("on_stop", reason)

    def on_run_end(self, status: str) -> None:
        self._write("on_run_end", status)


class ScaledGradients(Callback):
    """Multiplies the gradient of the model's output by a factor in one step; "nan" makes loss and gradient NaN."""

    def __init__(self, step: int, factor: float | str) -> None:
        self.step, self.factor = step, float(factor)

    def on_run_start(self, run: RunContext) -> None:
        self.chunk = run.state.chunks[-1]

    def before_step(self, step: int) -> None:
        if step == self.step:
            # once, not again after a roll-back
            self.step = 0
            self.handle = self.chunk.register_forward_hook(self._scale)

    def after_step(self, step: int, report: StepReport) -> None:
        self._remove()

    def on_rollback(self, step: int) -> None:
        self._remove()

    def _remove(self) -> None:
        if hasattr(self, "handle"):
            self.handle.remove()

    def _scale(self, _module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not output.requires_grad:
            return output
        if self.factor != self.factor:
            return output * self.factor
        output.register_hook(lambda gradient: gradient * self.factor)
        return output


class WithheldUpdate(Callback):
    """Withholds the update of one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def before_update(self, step: int, loss: float, grad_norm: float) -> bool:
        return step != self.step
