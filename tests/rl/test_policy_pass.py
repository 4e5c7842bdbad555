"""Policy pass: agreement of trainer and rollout, routing replay, and a loss that does not depend on packing.

One process; other layouts are in test_layouts.py. Not covered here: bf16 and GPU kernels.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from megatron_q3n.config.rl import ALGORITHMS
from megatron_q3n.rl.samples import Sample
from tests.rl.tiny_loop import VOCAB, tiny_config, tiny_loop


@pytest.fixture(scope="module")
def loop(alone: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_loop(tiny_config(tmp_path_factory.mktemp("rl")), *alone)


@pytest.fixture
def samples(loop: Any) -> list[Sample]:
    """Responses with arbitrary advantages."""
    samples = loop.engine.generate(loop.prompts.take(0, 4), 3)
    for number, sample in enumerate(samples):
        sample.advantage = float(np.sin(number))
        sample.old_logprobs = np.array(sample.logprobs, np.float32)
    return samples


def gradients(loop: Any, batches: list[Any]) -> dict[str, torch.Tensor]:
    """Run the policy loss over packed batches and return every gradient."""
    from megatron_q3n.rl.policy_pass import PolicyPass, attach_routing_replays
    from megatron_q3n.training.step import run_microbatches

    state = loop.state
    for chunk in state.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    policy = PolicyPass(loop.settings, loop.tokenizer.vocab_size, with_loss=True)
    with attach_routing_replays(state.models, recording=False):
        run_microbatches(state, batches, forward_only=False, forward=policy)
    return {n: p.main_grad.clone() for n, p in state.models[0].named_parameters()}


def pack(
    loop: Any,
    samples: list[Sample],
    length: int = 64,
    one_per_row: bool = False,
    normalisation: Literal["sequence", "token", "constant"] = "sequence",
) -> list[Any]:
    from megatron_q3n.rl.advantages import token_weights
    from megatron_q3n.rl.policy_batch import pack_policy_batches

    weights = token_weights(np.array([len(s.tokens) for s in samples]), normalisation, 7)
    eod = loop.tokenizer.eod
    if not one_per_row:
        return pack_policy_batches(samples, weights, length, eod, replay=True)
    return [pack_policy_batches([s], weights[i : i + 1], length, eod, replay=True)[0] for i, s in enumerate(samples)]


def test_rollout_and_trainer_agree(loop: Any, samples: list[Sample]) -> None:
    """fp32: log-probs within 1e-4, and the same experts without replay."""
    logprobs, mismatch = loop._compute_logprobs(samples)
    for sample, logprobs_T in zip(samples, logprobs):
        np.testing.assert_allclose(logprobs_T, sample.logprobs, atol=1e-4)
    assert mismatch.logprob_diff_max < 1e-4
    assert mismatch.routing_mismatch == [0.0] * 4
    assert 0 < mismatch.chunked_rule_error < 1e-5
    assert samples[0].routes is not None
    assert len(np.unique(samples[0].routes)) > 2, "with few experts agreement proves little"


def test_trainer_uses_the_rollouts_temperature_and_vocabulary(alone: Any, tmp_path: Path) -> None:
    """Padding ids are never sampled, and log-probs are of the distribution at the rollout's temperature."""
    rollout = {"prompts": 4, "samples_per_prompt": 3, "max_new_tokens": 7, "temperature": 0.7}
    loop = tiny_loop(tiny_config(tmp_path, {"rollout": rollout}), *alone)
    vocab = loop.tokenizer.vocab_size
    assert vocab < VOCAB
    samples = loop.engine.generate(loop.prompts.take(0, 4), 3)
    assert max(token for sample in samples for token in sample.tokens) < vocab
    assert loop._compute_logprobs(samples)[1].logprob_diff_max < 1e-4


