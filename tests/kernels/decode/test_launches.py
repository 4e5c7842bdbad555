"""Decode path of the layers with fused kernels against megatron-core's modules, and its number of kernel launches.

fp32 on one process; sizes and dtypes of the kernels are covered by test_attention.py and test_gemm.py.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_q3n.config.execution_plan import Kernel
from megatron_q3n.kernels.decode import gemm as decode_gemm
from megatron_q3n.kernels.decode.operands import GemmOutput, RMSNormWeights
from tests.execution_plans import INTERPRETED_KERNELS, fused_plan, launched_kernels, use_plan
from tests.inference.tiny_model import random_prompts, tiny_config, tiny_model

# operators without a kernel launch on a GPU
NO_LAUNCH = {
    "view",
    "_unsafe_view",
    "transpose",
    "unsqueeze",
    "squeeze",
    "expand",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "t",
    "permute",
    "as_strided",
    "detach",
    "unbind",
    "alias",
    "_reshape_alias",
    "unfold",
    "empty",
    "empty_like",
    "new_empty",
    "lift_fresh",
}
# one layer of each kind, as small as the kernels support: the interpreter takes a millisecond for a dozen operations
SMALL = {
    "mixer_pattern": "G*",
    "num_layers": 2,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "kv_channels": 16,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "vocab_size": 16,
}


def on_plain_torch(alone: Any, **settings: Any) -> Any:
    """Build a model without TransformerEngine, whose fp32 products are TF32."""
    device, parallel = alone
    return tiny_model((replace(device, model_backend="torch"), parallel), **settings)


@contextmanager
def inference(model: Any) -> Iterator[None]:
    from megatron_q3n.model.decode.forward import generating

    with generating(model), torch.no_grad():
        yield


def attention_mixers(model: Any) -> list[Any]:
    """Return the model's attention layers, with QK-norms far from their initialization."""
    candidates = [x.self_attention for x in model.decoder.layers if hasattr(x, "self_attention")]
    mixers = [mixer for mixer in candidates if hasattr(mixer, "linear_qkv")]
    for mixer in mixers:
        for parameter in (mixer.q_layernorm.weight, mixer.k_layernorm.weight):
            torch.nn.init.normal_(parameter, std=0.2)
    assert mixers
    return mixers


