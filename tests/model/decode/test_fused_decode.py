"""Decoding with every fused kernel of few tokens equals the whole forward pass: what the kernels alone, each tested
on arguments that a test makes, do not show is that they take what the layers give them.

fp32, without a GPU: the kernels run in Triton's interpreter.
"""

from typing import Any

import pytest
import torch

from tests.inference.tiny_model import random_prompts, tiny_model
from tests.model.decode.test_forward import assert_equal_to_full, decoded

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py has the kernels")

# heads of 128, for which the kernel of a few steps of the delta rule exists; the rest small, for the interpreter's sake
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
FUSED = [
    "attention of a few tokens",
    "experts of a few tokens",
    "gated delta net, few tokens",
    "greedy choice",
    "products of a few rows",
    "router's choice for a few tokens",
]


@pytest.fixture
def asked(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Use these kernels on the CPU too. Returns: the operations that took theirs, as the test goes on."""
    from megatron_q3n.kernels import registry

    assert triton_device == "cpu"
    used: set[str] = set()

    def is_fused(operation: str, tensor: torch.Tensor, forced: bool | None = None) -> bool:
        if forced is None and operation in FUSED:
            used.add(operation)
            return True
        return bool(forced)

    monkeypatch.setattr(registry, "is_fused", is_fused)
    return used


@pytest.mark.parametrize(
    ("lengths", "cuts"),
    [
        ([8], [[5, 7, 8]]),  # one prompt alone, in pieces of several tokens and of one
        ([23], [[20, 22, 23]]),  # behind a piece that is not short
        ([6, 4, 9], [[4, 6], [2, 4], [7, 9]]),
    ],
)
def test_equals_the_whole_forward_pass(alone: Any, asked: set[str], lengths: list[int], cuts: list[list[int]]) -> None:
    model = tiny_model(alone, **MODEL)
    prompts = random_prompts(lengths, 16)
    logits = decoded(model, prompts, cuts)
    assert asked >= set(FUSED) - {"greedy choice"}, asked
    asked.clear()
    assert_equal_to_full(model, prompts, logits)


@pytest.mark.slow
@pytest.mark.parametrize(("lengths", "depth"), [([3], 2), ([5, 1], 0)])
def test_generates_what_torch_does(
    alone: Any, asked: set[str], monkeypatch: pytest.MonkeyPatch, lengths: list[int], depth: int
) -> None:
    """Greedy, with prompts so short that they too are read by the kernels."""
    from megatron_q3n.inference.generate import generate
    from megatron_q3n.inference.sampling import Sampling

    model = tiny_model(alone, **MODEL)
    prompts, sampling = random_prompts(lengths, 16), Sampling(3, 0.0)
    fused = generate(model, prompts, sampling, draft_depth=depth)
    assert asked == set(FUSED)
    monkeypatch.undo()
    plain = generate(model, prompts, sampling, draft_depth=depth)
    assert [done.tokens for done in fused] == [done.tokens for done in plain]
    for ours, theirs in zip(fused, plain):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
