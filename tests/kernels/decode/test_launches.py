"""A layer's short way for a few tokens, with the fused kernels, equals the way of megatron-core's modules.

fp32 on one process; sizes and formats of the kernels are test_attention.py's and test_gemm.py's matter.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_q3n.kernels import registry
from megatron_q3n.kernels.decode import gemm as decode_gemm
from megatron_q3n.kernels.decode import router as decode_router
from tests.inference.tiny_model import random_prompts, tiny_model

# operators that launch nothing on a GPU
FREE = {
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
# one layer of each kind, as small as kernels have them: the interpreter takes a millisecond for a dozen operations
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


def let_run(monkeypatch: pytest.MonkeyPatch, *operations: str) -> None:
    """Let these fused kernels run here as on a GPU that was found to run them right."""
    wanted = lambda operation, _, forced=None: operation in operations if forced is None else forced
    monkeypatch.setattr(registry, "is_fused", wanted)


@pytest.mark.parametrize(
    ("depth", "operations"), [(0, (decode_gemm.OPERATION,)), (1, (decode_gemm.OPERATION, decode_router.OPERATION))]
)
def test_few_rows_in_all_their_places_change_nothing(
    alone: Any, depth: int, operations: tuple[str, ...], triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms far from 1, into mixers, experts, draft layer and head: the same tokens, and log probabilities.

    Two sequences of a token and a draft are four rows; six would be more than the kernel is chosen for.
    """
    from megatron_q3n.inference.generate import generate
    from megatron_q3n.inference.sampling import Sampling

    model = on_plain_torch(alone, **SMALL)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    prompts, sampling = random_prompts([3, 5], 16), Sampling(4, 0.0)
    wanted = generate(model, prompts, sampling, draft_depth=depth)
    let_run(monkeypatch, *operations)
    used, product = {"fused"}, decode_gemm.few_rows

    def noted(*given: Any, **options: Any) -> decode_gemm.Products:
        used.update(options)
        return product(*given, **options)

    monkeypatch.setattr(decode_gemm, "few_rows", noted)
    ours = generate(model, prompts, sampling, draft_depth=depth)
    assert used - {"fused"} == {"beside_MK", "sum_RN", "keeps", *(["then"] if depth else [])}
    for got, want in zip(ours, wanted):
        assert got.tokens == want.tokens
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)
        assert (got.drafted, got.accepted) == (want.drafted, want.accepted)


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
def test_attention_at_once_is_the_layers_own(
    alone: Any, settings: dict[str, Any], tokens: int, triton_device: str
) -> None:
    """Between its projections as one operation: as torch says it, and the fused kernels."""
    from megatron_q3n.model.decode.attention import RotaryRows, attend, attend_at_once, serves
    from megatron_q3n.model.decode.forward import generating
    from megatron_q3n.model.decode.span import Span
    from megatron_q3n.model.decode.state import KeyValueCache

    model = on_plain_torch(alone, **settings)
    device = next(model.parameters()).device
    attention = [x.self_attention for x in model.decoder.layers if hasattr(x, "self_attention")]
    mixers = [x for x in attention if hasattr(x, "linear_qkv")]
    known = settings.get("attention_gate", "none") == "none"
    assert [serves(mixer) for mixer in mixers] == [known] * len(mixers)
    if not known:
        return
    start_N = torch.tensor([9, 0, 37], device=device)
    span = Span.at(start_N, tokens, 50)
    table = RotaryRows.table(64, model.rotary_pos_emb, torch.float32)
    hidden = torch.randn(tokens, 3, 32, device=device)
    for mixer in mixers:
        for parameter in (mixer.q_layernorm.weight, mixer.k_layernorm.weight):
            torch.nn.init.normal_(parameter, std=0.2)
        old = [torch.randn(3, 2, 50, 32, device=device) for _ in range(2)]
        with generating(model), torch.no_grad():
            caches = [KeyValueCache(*(x.clone() for x in old)) for _ in range(3)]
            wanted = attend(mixer, hidden, caches[0], span, RotaryRows(table, span))
            for cache, fused in zip(caches[1:], (False, True)):
                ours = attend_at_once(mixer, hidden, cache, span, table, fused)
                torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
                torch.testing.assert_close(cache.key, caches[0].key, rtol=0, atol=1e-5)
                torch.testing.assert_close(cache.value, caches[0].value, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_moe_experts": 8, "moe_router_topk": 3},
        {"moe_router_enable_expert_bias": True},
        {"megatron": {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.0}},
    ],
)
def test_routes_of_few_tokens_are_the_routers_own(alone: Any, settings: dict[str, Any], triton_device: str) -> None:
    from megatron_q3n.kernels.decode.router import norm_and_route_few, route_few
    from megatron_q3n.model.decode.experts import plain_choice

    model = on_plain_torch(alone, **settings).eval()
    router = next(x.mlp.router for x in model.decoder.layers if hasattr(x.mlp, "router"))
    if router.expert_bias is not None:
        router.expert_bias.normal_()
    choice = plain_choice(router)
    assert choice is not None
    hidden = torch.randn(5, 1, 32, device=next(model.parameters()).device)
    with torch.no_grad():
        wanted, chooses = router(hidden)
        gates, experts = route_few(hidden.flatten(0, 1), router.weight, choice, fused=True)
        norm = decode_gemm.RowNorm(0.2 * torch.randn(32, device=hidden.device), 1e-3)
        given = hidden.flatten(0, 1), norm, router.weight, choice
        for got, want in zip(norm_and_route_few(*given), norm_and_route_few(*given, fused=False)):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    ours = torch.zeros_like(wanted).scatter(1, experts, gates)
    assert torch.equal(ours > 0, chooses)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def test_routers_that_choose_otherwise_are_left_alone(alone: Any) -> None:
    from megatron_q3n.model.decode.experts import plain_choice

    grouped = {"moe_router_num_groups": 2, "moe_router_group_topk": 1}
    model = on_plain_torch(alone, num_moe_experts=8, megatron=grouped)
    router = next(x.mlp.router for x in model.decoder.layers if hasattr(x.mlp, "router"))
    assert plain_choice(router) is None


