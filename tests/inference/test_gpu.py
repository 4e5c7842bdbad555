"""Generation on a GPU: both number formats against the whole forward pass, drafts against none, CUDA graphs against
rounds launched one by one.

Speed is not covered here (tools/benchmarks/bench_generate.py). In bf16 two ways of computing the same logits may
round a near tie apart, so there only the logits are compared.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_q3n.config import validate
from tests.inference.tiny_model import TINY, full_logits, random_prompts, tiny_model
from tests.model.decode.test_forward import decoded

pytestmark = pytest.mark.gpu

# heads of 128, for which the fused kernels exist; widths that TransformerEngine takes
MODEL = {
    "hidden_size": 64,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "kv_channels": 64,
}


def qualified(compute: str) -> dict[str, str]:
    """Let this process use every kernel that is right on this GPU."""
    from megatron_q3n.kernels.startup.qualification import qualify
    from megatron_q3n.model.build import compute_dtype

    data = {"source": "blend", "train": [{"path": "unused"}]}
    tree = {"model": {**TINY, **MODEL}, "data": data, "precision": {"compute": compute}}
    config = validate(tree)
    return qualify(config, torch.device("cuda", 0), compute_dtype(config))


PROMPTS = [300, 170, 201]  # in two chunks, packed, then token by token
CUTS = [[100, 236, *range(237, 301)], [5, 106, *range(107, 171)], [64, 137, *range(138, 202)]]


def relative_error(ours: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [((a - b).norm() / b.norm()).item() for a, b in zip(ours, wanted, strict=True)]


def in_fp32(alone: Any, **settings: Any) -> Any:
    """Build the model on plain torch: TransformerEngine's fp32 products are TF32."""
    device, parallel = alone
    torch_alone = replace(device, model_backend="torch"), parallel
    return tiny_model(torch_alone, **{**MODEL, **settings})


def test_decoding_in_fp32_equals_the_whole_forward_pass(alone: Any) -> None:
    qualified("fp32")
    model, prompts = in_fp32(alone), random_prompts(PROMPTS, 64)
    wanted = [full_logits(model, prompt) for prompt in prompts]
    errors = relative_error(decoded(model, prompts, CUTS), wanted)
    print(errors)
    assert max(errors) < 1e-4


def test_decoding_in_bf16_is_as_near_the_truth_as_the_whole_forward_pass(alone: Any) -> None:
    """Weights far from their init: rounding moves tokens to other experts, so bf16 differs from fp32 by much."""
    prompts = random_prompts(PROMPTS, 64)
    qualified("fp32")
    model = in_fp32(alone)
    truth = [full_logits(model, prompt) for prompt in prompts]
    verdicts = qualified("bf16")
    assert verdicts["gated delta net, few tokens"].startswith("fused")
    model = tiny_model(alone, compute="bf16", **MODEL)
    whole = relative_error([full_logits(model, prompt) for prompt in prompts], truth)
    errors = relative_error(decoded(model, prompts, CUTS), truth)
    print(errors, whole)
    assert max(errors) < 2 * max(whole)


