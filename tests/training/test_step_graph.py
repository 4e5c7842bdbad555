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
    with pytest.raises(UserError, match="shapes differ from batch to batch"):
        validate({**TINY, "data": packed, "training": training})
    training = {**TINY["training"], "sequence_length": 255, "cuda_graph": True}
    with pytest.raises(UserError, match="sequence_length=255 is not a multiple of 128"):
        validate({**TINY, "training": training})


def test_training_passes_trust_no_earlier_copy_of_weights(alone: Any) -> None:
    """Whatever changed the weights in between; only `same_weights=True` keeps the copies."""
    from megatron_q3n.kernels.moe.fp8_experts import Fp8WeightCopy
    from megatron_q3n.training.state import build_state
    from megatron_q3n.training.step import run_microbatches

    state = build_state(validate(TINY), *alone)
    assert len(state.expert_weights) == 2 * sum("router.weight" in n for n, _ in state.models[0].named_parameters())
    for weight in state.expert_weights:
        weight.fp8_copy = Fp8WeightCopy((weight, weight, weight), weight._version)  # type: ignore[attr-defined]
    copies = [weight.fp8_copy for weight in state.expert_weights]  # type: ignore[attr-defined]
    batches = batches_of(0, sequence=32)[:1]
    run_microbatches(state, batches, forward_only=True)
    run_microbatches(state, batches, forward_only=False, same_weights=True)
    assert all(copy.source_version is not None for copy in copies)
    run_microbatches(state, batches, forward_only=False)
    assert all(copy.source_version is None for copy in copies)


@pytest.mark.gpu
def test_a_graph_that_copies_from_the_host_is_found() -> None:
    from megatron_q3n.device.cuda_graph_nodes import find_host_nodes

    x = torch.zeros(64, device="cuda")
    pinned = torch.ones(64).pin_memory()
    for from_host in (False, True):
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            y = x + 1
            x.copy_(pinned if from_host else y, non_blocking=True)
        found = find_host_nodes(graph)
        assert found == (["copy HostToDevice"] if from_host else [])


def built(alone: Any, fp8: str | None, graph: bool) -> Any:
    """Build a state wide enough for FP8, with three micro-batches, of which the first overwrites and the others add."""
    from dataclasses import replace

    from megatron_q3n.parallel import seed
    from megatron_q3n.training.state import build_state

    device, parallel = alone
    settings = {"micro_batch_size": 4, "global_batch_size": 12, "sequence_length": 128, "cuda_graph": graph}
    config = validate(
        {
            **TINY,
            "model": MODEL | {"moe_shared_expert_intermediate_size": 64},
            "precision": {"compute": "bf16", "fp8": fp8},
            "training": TINY["training"] | settings,
        }
    )
    chosen = qualify_kernels(device.torch_device, config)
    seed(config.training.seed)  # the same weights every time
    state = build_state(config, replace(device, model_backend=GPU_TE.model), parallel)
    assert (state.graph is not None) == graph, chosen
    return state


def batches_of(step: int, sequence: int = 128) -> list[Any]:
    """Return a step's three micro-batches."""
    from megatron_q3n.data.batch import causal_batch

    generator = torch.Generator().manual_seed(step)
    batches = []
    for _ in range(3):
        walks = torch.randint(1, 4, (4, sequence + 1), generator=generator).cumsum(1) % 64
        mask = (torch.rand(4, sequence, generator=generator) > 0.3).float()
        batches.append(causal_batch(walks[:, :-1].contiguous(), walks[:, 1:].contiguous(), mask))
    return batches


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [None, "hybrid"])
def test_trains_as_without_a_graph(fp8: str | None, alone: Any) -> None:
    from megatron_q3n.training.step import train_step

    losses, norms = [], []
    for graph in (False, True):
        state = built(alone, fp8, graph)
        steps = [train_step(state, batches_of(step)) for step in range(8)]
        losses.append([s.loss for s in steps] + [x for s in steps for x in s.mtp_losses])
        norms.append([s.grad_norm for s in steps])
    tolerance = 1e-3 if fp8 is None else 1e-2
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert norms[1] == pytest.approx(norms[0], rel=10 * tolerance)
    assert losses[0][7] < 0.9 * losses[0][0], "too little is learnt for a wrong gradient to show"


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_every_step_multiplies_by_the_weights_it_began_with(graph: bool, alone: Any) -> None:
    """Whatever changed them: the optimizer, or a write that torch's version counter does not see, as in loading."""
    from megatron_q3n.kernels.moe import fp8_experts, fp8_quantize_triton
    from megatron_q3n.training.step import evaluate, train_step

    state = built(alone, "hybrid", graph)
    places = set()
    for step in range(6):
        if step in (1, 4):
            for weight in state.expert_weights:
                weight.data.mul_(1.5)
        before = [weight.detach().clone() for weight in state.expert_weights]
        evaluate(state, [batches_of(step)])  # must not leave its own copies behind, nor free what a graph writes
        others = [torch.full_like(p, 7) for p in state.models[0].parameters() for _ in range(2)]
        train_step(state, batches_of(step))
        assert all(other.eq(7).all() for other in others), "a graph wrote into memory of others"
        copies = [fp8_experts.fp8_copy_of(weight) for weight in state.expert_weights]
        for weight, was, copy in zip(state.expert_weights, before, copies, strict=True):
            assert copy is not None
            assert not weight.equal(was), "the step changed nothing: a stale copy would not show"
            fresh = fp8_quantize_triton.allocate_quantized_weight(was)
            fp8_quantize_triton.quantize_weight(was, fresh)
            for actual, expected in zip(copy.quantized, fresh):
                assert actual.view(torch.uint8).equal(expected.view(torch.uint8)), step
        places.add(tuple(t.data_ptr() for copy in copies if copy for t in copy.quantized))
    assert len(places) == 1, "a captured step reads where the copies lay then"
