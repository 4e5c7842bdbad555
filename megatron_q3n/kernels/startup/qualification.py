"""The start-up check: every fused kernel against its reference, with gradients, on this very GPU and compiler.

No kernel is trusted by its version: FLA's Triton backward is silently wrong on Hopper with Triton 3.4
to 3.7.0 (flash-linear-attention issue 640), and the next fault has no number yet. A kernel that is
wrong, or does not run, is not used: its torch reference is, the run says so and environment.json
keeps it. The shapes checked are few tokens of the model's real heads and widths, so that what is
compiled here is what training runs.

The checks run side by side: on a cold machine their time is nearly all compilation, which happens outside Python's
lock. The delta rule's kernels, by far the longest, have a helper that began before torch was imported
(`compile_ahead.py`). Each verdict says how long its check took.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.config import RunConfig
from megatron_q3n.kernels import registry, residual_norm
from megatron_q3n.kernels.attention import qkv_norm_rope
from megatron_q3n.kernels.decode import argmax as decode_argmax
from megatron_q3n.kernels.decode import attention as decode_attention
from megatron_q3n.kernels.decode import experts as decode_experts
from megatron_q3n.kernels.decode import gated_delta as decode_gated_delta
from megatron_q3n.kernels.decode import gemm as decode_gemm
from megatron_q3n.kernels.decode import router as decode_router
from megatron_q3n.kernels.gated_delta import backend as delta_rule_backend
from megatron_q3n.kernels.gated_delta import mixer as delta_mixer
from megatron_q3n.kernels.moe import fp8_experts, grouped_linear, permutation, shared_expert_gate, swiglu
from megatron_q3n.kernels.startup import compile_ahead, layer_checks
from megatron_q3n.kernels.startup.delta_rule_problems import checked_problems, packs_documents
from megatron_q3n.kernels.startup.layer_checks import Results
from megatron_q3n.kernels.startup.layer_checks import random as _random
from megatron_q3n.kernels.startup.layer_checks import with_gradients as _with_gradients

_TOLERANCE = 2e-2  # relative, bf16 operands; a wrong kernel is off by far more
_FP8_TOLERANCE = 0.15  # e4m3 keeps four bits
_TOKENS = 192
_PROBLEMS = (RuntimeError, ImportError, ValueError, AssertionError, NotImplementedError, TypeError)
_seconds: dict[str, float] = {}


def qualify(config: RunConfig, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Check every fused kernel this model could use, and let the good ones run.

    Returns: per operation "backend: why", for people and environment.json.
    """
    registry.forget()
    _seconds.clear()
    heads = _heads_at_hand(config)
    if device.type != "cuda" or dtype != torch.bfloat16:
        why = "without a GPU" if device.type != "cuda" else f"in {str(dtype).removeprefix('torch.')}"
        reference = delta_rule_backend.choose(device, dtype, ())
        return {"gated_delta_rule": reference, "other fused kernels": f"torch: there are none {why}"}
    packed = packs_documents(config)
    checks = {
        delta_mixer.OPERATION: partial(_mixer, heads, config.model.linear_conv_kernel_dim, packed),
        decode_gated_delta.OPERATION: partial(_steps, heads, config.model.linear_conv_kernel_dim),
        qkv_norm_rope.OPERATION: partial(layer_checks.attention_inputs_check, config),
        residual_norm.OPERATION: partial(layer_checks.residual_norm_check, config),
        permutation.OPERATION: partial(_permutation, config),
        swiglu.OPERATION: partial(_swiglu, config),
        shared_expert_gate.OPERATION: partial(_row_gate, config),
        grouped_linear.OPERATION: partial(_grouped, config),
        decode_experts.OPERATION: partial(_few_experts, config),
        decode_attention.OPERATION: partial(_few_queries, config),
        decode_router.OPERATION: partial(_few_routes, config),
        decode_gemm.OPERATION: partial(_few_rows, config),
        decode_argmax.OPERATION: partial(_few_tokens, config),
    }
    if config.precision.fp8:
        checks[fp8_experts.OPERATION] = partial(_fp8_experts, config)
    rule = partial(delta_rule_backend.choose, device, dtype, checked_problems(config))
    works: dict[str, Callable[[], str]] = {"gated_delta_rule": rule}
    works |= {name: partial(_verdict, name, check) for name, check in checks.items()}
    with ThreadPoolExecutor(len(works)) as pool:
        begun = {name: pool.submit(_on, device, name, work) for name, work in works.items()}
        verdicts = {name: verdict.result() for name, verdict in begun.items()}
    torch.cuda.empty_cache()  # the delta rule's reference took some GiB
    torch.cuda.reset_peak_memory_stats()
    ahead = compile_ahead.finish()
    return verdicts | ({} if ahead is None else {"compiled ahead": ahead})


