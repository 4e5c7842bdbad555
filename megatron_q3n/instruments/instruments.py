"""What the training loop calls at every step."""

import math
from collections.abc import Callable
from typing import Any

from megatron_q3n.instruments import probes, weights
from megatron_q3n.instruments.readings import Loads, load_readings, readings
from megatron_q3n.instruments.tally import Tally
from megatron_q3n.training.state import TrainState
from megatron_q3n.training.step import StepReport, evaluate


class Instruments:
    """Measures a run at step 1 and every `instruments.interval_steps`; at other steps it does nothing at all."""

    def __init__(self, state: TrainState, keep_load: Callable[[int, Loads], None] = lambda *_: None) -> None:
        """Listen at the state's optimizer. `keep_load` is told (step, each layer's expert load) when measured."""
        self._state, self._keep_load = state, keep_load
        config = state.config
        self._settings, self._layers = config.instruments, config.model.num_layers
        self._tally: Tally | None = None
        self._gradients: weights.GradientReader | None = None
        if self._settings.interval_steps:
            sums, maxima = zip(probes.tables(config), weights.tables(config))
            self._tally = Tally({**sums[0], **sums[1]}, {**maxima[0], **maxima[1]})
            self._gradients = weights.GradientReader(state.models, state.optimizer, self._layers, self._tally)

    def measures(self, step: int) -> bool:
        """Whether this step is looked at."""
        interval = self._settings.interval_steps
        return interval > 0 and (step == 1 or step % interval == 0)

    def before_step(self) -> None:
        """A step begins: its gradient may be wanted. What a step left that never ended is forgotten."""
        if self._tally is None or self._gradients is None:
            return
        wanted = self.measures(self._state.step + 1)
        self._gradients.ask(wanted)
        if wanted:
            self._tally.clear()

    def after_step(self, batches: list[Any], report: StepReport) -> dict[str, float]:
        """Look at the model after a step, with a part of the step's batch. A collective call.

        Returns: the numbers, the same on every rank; empty between the measured steps.
        """
        if self._tally is None or not self.measures(self._state.step):
            return {}
        self._state.gather_parameters()
        with probes.listening(self._state.models, self._tally):
            evaluate(self._state, [self._sample(batches)])
        weights.gather_norms(self._state.models, self._layers, self._tally)
        self._tally.share(self._state.parallel.world_size)
        values = dict(readings(self._tally, self._layers))
        if report.expert_load:
            self._keep_load(self._state.step, report.expert_load)
        return values | dict(load_readings(report.expert_load))

    def _sample(self, batches: list[Any]) -> list[Any]:
        """Return the first micro-batches, as many as asked for; interleaved stages take multiples of their number."""
        layout = self._state.config.parallel
        number = self._settings.microbatches
        if layout.virtual_pipeline_model_parallel_size:
            stages = layout.pipeline_model_parallel_size
            number = math.ceil(number / stages) * stages
        return batches[:number]
