"""A step's passes as one CUDA graph train as they do without it: MTP, balance loss, several micro-batches, masks.

Layouts of several GPUs are not covered.
"""

from typing import Any

import pytest
import torch

from megatron_q3n.config import UserError, validate
from tests.backends import GPU_TE, MODEL, TINY, qualify_kernels


def test_says_what_keeps_a_step_from_being_a_graph() -> None:
    packed = {"mask_document_boundaries": True, **TINY["data"]}
    training = {**TINY["training"], "micro_batch_size": 1, "cuda_graph": True}
    with pytest.raises(UserError, match="gives every batch other shapes"):
        validate({**TINY, "data": packed, "training": training})
    training = {**TINY["training"], "sequence_length": 255, "cuda_graph": True}
    with pytest.raises(UserError, match="sequence_length=255 is not a multiple of 128"):
        validate({**TINY, "training": training})


@pytest.mark.gpu
def test_a_graph_that_copies_from_the_host_is_found() -> None:
    from megatron_q3n.device.graph_nodes import nodes_that_touch_the_host

    x = torch.zeros(64, device="cuda")
    pinned = torch.ones(64).pin_memory()
    for from_host in (False, True):
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            y = x + 1
            x.copy_(pinned if from_host else y, non_blocking=True)
        found = nodes_that_touch_the_host(graph)
        assert found == (["copy HostToDevice"] if from_host else [])


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [None, "hybrid"])
def test_trains_as_without_a_graph(fp8: str | None, alone: Any) -> None:
    from dataclasses import replace

    from megatron_q3n.data.batch import batch_of_rows
    from megatron_q3n.parallel import seed
    from megatron_q3n.training.state import build_state
    from megatron_q3n.training.step import train_step

    device, parallel = alone
    losses, norms = [], []
    for graph in (False, True):
        # wide enough for FP8, and three micro-batches, of which the first overwrites and the others add
        settings = {
            "micro_batch_size": 4, "global_batch_size": 12, "sequence_length": 128, "cuda_graph": graph,
        }  # fmt: skip
        config = validate(
            {
                **TINY,
                "model": MODEL | {"moe_shared_expert_intermediate_size": 64},
                "precision": {"compute": "bf16", "fp8": fp8},
                "training": TINY["training"] | settings,
            }
        )
        chosen = qualify_kernels(device.torch_device, config)
        parallel_state = replace(device, model_backend=GPU_TE.model)
        seed(config.training.seed)  # the same weights both times
        state = build_state(config, parallel_state, parallel)
        assert (state.graph is not None) == graph, chosen
        steps = []
        for step in range(8):
            generator = torch.Generator().manual_seed(step)
            batches = []
            for _ in range(3):
                walks = torch.randint(1, 4, (4, 129), generator=generator).cumsum(1) % 64
                mask = (torch.rand(4, 128, generator=generator) > 0.3).float()
                batches.append(
                    batch_of_rows(walks[:, :-1].contiguous(), walks[:, 1:].contiguous(), mask)
                )
            steps.append(train_step(state, batches))
        losses.append([s.loss for s in steps] + [x for s in steps for x in s.mtp_losses])
        norms.append([s.grad_norm for s in steps])
    tolerance = 1e-3 if fp8 is None else 1e-2
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert norms[1] == pytest.approx(norms[0], rel=10 * tolerance)
    assert losses[0][7] < 0.9 * losses[0][0], "too little is learnt for a wrong gradient to show"