def seconds() -> dict[str, float]:
    """Return how long each check of the last `qualify` took; they run side by side."""
    return dict(_seconds)


def _heads_at_hand(config: RunConfig) -> delta_mixer.DeltaHeads:
    model, layout = config.model, config.parallel
    share = layout.tensor_model_parallel_size
    if layout.linear_context_parallel == "all_to_all":
        share *= layout.context_parallel_size
    return delta_mixer.DeltaHeads(
        model.linear_num_key_heads // share,
        model.linear_num_value_heads // share,
        model.linear_key_head_dim,
        model.linear_value_head_dim,
        model.layernorm_epsilon,
    )


def _on(device: torch.device, name: str, work: Callable[[], str]) -> str:
    torch.cuda.set_device(device)
    begun = time.perf_counter()
    verdict = work()
    _seconds[name] = time.perf_counter() - begun
    return f"{verdict} in {_seconds[name]:.1f} s"


def _verdict(operation: str, check: Callable[[], tuple[Results, Results]]) -> str:
    """Let a kernel run if its results and gradients are the reference's."""
    tolerance = _FP8_TOLERANCE if operation == fp8_experts.OPERATION else _TOLERANCE
    try:
        ours, wanted = check()
        errors = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(ours, wanted)]
        error = max(e.item() for e in errors)
    except _PROBLEMS as problem:
        return f"torch: the fused kernel does not run here ({type(problem).__name__}: {problem}); expect slower steps"
    if not error < tolerance:
        return f"torch: the fused kernel FAILED its check on this GPU (relative error {error:.1e})"
    registry.allow(operation)
    return f"fused: output and gradients checked on this GPU (relative error {error:.1e})"


def _fp8_experts(config: RunConfig) -> tuple[Results, Results]:
    """Check FP8 experts against bf16 ones, whose own kernels the other checks look at."""
    model, tokens = config.model, 256
    width = model.moe_ffn_hidden_size // config.parallel.expert_tensor_parallel_size
    logits = _random(tokens, 4, dtype=torch.float32)
    routing = torch.zeros_like(logits, dtype=torch.bool)
    routing.scatter_(1, logits.topk(2, 1).indices, True)
    inputs = [
        _random(tokens, model.hidden_size),
        logits.sigmoid() * routing,
        model.hidden_size**-0.5 * _random(4, 2 * width, model.hidden_size),
        width**-0.5 * _random(4, model.hidden_size, width),
    ]

    def run(fp8: bool, x: Tensor, probs: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        routes, gates = permutation.plan_routes(routing, probs, 2, fused=True)
        counts = routes.rows_per_expert_E
        if fp8:
            return fp8_experts.fp8_experts(x, gates, fc1, fc2, routes, counts, checking=True)
        rows = permutation.scatter_rows(x, routes, fused=True)
        gate_up = grouped_linear.grouped_linear(rows, fc1, counts, fused=True)
        hidden = swiglu.weighted_swiglu(gate_up, gates, fused=True)
        out = grouped_linear.grouped_linear(hidden, fc2, counts, fused=True)
        return permutation.gather_rows(out, routes, fused=True)

    return _with_gradients(partial(run, True), inputs), _with_gradients(partial(run, False), inputs)


def _mixer(heads: delta_mixer.DeltaHeads, taps: int, packed: bool) -> tuple[Results, Results]:
    """Check the passes around the delta rule, with a stand-in for the rule that uses all it is given."""
    width, channels = sum(heads.sections), sum(heads.sections[:3])
    repeat = heads.value_heads // heads.key_heads
    bounds = torch.tensor([0, 1, 70, _TOKENS], dtype=torch.int32, device="cuda") if packed else None

    def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **_: object) -> tuple[Tensor, None]:
        share = (g.exp() * beta.float())[..., None]
        return (v * share + (q * k).repeat_interleave(repeat, 2) * 9).to(v.dtype), None

    def run(mixer: Callable[..., Tensor], x: Tensor, ba: Tensor, *vectors: Tensor) -> Tensor:
        return mixer(x, ba, delta_mixer.DeltaWeights(*vectors), heads, rule, bounds)

    fp32 = torch.float32
    inputs = [
        _random(_TOKENS, 1 if packed else 2, width),
        _random(_TOKENS, 1 if packed else 2, 2 * heads.value_heads),
        _random(channels, taps),
        _random(heads.value_heads, dtype=fp32),
        _random(heads.value_heads, dtype=fp32) + 1,
        0.1 * _random(heads.value_dim, dtype=fp32),
    ]
    fused = _with_gradients(partial(run, delta_mixer.fused_delta_mixer), inputs)
    return fused, _with_gradients(partial(run, delta_mixer.composed_delta_mixer), inputs)


