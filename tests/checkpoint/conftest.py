"""Quick saves: megatron-core collects garbage twice in each, over everything that imports left behind."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="package", autouse=True)
def frozen_imports(alone: Any) -> Iterator[None]:
    """Take what is imported out of the collector's sight, as a run does before its first step."""
    gc.freeze()
    yield
    gc.unfreeze()
