"""Variants of attention (gates, windows, patterns): validation, sizes, and generation equal to training.

Forward and backward against the reference: tests/model/test_parity.py. Layouts:
tests/tools/layouts/test_more_layouts.py. Not covered: TransformerEngine, whose attention takes the window from the same
TransformerConfig field.
"""

import itertools
from typing import Any

import pytest
import torch

from megatron_q3n.config import ModelConfig, UserError, validate
from megatron_q3n.config.sizes import flops_per_token, parameters
from megatron_q3n.packing import Packing
from tests.inference.tiny_model import TINY, full_logits, random_prompts, tiny_model
from tests.model.decode.test_forward import assert_equal_to_full, decoded

WINDOW = {"mixer_pattern": "SG*S", "attention_window_tokens": 9}
MODELS: dict[str, dict[str, Any]] = {
    "no gate": {"attention_gate": "none"},
    "headwise": {"attention_gate": "headwise"},
    "shared silu": {"attention_gate_shared": True, "attention_gate_activation": "silu"},
    "values": {"attention_gate_position": "value"},
    "one gate for all values": {
        "attention_gate": "headwise",
        "attention_gate_position": "value",
        "attention_gate_shared": True,
    },
    "windows": WINDOW,
    "only attention": {"mixer_pattern": "*"},
    "only Gated DeltaNet": {"mixer_pattern": "G", "mtp_num_layers": 0},
    "expert bias": {"moe_router_enable_expert_bias": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_sizes_match_and_generation_equals_training(name: str, alone: Any) -> None:
    """Prompts in chunks and token by token, batched and packed, against the training forward pass."""
    model = tiny_model(alone, **MODELS[name])
    for module in model.modules():
        if getattr(module, "bias_update_rate", None) is not None:
            module.expert_bias.copy_(torch.linspace(-1, 1, module.num_experts))
    config = ModelConfig(**TINY, **MODELS[name])
    assert sum(p.numel() for p in model.parameters()) == parameters(config).total_with_mtp
    prompts = random_prompts([50, 40, 61], 64)
    cuts = [[20, *range(30, 51)], [10, *range(20, 41)], [1, 41, *range(42, 62)]]
    assert_equal_to_full(model, prompts, decoded(model, prompts, cuts))


def test_a_window_masks_older_tokens(alone: Any) -> None:
    """Two layers with windows of 5 tokens: a change affects the next 8 tokens, and not the ninth."""
    settings = {"mixer_pattern": "S", "num_layers": 2, "attention_window_tokens": 5}
    model = tiny_model(alone, mtp_num_layers=0, **settings)
    (tokens,) = random_prompts([40], 64)
    changed = [*tokens[:10], (tokens[10] + 1) % 64, *tokens[11:]]
    difference = (full_logits(model, tokens) - full_logits(model, changed)).abs().amax(-1)
    assert (difference > 1e-4).nonzero().flatten().tolist() == list(range(10, 19))


@pytest.mark.parametrize("window", [1, 3, 12, 100])
@pytest.mark.parametrize("lengths", [None, [8, 16, 24]])
def test_masks_of_ranks_are_those_of_one_process(lengths: list[int] | None, window: int) -> None:
    """The mask under context parallelism 2 is a rearrangement of one process's, packed or not."""
    from types import SimpleNamespace

    from megatron_q3n.model.attention.core import visible_keys
    from megatron_q3n.model.context_parallel import zigzag_indices

    def group(size: int, rank: int) -> Any:
        return SimpleNamespace(size=lambda: size, rank=lambda: rank)

    device = torch.device("cpu")
    packing = None if lengths is None else Packing.of([0, *itertools.accumulate(lengths)])
    whole = visible_keys(packing, 48, group(1, 0), device, window)
    assert whole is not None
    order = zigzag_indices(packing, 48, 2, torch.device("cpu"))
    for rank in range(2):
        local = visible_keys(packing, 24, group(2, rank), device, window)
        torch.testing.assert_close(local, whole[order[rank]][:, order.flatten()])
    starts = torch.arange(48) if packing is None else packing.position_T
    assert whole.sum(1).tolist() == (starts + 1).clamp(max=window).tolist()


def test_flops_of_a_window_count_the_tokens_in_it() -> None:
    def core(length: int, **settings: Any) -> float:
        return flops_per_token(validate({"model": settings}).model, length).attention_core

    share = sum(min(i, 64) for i in range(1, 257)) / sum(range(1, 257))
    window = core(256, mixer_pattern="S", attention_window_tokens=64)
    assert window / core(256, mixer_pattern="*") == pytest.approx(share, rel=0.01)
    everything = core(256, mixer_pattern="S", attention_window_tokens=1000)
    assert everything == core(256, mixer_pattern="*")
    assert core(256, mixer_pattern="G") == 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"mixer_pattern": "GGS*"}, "set its window with model.attention_window_tokens"),
        ({"attention_window_tokens": 8}, "attention_window_tokens=8 has no effect with"),
        ({"mixer_pattern": "GM"}, r"use only G .* S \(sliding-window attention\)"),
        (
            {"attention_gate": "none", "attention_gate_activation": "silu"},
            "attention_gate_activation=silu has no effect with model.attention_gate=none; set it to sigmoid",
        ),
        ({"attention_gate": "none", "attention_gate_shared": True}, "set it to False"),
        ({"moe_router_bias_update_rate": 0.1}, "no effect without model.moe_router_enable_expert_bias"),
        (
            {"moe_router_enable_expert_bias": True, "megatron": {"moe_router_score_function": "sigmoid"}},
            "moe_router_score_function must be softmax, found sigmoid",
        ),
        ({"megatron": {"window_size": [8, 0]}}, "set model.attention_window_tokens instead"),
        ({"megatron": {"attention_output_gate": False}}, "set model.attention_gate instead"),
    ],
)
def test_settings_without_effect_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate({"model": model})


def test_windows_over_context_parallel_ranks_need_our_own_attention() -> None:
    layout = {"context_parallel_size": 2, "world_size": 2}
    with pytest.raises(UserError, match="does not support a sliding window"):
        validate({"model": WINDOW, "parallel": layout})
    validate({"model": WINDOW | {"backend": "torch"}, "parallel": layout})