def test_replay_uses_the_recorded_experts(loop: Any, samples: list[Sample]) -> None:
    """After a change of weights the own top-k differs, the recorded experts are used, and the router gets gradients."""
    weights = [p.detach().clone() for p in loop.state.models[0].parameters()]
    with torch.no_grad():
        for name, parameter in loop.state.models[0].named_parameters():
            if "router" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.manual_seed(0))
    try:
        _, mismatch = loop._compute_logprobs(samples)
        grads = gradients(loop, [row.batch for row in pack(loop, samples)])
    finally:
        with torch.no_grad():
            for parameter, weight in zip(loop.state.models[0].parameters(), weights):
                parameter.copy_(weight)
    assert max(mismatch.routing_mismatch) > 0.05
    assert mismatch.routing_mismatch_after_replay == [0.0] * 4
    routers = [g for n, g in grads.items() if "router" in n and not n.startswith("mtp.")]
    assert all(grad.abs().max() > 0 for grad in routers)


def test_gradient_does_not_depend_on_packing(loop: Any, samples: list[Sample]) -> None:
    from megatron_q3n.rl.policy_batch import shard_for_rank

    packed = pack(loop, samples)
    separate = pack(loop, samples, one_per_row=True)
    assert len(packed) < len(separate)
    expected = gradients(loop, [row.batch for row in packed])
    for rows in (separate, shard_for_rank(packed, 0, 1, 64, 0) + shard_for_rank(packed[:1], 1, 2, 64, 0)):
        actual = gradients(loop, [row.batch for row in rows])
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, atol=2e-6, rtol=2e-4, msg=name)


def test_without_old_logprobs_the_update_starts_from_its_own(loop: Any, samples: list[Sample]) -> None:
    """Without old log-probs the only update uses its own detached ones: the same gradient."""
    computed, _ = loop._compute_logprobs(samples)
    original = [sample.old_logprobs for sample in samples]
    try:
        for sample, logprobs in zip(samples, computed):
            sample.old_logprobs = logprobs
        expected = gradients(loop, [row.batch for row in pack(loop, samples)])
        for sample in samples:
            sample.old_logprobs = np.empty(0, np.float32)
        rows = pack(loop, samples)
        assert all(row.batch.old_BT is None for row in rows)
        actual = gradients(loop, [row.batch for row in rows])
    finally:
        for sample, logprobs in zip(samples, original):
            sample.old_logprobs = logprobs
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=2e-6, rtol=2e-4, msg=name)


