"""megatron-core in this very process: one rank, on whatever device is there."""

from collections.abc import Iterator
from typing import Any

import pytest

from megatron_q3n.config import validate


@pytest.fixture(scope="session")
def alone() -> Iterator[Any]:
    """Return (device, Parallel) of a run of one process; imports megatron-core late, which takes seconds."""
    from megatron_q3n.device import choose_device, quiet_known_warnings

    quiet_known_warnings()
    from megatron_q3n import parallel

    config = validate({})
    device = choose_device(config)
    yield device, parallel.initialize(config, device)
    parallel.shutdown()
