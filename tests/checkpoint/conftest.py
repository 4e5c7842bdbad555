"""Fixture that makes saves fast: megatron-core collects garbage twice in each, over all imported modules."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="package", autouse=True)
def frozen_imports(alone: Any) -> Iterator[None]:
    """Exclude imported objects from garbage collection, as a run does before its first step."""
    gc.freeze()
    yield
    gc.unfreeze()