@pytest.mark.parametrize(
    "operation", ["attention of a few tokens", "router's choice for a few tokens", "products of a few rows"]
)
def test_a_fused_way_of_few_tokens_says_what_torch_says(alone: Any, operation: str) -> None:
    """Logits in bf16 with each, of single tokens, drafts' spans and a batch; every expert chosen, so none flips."""
    from megatron_q3n.kernels import registry

    verdicts = qualified("bf16")
    assert verdicts[operation].startswith("fused"), verdicts
    dense = {**MODEL, "num_moe_experts": 4, "moe_router_topk": 4, "kv_channels": 128}
    model, prompts = tiny_model(alone, compute="bf16", **dense), random_prompts(PROMPTS, 64)
    cuts = [[n - 40, n - 39, n - 35, n - 19, *range(n - 18, n + 1)] for n in PROMPTS]
    fused = decoded(model, prompts, cuts)
    registry.forget()
    for other, verdict in verdicts.items():
        if verdict.startswith("fused") and other != operation:
            registry.allow(other)
    errors = relative_error(fused, decoded(model, prompts, cuts))
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
    judged, accepted = acceptance(drafted)[0]
    assert 0 < accepted < judged


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
def test_graphs_say_what_rounds_launched_one_by_one_say(
    alone: Any, compute: str, depth: int, temperature: float
) -> None:
    """In fp32 the same. A batch is padded to a power of two and more keys are masked, so in bf16 kernels may round
    otherwise: a greedy text may part where two tokens are as likely, a drawn one where a number lies between two."""
    from megatron_q3n.inference.generate import start
    from megatron_q3n.inference.sampling import Sampling

    qualified(compute)
    small = {**MODEL, "vocab_size": 16}
    fp32 = compute == "fp32"
    model = in_fp32(alone, **small) if fp32 else tiny_model(alone, compute=compute, **small)
    prompts = random_prompts([5, 70, 1, 33, 12], 16)
    sampling = Sampling(60, temperature, stop_tokens=frozenset({3}) if temperature else frozenset())
    found = []
    for cuda_graph in (False, True, True):  # the second time the graphs are there
        options = {"draft_depth": depth, "max_sequences": 3, "prefill_tokens": 60}
        generation = start(model, prompts, sampling, seed=5, cuda_graph=cuda_graph, **options)
        assert sum(1 for _ in generation) > 0
        assert (generation.without_graphs is None) == cuda_graph
        found.append(generation.completions)
    print(generation.launches)
    launched, captured, again = ([c.tokens for c in done] for done in found)
    assert captured == again
    same = sum(a == b for a, b in zip(launched, captured))
    assert same == 5 or (not fp32 and same >= 3), (launched, captured)
    for a, b in zip(found[0], found[1]):
        if a.tokens == b.tokens:
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3 if fp32 else 0.1)
            assert not fp32 or (a.drafted, a.accepted) == (b.drafted, b.accepted)
        elif temperature == 0:
            parted = next(i for i, (x, y) in enumerate(zip(a.tokens, b.tokens)) if x != y)
            assert a.logprobs[parted] == pytest.approx(b.logprobs[parted], abs=0.1), parted


def test_a_round_with_products_of_few_rows_is_fewer_launches_and_the_same_numbers(alone: Any) -> None:
    """As graphs, in bf16: launches by the layer, and log probabilities within rounding of those by the modules."""
    from megatron_q3n.inference.generate import start
    from megatron_q3n.inference.sampling import Sampling
    from megatron_q3n.kernels import registry

    verdicts = qualified("bf16")
    assert verdicts["products of a few rows"].startswith("fused"), verdicts
    dense = {**MODEL, "num_moe_experts": 4, "moe_router_topk": 4, "kv_channels": 128}
    prompt, found = random_prompts([33], 64), {}
    for fused in (True, False):
        model = tiny_model(alone, compute="bf16", **dense)
        if not fused:
            registry.forget()
            for operation, verdict in verdicts.items():
                if verdict.startswith("fused") and operation != "products of a few rows":
                    registry.allow(operation)
        generation = start(model, prompt, Sampling(8, 0.0), draft_depth=2, cuda_graph=True)
        assert sum(1 for _ in generation) > 0
        found[fused] = (generation.launches, generation.completions[0].logprobs[:2])
    print(found)
    # 2 less a Gated DeltaNet layer, 1 less any other, the last norm; and 6 less a draft
    assert found[False][0] - found[True][0] >= 3 * 2 + 1 + 4 + 1 + 2 * 6
    assert found[True][1] == pytest.approx(found[False][1], abs=0.1)


def test_a_graph_reads_weights_that_changed_where_they_lie(alone: Any) -> None:
    """As reinforcement learning changes them between rollouts."""
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
