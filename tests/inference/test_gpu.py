"""Generation on a GPU: both dtypes against the full forward pass, with and without drafts and CUDA graphs.

Speed is not covered here (tools/benchmarks/bench_generate.py). In bf16 rounding may decide a near tie differently on
two paths, so only logits are compared there.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_q3n.config.execution_plan import Kernel
from tests.execution_plans import fused_plan, launched_kernels, use_plan
from tests.inference.tiny_model import full_logits, random_prompts, tiny_config, tiny_model
from tests.model.decode.test_forward import decoded

pytestmark = pytest.mark.gpu

# heads of 128, which the fused kernels support; widths that TransformerEngine supports
MODEL = {
    "hidden_size": 64,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "kv_channels": 64,
}


def qualified(compute: str) -> dict[str, str]:
    """Qualify the kernels on this GPU; models that are built afterwards have them in their plan."""
    from megatron_q3n.kernels.startup.qualification import qualify
    from megatron_q3n.model.transformer_config import compute_dtype

    config = tiny_config(compute, **MODEL)
    return qualify(config, torch.device("cuda", 0), compute_dtype(config))


PROMPTS = [300, 170, 201]  # in two chunks, packed, then token by token
CUTS = [[100, 236, *range(237, 301)], [5, 106, *range(107, 171)], [64, 137, *range(138, 202)]]


def relative_error(ours: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [((a - b).norm() / b.norm()).item() for a, b in zip(ours, expected, strict=True)]


def in_fp32(alone: Any, **settings: Any) -> Any:
    """Build the model on plain torch: TransformerEngine's fp32 products are TF32."""
    device, parallel = alone
    torch_alone = replace(device, model_backend="torch"), parallel
    return tiny_model(torch_alone, **{**MODEL, **settings})


def test_decoding_in_fp32_equals_the_full_forward_pass(alone: Any) -> None:
    qualified("fp32")
    model, prompts = in_fp32(alone), random_prompts(PROMPTS, 64)
    expected = [full_logits(model, prompt) for prompt in prompts]
    errors = relative_error(decoded(model, prompts, CUTS), expected)
    print(errors)
    assert max(errors) < 1e-4


def test_decoding_in_bf16_is_as_accurate_as_the_full_forward_pass(alone: Any) -> None:
    """With weights far from their initialization rounding changes routing, so bf16 differs much from fp32."""
    prompts = random_prompts(PROMPTS, 64)
    qualified("fp32")
    model = in_fp32(alone)
    exact = [full_logits(model, prompt) for prompt in prompts]
    verdicts = qualified("bf16")
    assert verdicts[Kernel.DECODE_GATED_DELTA].startswith("fused")
    model = tiny_model(alone, compute="bf16", **MODEL)
    assert model.config.plan.decode.gated_delta
    full = relative_error([full_logits(model, prompt) for prompt in prompts], exact)
    errors = relative_error(decoded(model, prompts, CUTS), exact)
    print(errors, full)
    assert max(errors) < 2 * max(full)


@pytest.mark.parametrize("kernel", [Kernel.DECODE_ATTENTION, Kernel.DECODE_ROUTER, Kernel.DECODE_GEMM])
def test_a_fused_decode_kernel_agrees_with_torch(alone: Any, kernel: Kernel) -> None:
    """Logits in bf16 of single tokens, draft spans and a batch; all experts are selected, so routing cannot change."""
    from megatron_q3n.kernels import registry

    verdicts = qualified("bf16")
    assert verdicts[kernel].startswith("fused"), verdicts
    others = registry.status().qualified - {kernel}
    dense = {**MODEL, "num_moe_experts": 4, "moe_router_topk": 4, "kv_channels": 128}
    model, prompts = tiny_model(alone, compute="bf16", **dense), random_prompts(PROMPTS, 64)
    cuts = [[n - 40, n - 39, n - 35, n - 19, *range(n - 18, n + 1)] for n in PROMPTS]
    with launched_kernels() as launched:
        fused = decoded(model, prompts, cuts)
    assert kernel in launched
    with use_plan(model, fused_plan(tiny_config("bf16", **dense), others)), launched_kernels() as launched:
        errors = relative_error(fused, decoded(model, prompts, cuts))
    assert kernel not in launched
    print(errors)
    assert max(errors) < 5e-2


@pytest.mark.parametrize("depth", [1, 3])
def test_greedy_drafts_change_nothing_over_100_prompts(alone: Any, depth: int) -> None:
    from megatron_q3n.inference.generate import generate
    from megatron_q3n.inference.sampling import Sampling
    from megatron_q3n.inference.sequence import acceptance

    qualified("fp32")
    model = tiny_model(alone, **{**MODEL, "vocab_size": 16})
    prompts = random_prompts([1 + i % 23 for i in range(100)], 16, seed=depth)
    plain = generate(model, prompts, Sampling(24, 0.0))
    drafted = generate(model, prompts, Sampling(24, 0.0), draft_depth=depth)
    print(acceptance(drafted))
    assert [done.tokens for done in drafted] == [done.tokens for done in plain]
    verified, accepted = acceptance(drafted)[0]
    assert 0 < accepted < verified