def test_gradient_is_the_plain_policy_gradient(loop: Any, samples: list[Sample]) -> None:
    """At ratio 1 GSPO's gradient is Σ A ∇ log π(y) / (N |y|), computed here from the model's logits."""
    from megatron_q3n.rl.policy_pass import without_mtp

    actual = gradients(loop, [row.batch for row in pack(loop, samples)])
    model = loop.state.models[0]
    chunk = loop.state.chunks[0]
    chunk.zero_grad_buffer()
    total = torch.zeros(())
    for sample in samples:
        tokens = torch.tensor([[*sample.prompt.tokens, *sample.tokens]])
        positions = torch.arange(tokens.shape[1] - 1)[None]
        with without_mtp(model):
            logits = chunk(tokens[:, :-1], positions, None)[..., : loop.tokenizer.vocab_size]
        logprobs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[0, :, 0]
        answer = logprobs[len(sample.prompt.tokens) - 1 :]
        total = total - sample.advantage * answer.mean() / len(samples)
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(actual[name], parameter.main_grad, atol=2e-6, rtol=2e-3, msg=name)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradient_has_every_term_of_the_loss(loop: Any, samples: list[Sample], algorithm: str) -> None:
    """Off-policy, with clipping, truncated importance sampling, entropy and KL: equal to a sum over samples."""
    from megatron_q3n.rl.policy_pass import without_mtp

    terms = {
        "algorithm": algorithm,
        "clip_low": 0.1,
        "clip_high": 0.15,
        "importance_cap": 1.05,
        "kl_coefficient": 0.3,
        "entropy_coefficient": 0.05,
    }
    generator = np.random.default_rng(7)
    for sample in samples:
        logprobs, size = np.array(sample.logprobs, np.float32), len(sample.logprobs)
        sample.old_logprobs = logprobs + generator.normal(0, 0.2, size).astype(np.float32)
        sample.reference_logprobs = logprobs + generator.normal(0, 0.5, size).astype(np.float32)
    config = loop.state.config
    loop.state.config = config.model_copy(update={"rl": config.rl.model_copy(update=terms)})
    try:
        rules = loop.settings.rules
        rows = pack(loop, samples, normalisation=rules.normalisation)
        actual = gradients(loop, [row.batch for row in rows])
    finally:
        loop.state.config = config
    chunk, model = loop.state.chunks[0], loop.state.models[0]
    chunk.zero_grad_buffer()
    num_tokens, total = sum(len(s.tokens) for s in samples), torch.zeros(())
    for sample in samples:
        tokens = torch.tensor([[*sample.prompt.tokens, *sample.tokens]])
        with without_mtp(model):
            logits = chunk(tokens[:, :-1], torch.arange(tokens.shape[1] - 1)[None], None)
        log_V = logits[0, len(sample.prompt.tokens) - 1 :, : loop.tokenizer.vocab_size].log_softmax(-1)
        new = log_V.gather(-1, torch.tensor(sample.tokens)[:, None])[:, 0]
        old, reference = torch.tensor(sample.old_logprobs), torch.tensor(sample.reference_logprobs)
        ratio = (new - old).mean().exp() if algorithm == "gspo" else (new - old).exp()
        clipped = ratio.clamp(0.9, 1.15)
        surrogate = torch.minimum(ratio * sample.advantage, clipped * sample.advantage)
        weight = (old - torch.tensor(sample.logprobs)).exp().clamp(max=1.05)
        entropy = -(log_V.exp() * log_V).sum(-1)
        kl = (reference - new).exp() - (reference - new) - 1
        losses = -weight * surrogate + 0.3 * kl - 0.05 * entropy
        share = {
            "sequence": 1 / (len(samples) * len(new)),
            "token": 1 / num_tokens,
            "constant": 1 / (len(samples) * 7),
        }[rules.normalisation]
        total = total + share * losses.sum()
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(actual[name], parameter.main_grad, atol=3e-6, rtol=3e-3, msg=name)


def test_mtp_and_load_balancing_are_not_in_the_loss(loop: Any, samples: list[Sample]) -> None:
    actual = gradients(loop, [row.batch for row in pack(loop, samples)])
    assert all(not g.any() for n, g in actual.items() if n.startswith("mtp."))
    assert any(n.startswith("mtp.") for n in actual)
    values = loop.update([replace(sample) for sample in samples]).values
    assert (values["rl/mtp_grad_max"], values["rl/load_balancing_loss"]) == (0.0, 0.0)
    assert values["rl/ratio"] != 1.0 or values["grad_norm"] > 0


def test_logprobs_and_entropy_equal_log_softmax(loop: Any) -> None:
    from megatron_q3n.rl.vocab_parallel_logprobs import logprobs_and_entropy

    generator = torch.Generator().manual_seed(1)
    logits = (20 * torch.randn(2, 5, 11, generator=generator)).requires_grad_()
    labels = torch.randint(9, (2, 5), generator=generator)
    group = loop.state.models[0].pg_collection.tp
    logprobs, entropy = logprobs_and_entropy(logits, labels, group, temperature=0.8, vocab_size=9)
    expected = (logits[..., :9] / 0.8).log_softmax(-1)
    torch.testing.assert_close(logprobs, expected.gather(-1, labels[..., None])[..., 0])
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))
    (gradient,) = torch.autograd.grad((logprobs + entropy).sum(), logits, retain_graph=True)
    total = expected.gather(-1, labels[..., None]).sum() - (expected.exp() * expected).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(total, logits)[0])
