"""Decoding with all fused decode kernels equals the full forward pass, with the arguments that the layers pass.

fp32, without a GPU: the kernels run in Triton's interpreter. Tests of single kernels: tests/kernels/decode/.
"""

from typing import Any

import pytest
import torch

from megatron_q3n.config.execution_plan import Kernel
from tests.execution_plans import DECODE_KERNELS, fused_plan, launched_kernels, use_plan
from tests.inference.tiny_model import random_prompts, tiny_config, tiny_model
from tests.model.decode.test_forward import assert_equal_to_full, decoded

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/inference/test_gpu.py runs the kernels")

# heads of 128, which the decode Gated DeltaNet step supports; everything else small, because the interpreter is slow
MODEL = {
    "num_layers": 2,
    "mixer_pattern": "G*",
    "moe_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "kv_channels": 32,
    "vocab_size": 16,
}


@pytest.fixture
def model(alone: Any, triton_device: str) -> Any:
    assert triton_device == "cpu"
    return tiny_model(alone, **MODEL)


@pytest.mark.parametrize(
    ("lengths", "cuts"),
    [
        ([8], [[5, 7, 8]]),  # a single prompt, in chunks of several tokens and of one
        ([23], [[20, 22, 23]]),  # after a chunk that is not a short span
        ([7, 5, 10], [[4, 6, 7], [2, 4, 5], [7, 9, 10]]),  # packed, then six rows and three, of which a GEMM runs three
    ],
)
def test_equals_the_full_forward_pass(model: Any, lengths: list[int], cuts: list[list[int]]) -> None:
    prompts = random_prompts(lengths, 16)
    with use_plan(model, fused_plan(tiny_config(**MODEL), DECODE_KERNELS)), launched_kernels() as launched:
        logits = decoded(model, prompts, cuts)
    assert launched == DECODE_KERNELS - {Kernel.DECODE_ARGMAX}
    with launched_kernels() as launched:
        assert_equal_to_full(model, prompts, logits)
    assert not launched, "the reference is torch's"


@pytest.mark.slow
@pytest.mark.parametrize(("lengths", "depth"), [([3], 2), ([5, 1], 0)])
def test_generates_the_same_as_torch(model: Any, lengths: list[int], depth: int) -> None:
    """Greedy, with prompts so short that the decode kernels run the prefill too."""
    from megatron_q3n.inference.generate import generate
    from megatron_q3n.inference.sampling import Sampling

    prompts, sampling = random_prompts(lengths, 16), Sampling(3, 0.0)
    with use_plan(model, fused_plan(tiny_config(**MODEL), DECODE_KERNELS)), launched_kernels() as launched:
        fused = generate(model, prompts, sampling, draft_depth=depth)
    assert launched == DECODE_KERNELS
    plain = generate(model, prompts, sampling, draft_depth=depth)
    assert [done.tokens for done in fused] == [done.tokens for done in plain]
    for ours, theirs in zip(fused, plain):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