def attention_inputs(model: Any, tokens: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return the span of new tokens of three sequences, a table of RoPE, and hidden states [T,N,X]."""
    from megatron_q3n.model.decode.span import Span
    from megatron_q3n.model.rope import RopeTable

    device = next(model.parameters()).device
    span = Span.from_device_starts(torch.tensor([9, 0, 37], device=device), tokens, 50 if tokens < 5 else 60)
    table = RopeTable.build(64, model.rotary_pos_emb, torch.float32)
    return span, table, torch.randn(tokens, 3, 32, device=device)


def kv_caches(hidden: torch.Tensor, count: int) -> list[Any]:
    """Return equal caches of 60 random positions."""
    from megatron_q3n.model.decode.state import KVCache

    keys_and_values = [torch.randn(3, 2, 60, 32, device=hidden.device) for _ in range(2)]
    return [KVCache(*(x.clone() for x in keys_and_values)) for _ in range(count)]


@pytest.mark.parametrize(
    ("depth", "kernels"), [(0, {Kernel.DECODE_GEMM}), (1, {Kernel.DECODE_GEMM, Kernel.DECODE_ROUTER})]
)
def test_decode_gemm_in_all_layers_gives_the_same_tokens(
    alone: Any, depth: int, kernels: set[Kernel], triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norm weights far from 1, in mixers, experts, MTP layer and LM head: the same tokens and log probabilities.

    Two sequences of a token and a draft are four rows; six would exceed the kernel's limit.
    """
    from megatron_q3n.inference.generate import generate
    from megatron_q3n.inference.sampling import Sampling

    model = on_plain_torch(alone, **SMALL)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    prompts, sampling = random_prompts([3, 5], 16), Sampling(4, 0.0)
    expected = generate(model, prompts, sampling, draft_depth=depth)
    used_options, original = {"fused"}, decode_gemm.decode_gemm

    def record(*operands: Any, **options: Any) -> GemmOutput:
        used_options.update(options)
        return original(*operands, **options)

    monkeypatch.setattr(decode_gemm, "decode_gemm", record)
    with use_plan(model, fused_plan(tiny_config(**SMALL), kernels)), launched_kernels() as launched:
        actual = generate(model, prompts, sampling, draft_depth=depth)
    assert launched == kernels
    assert used_options - {"fused"} == {
        "second_weight_MK",
        "residual_RN",
        "returns_normed",
        *(["second"] if depth else []),
    }
    for actual_result, expected_result in zip(actual, expected):
        assert actual_result.tokens == expected_result.tokens
        assert actual_result.logprobs == pytest.approx(expected_result.logprobs, abs=1e-4)
        assert (actual_result.drafted, actual_result.accepted) == (expected_result.drafted, expected_result.accepted)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attention_gate": "none"},
        {"mixer_pattern": "S*", "num_layers": 4, "attention_window_tokens": 5},
        {"attention_gate": "headwise"},
    ],
)
def test_decode_attention_equals_the_layer(
    alone: Any, settings: dict[str, Any], tokens: int, triton_device: str
) -> None:
    """Decode attention between the projections: the torch reference, the fused kernels, and the layer by its plan.

    A gate with a projection of its own has no kernel, whatever is qualified.
    """
    from megatron_q3n.model.decode.attention import attend, attend_fused
    from megatron_q3n.model.rope import RopeTable

    model = on_plain_torch(alone, **settings)
    plan = fused_plan(tiny_config(**settings), {Kernel.DECODE_ATTENTION})
    is_supported = settings.get("attention_gate", "none") == "none"
    assert bool(plan.decode.attention) == is_supported
    span, table, hidden = attention_inputs(model, tokens)
    for mixer in attention_mixers(model):
        with inference(model):
            exact, by_plan, *caches = kv_caches(hidden, 4)
            expected = attend(mixer, hidden, exact, span, RopeTable(table, span))
            with use_plan(model, plan), launched_kernels() as launched:
                results = [(by_plan, attend(mixer, hidden, by_plan, span, RopeTable(table, span)))]
            assert launched == ({Kernel.DECODE_ATTENTION} if is_supported else set())
            for cache, fused in zip(caches, (False, True) if is_supported else ()):
                results.append((cache, attend_fused(mixer, hidden, cache, span, table, fused)))
        for cache, actual in results:
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(cache.key, exact.key, rtol=0, atol=1e-5)
            torch.testing.assert_close(cache.value, exact.value, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tokens", "is_fused"), [(16, True), (17, False)])
def test_longer_spans_and_gradients_use_the_training_attention(
    alone: Any, tokens: int, is_fused: bool, triton_device: str
) -> None:
    """The kernel has 16 queries of a sequence at most, and no backward pass."""
    from megatron_q3n.model.decode.attention import attend
    from megatron_q3n.model.rope import RopeTable

    model = on_plain_torch(alone, num_layers=2, mixer_pattern="*")
    span, table, hidden = attention_inputs(model, tokens)
    mixer = attention_mixers(model)[0]
    with use_plan(model, fused_plan(tiny_config(), {Kernel.DECODE_ATTENTION})):
        with inference(model), launched_kernels() as launched:
            attend(mixer, hidden, kv_caches(hidden, 1)[0], span, RopeTable(table, span))
        assert bool(launched) == is_fused
        with launched_kernels() as launched:
            attend(mixer, hidden, kv_caches(hidden, 1)[0], span, RopeTable(table, span))
        assert not launched


@pytest.mark.parametrize(
    "settings",
    [
        {"num_moe_experts": 8, "moe_router_topk": 3},
        {"moe_router_enable_expert_bias": True},
        {"megatron": {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.0}},
    ],
)
def test_decode_router_equals_the_layers_router(alone: Any, settings: dict[str, Any], triton_device: str) -> None:
    from megatron_q3n.kernels.decode.router import decode_norm_route, decode_route
    from megatron_q3n.model.decode.experts import router_config

    assert fused_plan(tiny_config(**settings), {Kernel.DECODE_ROUTER}).decode.router
    model = on_plain_torch(alone, **settings).eval()
    router = next(x.mlp.router for x in model.decoder.layers if hasattr(x.mlp, "router"))
    if router.expert_bias is not None:
        router.expert_bias.normal_()
    choice = router_config(router)
    hidden = torch.randn(5, 1, 32, device=next(model.parameters()).device)
    with torch.no_grad():
        expected, chooses = router(hidden)
        gates, experts = decode_route(hidden.flatten(0, 1), router.weight, choice, fused=True)
        norm = RMSNormWeights(0.2 * torch.randn(32, device=hidden.device), 1e-3)
        operands = hidden.flatten(0, 1), norm, router.weight, choice
        for actual_result, expected_result in zip(
            decode_norm_route(*operands), decode_norm_route(*operands, fused=False)
        ):
            torch.testing.assert_close(actual_result, expected_result, rtol=1e-4, atol=1e-6)
    actual = torch.zeros_like(expected).scatter(1, experts, gates)
    assert torch.equal(actual > 0, chooses)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_a_router_with_groups_is_routed_by_megatron_core(alone: Any, triton_device: str) -> None:
    """Whatever is qualified: the kernel has no groups, so that the layer calls megatron-core's function."""
    from megatron_q3n.model.decode.experts import add_moe_output

    grouped = {
        "num_moe_experts": 8,
        "megatron": {"moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_pre_softmax": True},
    }
    plan = fused_plan(tiny_config(**grouped), INTERPRETED_KERNELS)
    assert plan.decode.router.reason == plan.decode.norm_in_router.reason == "routing by groups of experts"
    model = on_plain_torch(alone, **grouped).eval()
    layer = next(x for x in model.decoder.layers if hasattr(x.mlp, "router"))
    hidden = torch.randn(3, 1, 32, device=next(model.parameters()).device)
    with torch.no_grad():
        expected = hidden + layer.mlp(layer.pre_mlp_layernorm(hidden))[0]
        with use_plan(model, plan), launched_kernels() as launched:
            actual = add_moe_output(layer.mlp, hidden, hidden.clone(), layer.pre_mlp_layernorm)
    assert Kernel.DECODE_EXPERTS in launched
    assert Kernel.DECODE_ROUTER not in launched
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


class Launches(TorchDispatchMode):
    """Counts torch operators and Triton launches; operators inside the interpreter are not counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        from triton.runtime.interpreter import GridExecutor

        self.counts: Counter[str] = Counter()
        self._inside, run = False, GridExecutor.__call__

        def launch(grid: Any, *operands: Any, **options: Any) -> None:
            self.counts[f"triton {grid.fn.__name__}"] += 1
            self._inside = True
            run(grid, *operands, **options)
            self._inside = False

        monkeypatch.setattr(GridExecutor, "__call__", launch)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator._schema.name.split("::")[1]
        if not self._inside and name not in NO_LAUNCH:
            self.counts[name] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for CPUs")
def test_launches_of_a_greedy_step(alone: Any, monkeypatch: pytest.MonkeyPatch, triton_device: str) -> None:
    """3 per Gated DeltaNet layer, 4 per attention, 3 per MoE layer; 12 per draft. With every fused kernel enabled.

    A decode step as a CUDA graph has one more, which keeps padding in bounds.
    """
    from megatron_q3n.inference.generate import start
    from megatron_q3n.inference.sampling import Sampling

    model, plan = on_plain_torch(alone, **SMALL), fused_plan(tiny_config(**SMALL), INTERPRETED_KERNELS)
    launches_by_depth = {}
    for depth in (0, 1, 2):
        prompt, sampling = random_prompts([2], 16), Sampling(3 * depth + 4, 0.0)
        with use_plan(model, plan):
            steps = iter(start(model, prompt, sampling, draft_depth=depth))
        # the prefill, by torch
        next(steps)
        with use_plan(model, plan), monkeypatch.context() as patched, Launches(patched) as launches:
            next(steps)
        launches_by_depth[depth] = launches.counts.total()
    layers = 3 + 4 + 2 * 3
    assert launches_by_depth == {0: layers + 9, 1: layers + 9 + 12, 2: layers + 9 + 24}, launches.counts
