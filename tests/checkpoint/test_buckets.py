"""Master weights and moments are saved correctly when gradients are reduced in several buckets.

Between buckets is padding, which megatron-core removes from its buffers but not from its offsets. Pipeline stages with
a copy of the embedding have two buckets too: tools/checks/check_layout.py covers those.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_q3n.checkpoint.saved_tensors import CheckpointTensors
from tests.checkpoint.tiny_state import fingerprint, state_of, step


@pytest.fixture
def small_buckets(alone: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a state with buckets of a few thousand elements instead of 40 million."""
    from megatron_q3n.training import state as module

    config = partial(module.DistributedDataParallelConfig, bucket_size=3000)
    monkeypatch.setattr(module, "DistributedDataParallelConfig", config)
    return state_of(alone, {"parallel": {"overlap_grad_reduce": True}})


def test_every_master_weight_equals_its_weight(small_buckets: Any, tmp_path: Path) -> None:
    from megatron_q3n import checkpoint

    state = small_buckets
    padded = [
        bucket.grad_data.numel() > bucket.numel_unpadded
        for part in state.optimizer.chained_optimizers
        for buffer in part.buffers
        for bucket in buffer.buckets[:-1]
    ]
    assert sum(padded) > 3, "the tested case is padding between buckets"
    step(state)
    before = fingerprint(state)
    path = checkpoint.save(state, tmp_path)
    tensors = CheckpointTensors(path)
    masters = [name for name in tensors.entries if name.startswith("optimizer.state.param.")]
    assert len(masters) > 90
    for name in masters:
        weight = tensors.read(name.removeprefix("optimizer.state.param."))
        assert tensors.read(name).equal(weight), name
    checkpoint.load(state, path, resume=True)
    assert fingerprint(state) == before
