"""Straggler detection: each rank's own time per step, compared over all ranks.

The whole step takes equally long on every rank, because ranks wait for each other in collectives. A straggler shows in
the time until a rank's own gradients are ready, before it enters their reduction. Ranks of one tensor, pipeline or
expert parallel group wait for each other within that time as well, so all ranks of the group look slow. The time that a
rank waits for data is reported separately.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_q3n.config.health import HealthConfig
from megatron_q3n.parallel import Parallel

FILE = "logs/stragglers.jsonl"


class Stragglers:
    """This rank's own times per step, and their comparison with the other ranks' at an interval."""

    def __init__(self, settings: HealthConfig, group: Parallel, run_dir: Path, host: str) -> None:
        self._settings, self._group, self._path = settings, group, run_dir / FILE
        self._hosts: list[str] = [""] * group.world_size
        if group.world_size > 1:
            torch.distributed.all_gather_object(self._hosts, host)
        else:
            self._hosts = [host]
        self._suspect: int | None = None
        self._own: list[float] = []
        self._data: list[float] = []

    def add(self, own_seconds: float | None, data_seconds: float) -> None:
        """Add one step of this rank; `own_seconds` is None if it could not be measured."""
        if own_seconds is not None:
            self._own.append(own_seconds)
        self._data.append(data_seconds)

    def compare(self, step: int, note: Callable[[str], None]) -> dict[str, float]:
        """Every `straggler_interval_steps`, write all ranks' times to logs/stragglers.jsonl and name a straggler.

        Returns: metrics for the step; empty between the reports. A collective call.
        """
        interval = self._settings.straggler_interval_steps
        if not interval or step % interval or not self._own:
            return {}
        table = self._gathered(statistics.fmean(self._own), statistics.fmean(self._data))
        self._own.clear()
        self._data.clear()
        own = [rank_times[0] for rank_times in table]
        median, slowest = statistics.median(own), max(range(len(own)), key=own.__getitem__)
        ratio = own[slowest] / median if median > 0 else 1.0
        suspect = slowest if ratio > self._settings.straggler_ratio else None
        again, self._suspect = suspect is not None and suspect == self._suspect, suspect
        if self._group.is_leader and self._group.world_size > 1:
            self._write(step, table)
            # once is noise
            if again:
                note(
                    f"step {step}: rank {slowest} on {self._hosts[slowest]} is slow: {own[slowest]:.3f} s of its "
                    f"own per step, the median is {median:.3f} s (x{ratio:.2f}); all ranks are in {self._path}"
                )
        return {"throughput/straggler_ratio": ratio}

    def _gathered(self, own: float, data: float) -> list[list[float]]:
        mine = torch.tensor([own, data], dtype=torch.float32, device=torch.cuda.current_device())
        if self._group.world_size == 1:
            return [mine.tolist()]
        every = [torch.empty_like(mine) for _ in range(self._group.world_size)]
        torch.distributed.all_gather(every, mine)
        return torch.stack(every).tolist()

    def _write(self, step: int, table: list[list[float]]) -> None:
        ranks = [
            {"rank": rank, "host": host, "own_seconds": round(own, 5), "data_seconds": round(data, 5)}
            for rank, (host, (own, data)) in enumerate(zip(self._hosts, table))
        ]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": time.time(), "ranks": ranks}) + "\n")


class RankTimer:
    """Time from a step's start until this rank's own gradients are ready, on the device's clock."""

    def __init__(self, is_cuda: bool, model_config: Any) -> None:
        """Wrap `finalize_model_grads_func` of megatron-core's TransformerConfig, which is called with the gradients."""
        self._is_cuda = is_cuda
        self._marks: list[Any] = []
        finalize = model_config.finalize_model_grads_func

        def finalize_after_mark(*arguments: Any, **options: Any) -> Any:
            self._mark()
            return finalize(*arguments, **options)

        model_config.finalize_model_grads_func = finalize_after_mark

    def start(self) -> None:
        """Mark the start of a step."""
        self._marks.clear()
        self._mark()

    def seconds(self) -> float | None:
        """Return the time of the step just done, None if it was not marked; a GPU must be synchronized before."""
        if len(self._marks) < 2:
            return None
        first, second = self._marks[:2]
        return first.elapsed_time(second) / 1000 if self._is_cuda else second - first

    def _mark(self) -> None:
        if not self._is_cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)