def test_sampling_in_bf16_with_drafts_runs_to_the_end(alone: Any) -> None:
    from megatron_q3n.inference.generate import generate
    from megatron_q3n.inference.sampling import Sampling

    qualified("bf16")
    model = tiny_model(alone, compute="bf16", **MODEL)
    prompts = random_prompts([3, 200, 40], 64)
    sampling = Sampling(30, top_p=0.9, top_k=20)
    done = generate(model, prompts, sampling, draft_depth=2, prefill_tokens=64)
    assert [len(completion.tokens) for completion in done] == [30] * 3
    assert all(torch.tensor(c.sampled_logprobs).isfinite().all() for c in done)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cuda_graphs_agree_with_launched_decode_steps(alone: Any, compute: str, depth: int, temperature: float) -> None:
    """Equal in fp32. Batches are padded to a power of two and more keys are masked, so kernels may round differently in
    bf16: greedy texts may diverge at near ties, sampled ones where a random number is near a boundary."""
    from megatron_q3n.inference.generate import start
    from megatron_q3n.inference.sampling import Sampling

    qualified(compute)
    small = {**MODEL, "vocab_size": 16}
    fp32 = compute == "fp32"
    model = in_fp32(alone, **small) if fp32 else tiny_model(alone, compute=compute, **small)
    prompts = random_prompts([5, 70, 1, 33, 12], 16)
    sampling = Sampling(60, temperature, stop_tokens=frozenset({3}) if temperature else frozenset())
    runs = []
    # the third run reuses the graphs of the second
    for cuda_graph in (False, True, True):
        options = {"draft_depth": depth, "max_sequences": 3, "prefill_tokens": 60}
        generation = start(model, prompts, sampling, seed=5, cuda_graph=cuda_graph, **options)
        assert sum(1 for _ in generation) > 0
        assert (generation.cuda_graph_obstacle is None) == cuda_graph
        runs.append(generation.completions)
    print(generation.launches)
    launched, captured, again = ([c.tokens for c in done] for done in runs)
    assert captured == again
    same = sum(a == b for a, b in zip(launched, captured))
    assert same == 5 or (not fp32 and same >= 3), (launched, captured)
    for a, b in zip(runs[0], runs[1]):
        if a.tokens == b.tokens:
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3 if fp32 else 0.1)
            assert not fp32 or (a.drafted, a.accepted) == (b.drafted, b.accepted)
        elif temperature == 0:
            position = next(i for i, (x, y) in enumerate(zip(a.tokens, b.tokens)) if x != y)
            assert a.logprobs[position] == pytest.approx(b.logprobs[position], abs=0.1), position


def test_decode_gemm_saves_kernel_launches_and_keeps_the_numbers(alone: Any) -> None:
    """CUDA graphs in bf16: kernel launches saved per layer, and log probabilities within rounding of the modules'."""
    from megatron_q3n.inference.generate import start
    from megatron_q3n.inference.sampling import Sampling
    from megatron_q3n.kernels import registry

    verdicts = qualified("bf16")
    assert verdicts[Kernel.DECODE_GEMM].startswith("fused"), verdicts
    kernels = registry.status().qualified
    dense = {**MODEL, "num_moe_experts": 4, "moe_router_topk": 4, "kv_channels": 128}
    config, prompt, results = tiny_config("bf16", **dense), random_prompts([33], 64), {}
    for fused in (True, False):
        # another model each time: captured graphs are kept for a model
        model = tiny_model(alone, compute="bf16", **dense)
        with use_plan(model, fused_plan(config, kernels if fused else kernels - {Kernel.DECODE_GEMM})):
            generation = start(model, prompt, Sampling(8, 0.0), draft_depth=2, cuda_graph=True)
            assert sum(1 for _ in generation) > 0
        results[fused] = (generation.launches, generation.completions[0].logprobs[:2])
    print(results)
    # saved launches: 2 per Gated DeltaNet layer, 1 per other layer, 1 for the final norm, 6 per draft
    assert results[False][0] - results[True][0] >= 3 * 2 + 1 + 4 + 1 + 2 * 6
    assert results[True][1] == pytest.approx(results[False][1], abs=0.1)


def test_a_graph_reads_weights_that_changed_in_place(alone: Any) -> None:
    """Reinforcement learning updates weights in place between rollouts."""
    from megatron_q3n.inference.generate import generate
    from megatron_q3n.inference.sampling import Sampling

    qualified("fp32")
    model = in_fp32(alone)
    prompts, sampling = random_prompts([20], 64), Sampling(30, 0.0)
    before = generate(model, prompts, sampling, draft_depth=1, cuda_graph=True)[0].tokens
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)
    after = generate(model, prompts, sampling, draft_depth=1, cuda_graph=True)[0].tokens
    assert after == generate(model, prompts, sampling, draft_depth=1)[0].tokens
    assert after != before