class Launches(TorchDispatchMode):
    """Counts torch's operators, and Triton's launches as one each, whatever the interpreter does inside."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        from triton.runtime.interpreter import GridExecutor

        self.counts: Counter[str] = Counter()
        self._inside, run = False, GridExecutor.__call__

        def launch(grid: Any, *given: Any, **options: Any) -> None:
            self.counts[f"triton {grid.fn.__name__}"] += 1
            self._inside = True
            run(grid, *given, **options)
            self._inside = False

        monkeypatch.setattr(GridExecutor, "__call__", launch)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator._schema.name.split("::")[1]
        if not self._inside and name not in FREE:
            self.counts[name] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for CPUs")
def test_launches_of_a_greedy_round(alone: Any, monkeypatch: pytest.MonkeyPatch, triton_device: str) -> None:
    """3 a Gated DeltaNet layer, 4 an attention, 3 experts; 12 a draft. With every kernel that a GPU may have.

    A round by graph has one more, which keeps padding in bounds.
    """
    from megatron_q3n.inference.generate import start
    from megatron_q3n.inference.sampling import Sampling

    model = on_plain_torch(alone, **SMALL)
    everything = lambda operation, _, forced=None: forced is not False
    found = {}
    for depth in (0, 1, 2):
        prompt, sampling = random_prompts([2], 16), Sampling(3 * depth + 4, 0.0)
        coming = iter(start(model, prompt, sampling, draft_depth=depth))
        next(coming)
        with monkeypatch.context() as patched, Launches(patched) as launches:
            patched.setattr(registry, "is_fused", everything)
            next(coming)
        found[depth] = launches.counts.total()
    layers = 3 + 4 + 2 * 3
    assert found == {0: layers + 9, 1: layers + 9 + 12, 2: layers + 9 + 24}, launches.counts
