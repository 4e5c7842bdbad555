"""Instruments: the callback that measures the inside of the model at step 1 and every `instruments.interval_steps`."""

import math
import time
from collections.abc import Callable
from typing import Any

from megatron_q3n.instruments import probes, weights
from megatron_q3n.instruments.readings import Loads, load_readings, readings
from megatron_q3n.instruments.tally import Tally
from megatron_q3n.training.callbacks import Callback
from megatron_q3n.training.state import TrainState
from megatron_q3n.training.step import StepReport, evaluate


class Instruments(Callback):
    """Measurements of one run; steps without a measurement are as without instruments."""

    def __init__(self, state: TrainState, write_load: Callable[[int, Loads], None] = lambda *_: None) -> None:
        """Wrap the optimizer's `get_grad_norm`. `write_load` gets (step, expert load by MoE layer) when measured."""
        self._state, self._write_load = state, write_load
        config = state.config
        self._settings, self._layers = config.instruments, config.model.num_layers
        self._tally: Tally | None = None
        self._gradients: weights.GradientReader | None = None
        if self._settings.interval_steps:
            sums, maxima = zip(probes.tables(config), weights.tables(config))
            self._tally = Tally({**sums[0], **sums[1]}, {**maxima[0], **maxima[1]})
            self._gradients = weights.GradientReader(state.models, state.optimizer, self._layers, self._tally)

    def is_measured(self, step: int) -> bool:
        """Whether this step is measured."""
        interval = self._settings.interval_steps
        return interval > 0 and (step == 1 or step % interval == 0)

    def before_step(self, step: int) -> None:
        """Request the gradient norms of a step that is measured, and clear what an aborted step left."""
        if self._tally is None or self._gradients is None:
            return
        is_measured = self.is_measured(step)
        self._gradients.request(is_measured)
        if is_measured:
            self._tally.clear()

    def after_step(self, step: int, report: StepReport) -> dict[str, float]:
        """Measure the model after a step, and the time that it takes. A collective call.

        Returns: the metrics, the same on every rank except the time; empty if the step is not measured.
        """
        started = time.perf_counter()
        values = self.measure(report)
        if values:
            self._state.device.synchronize()
            values["throughput/instruments_seconds"] = time.perf_counter() - started
        return values

    def measure(self, report: StepReport) -> dict[str, float]:
        """Measure the model on a part of the last step's batch. A collective call.

        Returns: the metrics, the same on every rank; empty if the step is not measured.
        """
        if self._tally is None or not self.is_measured(self._state.step):
            return {}
        self._state.gather_parameters()
        with probes.attached(self._state.models, self._tally):
            evaluate(self._state, [self._measured_part(report.batches)])
        weights.measure_norm_scales(self._state.models, self._layers, self._tally)
        self._tally.all_reduce(self._state.parallel.world_size)
        values = dict(readings(self._tally, self._layers))
        if report.expert_load:
            self._write_load(self._state.step, report.expert_load)
        return values | dict(load_readings(report.expert_load))

    def _measured_part(self, batches: list[Any]) -> list[Any]:
        """Return this replica's part of the first `instruments.global_rows`, in whole micro-batches.

        The rows of the micro-batches at one position, over all replicas, are consecutive in the global batch
        (data/pretrain.py), so their first ones hold its first rows. If stages are interleaved, their number is a
        multiple of the number of stages.
        """
        layout, training = self._state.config.parallel, self._state.config.training
        rows_at_once = training.micro_batch_size * self._state.parallel.data_size
        number = math.ceil(self._settings.global_rows / rows_at_once)
        if layout.virtual_pipeline_model_parallel_size:
            stages = layout.pipeline_model_parallel_size
            number = math.ceil(number / stages) * stages
        return batches[:number]
