"""Capacity of the expert exchange in captured steps: how many rows a rank needs, and how many its buffers hold.

Rows are counted on the device, in training passes only. The most rows of any rank in the passes so far, times
`parallel.expert_capacity_headroom`, is the capacity with which a step is captured; no dispatch can need more than every
token times the experts that it can have on a rank.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_q3n.kernels.moe.expert_exchange import SymmetricExchange


class ExchangeCapacity:
    """Rows that training passes needed, and the capacity of the captured ones; the same on every rank."""

    def __init__(self, exchange: SymmetricExchange, headroom: float) -> None:
        self._exchange, self.headroom = exchange, headroom
        self._most_rows = 0
        self.rows = 0
        """Capacity of the captured step."""

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the rows of the training passes inside the context, which are exact. A collective call."""
        self.reset()
        yield
        self._most_rows = max(self._most_rows, self.rows_needed())

    @contextmanager
    def static(self) -> Iterator[None]:
        """Give every dispatch captured inside the context the same number of rows."""
        wanted = math.ceil(self._most_rows * self.headroom)
        with self._exchange.static_capacity(wanted) as self.rows:
            yield

    def reset(self) -> None:
        """Forget the count on the device, which validation passes raise too."""
        self._exchange.peak_rows.zero_()

    def rows_needed(self) -> int:
        """Return the most rows of a dispatch of any rank since `reset`. A collective call; the host waits."""
        rows = self._exchange.peak_rows.clone()
        torch.distributed.all_reduce(rows, op=torch.distributed.ReduceOp.MAX)
        return int(rows.item())