def _steps(heads: delta_mixer.DeltaHeads, taps: int) -> tuple[Results, Results]:
    """Check decoding, which has no gradients: outputs and states of a few tokens of a few sequences."""
    fp32, sequences = torch.float32, 3
    weights = delta_mixer.DeltaWeights(
        _random(sum(heads.sections[:3]), taps),
        _random(heads.value_heads, dtype=fp32),
        _random(heads.value_heads, dtype=fp32) + 1,
        0.1 * _random(heads.value_dim, dtype=fp32),
    )
    inputs = (
        _random(4, sequences, sum(heads.sections)),
        _random(4, sequences, 2 * heads.value_heads),
        weights,
        heads,
        _random(sequences, sum(heads.sections[:3]), taps - 1),
        _random(sequences, heads.value_heads, heads.key_dim, heads.value_dim, dtype=fp32),
    )
    return decode_gated_delta.delta_steps(*inputs, fused=True), decode_gated_delta.composed_delta_steps(*inputs)


def _few_experts(config: RunConfig) -> tuple[Results, Results]:
    """Check decoding's experts, of which only a few are made: three tokens, two of them with an expert in common."""
    model, tokens = config.model, 3
    width = model.moe_ffn_hidden_size // config.parallel.expert_tensor_parallel_size
    shared = model.moe_shared_expert_intermediate_size or 0
    matrix = lambda *shape: shape[-1] ** -0.5 * _random(*shape)
    fc1, fc2 = matrix(4, 2 * width, model.hidden_size), matrix(4, model.hidden_size, width)
    weights = decode_experts.ExpertWeights(fc1, fc2)
    if shared:
        into, out_of = matrix(2 * shared, model.hidden_size), matrix(model.hidden_size, shared)
        weights = decode_experts.ExpertWeights(fc1, fc2, into, out_of, matrix(1, model.hidden_size))
    chosen = torch.tensor([[0, 3], [2, 1], [3, 2]], device="cuda")
    gates = _random(tokens, 2, dtype=torch.float32).sigmoid()
    x = _random(tokens, model.hidden_size)

    def run(fused: bool) -> Tensor:
        given = x, 0.1 * x.flip(0), chosen, gates, weights
        return decode_experts.add_few_experts(*given, fused=fused)

    return [run(True)], [run(False)]


def _few_queries(config: RunConfig) -> tuple[Results, Results]:
    """Check decoding's attention behind nothing, little and several blocks: outputs, and what is left in the cache."""
    model, share, reach = config.model, config.parallel.tensor_model_parallel_size, 300
    groups, dim = max(1, model.num_query_groups // share), model.kv_channels
    queries = max(1, model.num_attention_heads // share // groups)
    norms = decode_attention.HeadNorms(0.1 * _random(dim), 0.1 * _random(dim + 1)[1:], 1e-6)
    angles = _random(reach + 16, model.rotary_dim // 2, dtype=torch.float32)
    halves = [angles.cos(), angles.cos(), -angles.sin(), angles.sin()]
    rotary = torch.cat(halves, 1).bfloat16()
    start = torch.tensor([0, 3, reach], device="cuda")
    results: tuple[list[Tensor], list[Tensor]] = ([], [])
    for window, tokens in product({None, model.attention_window_tokens}, (1, 5)):
        heads = decode_attention.AttentionHeads(groups, queries, dim, model.gate_lies_with_queries, dim**-0.5, window)
        each = (1 + heads.is_gated) * queries + 2
        qkv = _random(tokens, 3, groups * each * dim)
        cache = [_random(3, groups, reach + 8, dim), _random(3, groups, reach + 8, dim).flip(2)]
        for fused, result in zip((True, False), results):
            key, value = (stored.clone() for stored in cache)
            given = qkv, heads, norms, rotary, start, reach, key, value
            result.extend([decode_attention.few_queries(*given, fused=fused), key, value])
    return results


def _few_routes(config: RunConfig) -> tuple[Results, Results]:
    """Check decoding's routes: three tokens' gates, each at its expert's place, and the tokens normed for them."""
    model, given = config.model, config.model.megatron
    experts, width = model.num_moe_experts, model.hidden_size
    choice = decode_router.Choice(
        model.moe_router_topk,
        given.get("moe_router_score_function", "softmax"),
        given.get("moe_router_pre_softmax", False),
        given.get("moe_router_topk_scaling_factor"),
        _random(experts, dtype=torch.float32) if model.moe_router_enable_expert_bias else None,
    )
    x, weight = _random(3, width), width**-0.5 * _random(experts, width)
    norm = decode_gemm.RowNorm(0.1 * _random(width), model.layernorm_epsilon)

    def run(fused: bool) -> list[Tensor]:
        normed, *routes = decode_router.norm_and_route_few(3 * x, norm, weight, choice, fused=fused)
        found = [routes, decode_router.route_few(x, weight, choice, fused=fused)]
        nothing = torch.zeros(3, experts, device="cuda")
        return [normed, *(nothing.scatter(1, chosen, gates) for gates, chosen in found)]

    return run(True), run(False)


def _few_rows(config: RunConfig) -> tuple[Results, Results]:
    """Check decoding's products of three rows: a layer's, the draft layer's and the head's, with norms and sums."""
    model = config.model
    width, inner, rows = model.hidden_size, model.value_dim, 3
    matrix = lambda *shape: shape[-1] ** -0.5 * _random(*shape)
    norms = [decode_gemm.RowNorm(0.1 * _random(width + i)[i:], 1e-6) for i in range(2)]
    first, second = (decode_gemm.Rows(x, n) for x, n in zip(3 * _random(2, rows, width), norms))
    into, beside = matrix(2 * model.key_dim + 2 * inner, width), matrix(72, width)
    out_of, joining = matrix(width, inner), matrix(width, 2 * width)
    plain, head = decode_gemm.Rows(_random(rows, inner)), matrix(model.vocab_size, width)

    def run(fused: bool) -> list[Tensor]:
        product = partial(decode_gemm.few_rows, fused=fused)
        made = [
            product(first, into, beside_MK=beside),
            product(plain, out_of, sum_RN=second.x_RX),
            product(first, joining, then=second),
            product(first, head, keeps=True),
            product(second, beside, keeps=True, wide=True),
        ]
        parts = [(each.out_RN, each.beside_RM, each.normed_RX) for each in made]
        return [part for each in parts for part in each if part is not None]

    return run(True), run(False)


def _few_tokens(config: RunConfig) -> tuple[Results, Results]:
    """Check greedy decoding's choice: two sequences whose second draft is refused, and one whose drafts all stay."""
    vocab = config.model.vocab_size
    logits = _random(3, 3, vocab)
    likeliest = torch.arange(9, device="cuda").view(3, 3, 1) * (vocab - 1) // 8
    logits.scatter_(2, likeliest, 9.0)  # of equal ones torch may take another
    drafts = logits.float().argmax(-1)[:, :2].contiguous()
    drafts[:2, 1] = (drafts[:2, 1] + 1) % vocab
    results = []
    for fused in (True, False):
        judged = decode_argmax.judge_likeliest(logits, drafts, vocab, fused=fused)
        # whole numbers apart: a token's number would hide what is wrong with a log probability
        own, drafted = judged.packed[:, 4:7], torch.zeros_like(drafts)
        decode_argmax.take_likeliest(logits[:, 1], drafted[:, 1], vocab, fused=fused)
        results.append([own, judged.chosen_NT, judged.grown_N, judged.row_N, drafted])
    return results[0], results[1]


def _permutation(config: RunConfig) -> tuple[Results, Results]:
    model = config.model
    logits = _random(_TOKENS, model.num_moe_experts, dtype=torch.float32)
    routing = torch.zeros_like(logits, dtype=torch.bool)
    routing.scatter_(1, logits.topk(model.moe_router_topk, 1).indices, True)

    def run(fused: bool, x: Tensor, probs: Tensor, add: Tensor) -> Tensor:
        routes, gates = permutation.plan_routes(routing, probs, model.moe_router_topk, fused=fused)
        rows = permutation.scatter_rows(x, routes, fused=fused)
        weighted = (rows * gates[:, None]).to(x.dtype)
        return permutation.gather_rows(weighted, routes, add, fused=fused)

    inputs = [_random(_TOKENS, model.hidden_size), logits.sigmoid() * routing]
    inputs.append(_random(_TOKENS, model.hidden_size).flip(0))
    return _with_gradients(partial(run, True), inputs), _with_gradients(partial(run, False), inputs)


def _swiglu(config: RunConfig) -> tuple[Results, Results]:
    width = config.model.moe_ffn_hidden_size // config.parallel.expert_tensor_parallel_size
    shared = config.model.moe_shared_expert_intermediate_size or width
    shared //= config.parallel.tensor_model_parallel_size
    inputs = [_random(_TOKENS, 2 * width), _random(_TOKENS, dtype=torch.float32)]
    results: tuple[list[Tensor], list[Tensor]] = ([], [])
    for fused, result in zip((True, False), results):
        run = partial(swiglu.weighted_swiglu, fused=fused)
        result.extend(_with_gradients(run, inputs))
        result.extend(_with_gradients(partial(run, weight_R=None), [_random(_TOKENS, 2 * shared)]))
    return results


def _row_gate(config: RunConfig) -> tuple[Results, Results]:
    width = config.model.hidden_size
    inputs = [_random(_TOKENS, width), _random(_TOKENS + 1, width)[1:], 0.1 * _random(1, width)]
    inputs.append(_random(_TOKENS, width).flip(0))
    return (
        _with_gradients(partial(shared_expert_gate.row_gate, fused=True), inputs),
        _with_gradients(partial(shared_expert_gate.row_gate, fused=False), inputs),
    )


def _grouped(config: RunConfig) -> tuple[Results, Results]:
    """Check both linears' shapes, an expert without rows included, against one product per expert in fp32."""
    model = config.model
    width = model.moe_ffn_hidden_size // config.parallel.expert_tensor_parallel_size
    counts = torch.tensor([100, 0, 1, 91], device="cuda")
    results: tuple[list[Tensor], list[Tensor]] = ([], [])
    for outputs, inputs in ((2 * width, model.hidden_size), (model.hidden_size, width)):
        operands = [_random(_TOKENS, inputs), _random(len(counts), outputs, inputs)]
        run = partial(grouped_linear.grouped_linear, rows_per_expert_E=counts)

        def one_by_one(rows: Tensor, weight: Tensor) -> Tensor:
            blocks = rows.split(counts.tolist())
            return torch.cat([F.linear(b, w) for b, w in zip(blocks, weight.unbind())])

        results[0].extend(_with_gradients(partial(run, fused=True), operands))
        results[1].extend(_with_gradients(one_by_one, [x.float() for x in operands]))
    return results
