"""Trainer and rollout: the same probabilities, routes that are replayed, and one loss however samples are packed.

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
    """Answers with advantages that have nothing to do with them."""
    found = loop.engine.answer(loop.prompts.take(0, 4), 3)
    for number, sample in enumerate(found):
        sample.advantage = float(np.sin(number))
        sample.old_logprobs = np.array(sample.logprobs, np.float32)
    return found


def gradients(loop: Any, batches: list[Any]) -> dict[str, torch.Tensor]:
    """Run the policy loss over rows and return every gradient."""
    from megatron_q3n.rl.policy_pass import PolicyPass, taped
    from megatron_q3n.training.step import run_microbatches

    state = loop.state
    for chunk in state.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    policy = PolicyPass(loop.settings, loop.tokenizer.vocab_size, learns=True)
    with taped(state.models, recording=False):
        run_microbatches(state, batches, forward_only=False, forward=policy)
    return {n: p.main_grad.clone() for n, p in state.models[0].named_parameters()}


def rows_of(
    loop: Any,
    samples: list[Sample],
    length: int = 64,
    each: bool = False,
    normalisation: Literal["sequence", "token", "constant"] = "sequence",
) -> list[Any]:
    from megatron_q3n.rl.advantages import token_weights
    from megatron_q3n.rl.policy_batch import policy_rows

    weights = token_weights(np.array([len(s.tokens) for s in samples]), normalisation, 7)
    eod = loop.tokenizer.eod
    if not each:
        return policy_rows(samples, weights, length, eod, replay=True)
    return [policy_rows([s], weights[i : i + 1], length, eod, replay=True)[0] for i, s in enumerate(samples)]


def test_rollout_and_trainer_agree(loop: Any, samples: list[Sample]) -> None:
    """fp32: log probabilities within 1e-4, and every expert the same without replay."""
    known, mismatch = loop._score(samples)
    for sample, logprobs in zip(samples, known):
        np.testing.assert_allclose(logprobs, sample.logprobs, atol=1e-4)
    assert mismatch.logprob_max < 1e-4
    assert mismatch.routes_own == [0.0] * 4
    assert 0 < mismatch.chunks < 1e-5
    assert samples[0].routes is not None
    assert len(np.unique(samples[0].routes)) > 2, "else agreeing would show little"


def test_temperature_and_padding_are_the_rollouts(alone: Any, tmp_path: Path) -> None:
    """Ids beyond the tokenizer's are never drawn, and probabilities are of the tempered distribution."""
    rollout = {"prompts": 4, "samples_per_prompt": 3, "max_new_tokens": 7, "temperature": 0.7}
    loop = tiny_loop(tiny_config(tmp_path, {"rollout": rollout}), *alone)
    vocab = loop.tokenizer.vocab_size
    assert vocab < VOCAB
    samples = loop.engine.answer(loop.prompts.take(0, 4), 3)
    assert max(token for sample in samples for token in sample.tokens) < vocab
    assert loop._score(samples)[1].logprob_max < 1e-4


def test_replay_takes_the_recorded_experts(loop: Any, samples: list[Sample]) -> None:
    """After the weights moved the trainer would choose others, uses the recorded, and still trains the router."""
    weights = [p.detach().clone() for p in loop.state.models[0].parameters()]
    with torch.no_grad():
        for name, parameter in loop.state.models[0].named_parameters():
            if "router" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.manual_seed(0))
    try:
        _, mismatch = loop._score(samples)
        grads = gradients(loop, [row.batch for row in rows_of(loop, samples)])
    finally:
        with torch.no_grad():
            for parameter, weight in zip(loop.state.models[0].parameters(), weights):
                parameter.copy_(weight)
    assert max(mismatch.routes_own) > 0.05
    assert mismatch.routes_used == [0.0] * 4
    routers = [g for n, g in grads.items() if "router" in n and not n.startswith("mtp.")]
    assert all(grad.abs().max() > 0 for grad in routers)


def test_packed_or_apart_or_padded_the_gradient_is_one(loop: Any, samples: list[Sample]) -> None:
    from megatron_q3n.rl.policy_batch import share_of

    packed = rows_of(loop, samples)
    apart = rows_of(loop, samples, each=True)
    assert len(packed) < len(apart)
    wanted = gradients(loop, [row.batch for row in packed])
    for rows in (apart, share_of(packed, 0, 1, 64, 0) + share_of(packed[:1], 1, 2, 64, 0)):
        found = gradients(loop, [row.batch for row in rows])
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=2e-4, msg=name)


def test_who_was_not_asked_begins_from_itself(loop: Any, samples: list[Sample]) -> None:
    """Without a look at the trainer the only update's old probabilities are its own: the same gradient."""
    asked, _ = loop._score(samples)
    known = [sample.old_logprobs for sample in samples]
    try:
        for sample, logprobs in zip(samples, asked):
            sample.old_logprobs = logprobs
        wanted = gradients(loop, [row.batch for row in rows_of(loop, samples)])
        for sample in samples:
            sample.old_logprobs = np.empty(0, np.float32)
        rows = rows_of(loop, samples)
        assert all(row.batch.old_BT is None for row in rows)
        found = gradients(loop, [row.batch for row in rows])
    finally:
        for sample, logprobs in zip(samples, known):
            sample.old_logprobs = logprobs
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=2e-4, msg=name)


def test_gradient_is_the_plain_policy_gradient(loop: Any, samples: list[Sample]) -> None:
    """At ratio 1 GSPO's gradient is Σ A ∇ log π(y) / (N |y|), here from the model's own cross entropy."""
    from megatron_q3n.rl.policy_pass import without_mtp

    found = gradients(loop, [row.batch for row in rows_of(loop, samples)])
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
        torch.testing.assert_close(found[name], parameter.main_grad, atol=2e-6, rtol=2e-3, msg=name)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_term_of_the_loss_is_written_out(loop: Any, samples: list[Sample], algorithm: str) -> None:
    """Off policy, with clips, truncated importance, entropy and KL: the gradient is the sum's, sample by sample."""
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
        known, size = np.array(sample.logprobs, np.float32), len(sample.logprobs)
        sample.old_logprobs = known + generator.normal(0, 0.2, size).astype(np.float32)
        sample.reference_logprobs = known + generator.normal(0, 0.5, size).astype(np.float32)
    config = loop.state.config
    loop.state.config = config.model_copy(update={"rl": config.rl.model_copy(update=terms)})
    try:
        rules = loop.settings.rules
        rows = rows_of(loop, samples, normalisation=rules.normalisation)
        found = gradients(loop, [row.batch for row in rows])
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
        gain = torch.minimum(ratio * sample.advantage, clipped * sample.advantage)
        weight = (old - torch.tensor(sample.logprobs)).exp().clamp(max=1.05)
        entropy = -(log_V.exp() * log_V).sum(-1)
        kl = (reference - new).exp() - (reference - new) - 1
        losses = -weight * gain + 0.3 * kl - 0.05 * entropy
        share = {
            "sequence": 1 / (len(samples) * len(new)),
            "token": 1 / num_tokens,
            "constant": 1 / (len(samples) * 7),
        }[rules.normalisation]
        total = total + share * losses.sum()
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.main_grad, atol=3e-6, rtol=3e-3, msg=name)


def test_mtp_and_balance_sit_out(loop: Any, samples: list[Sample]) -> None:
    found = gradients(loop, [row.batch for row in rows_of(loop, samples)])
    assert all(not g.any() for n, g in found.items() if n.startswith("mtp."))
    assert any(n.startswith("mtp.") for n in found)
    values = loop.learn([replace(sample) for sample in samples]).values
    assert (values["rl/mtp_gradient"], values["rl/balance_in_loss"]) == (0.0, 0.0)
    assert values["rl/ratio"] != 1.0 or values["grad_norm"] > 0


def test_log_probabilities_are_softmaxs(loop: Any) -> None:
    from megatron_q3n.rl.vocab_parallel_logprobs import log_probabilities

    generator = torch.Generator().manual_seed(1)
    logits = (20 * torch.randn(2, 5, 11, generator=generator)).requires_grad_()
    labels = torch.randint(9, (2, 5), generator=generator)
    group = loop.state.models[0].pg_collection.tp
    found, entropy = log_probabilities(logits, labels, group, temperature=0.8, vocab_size=9)
    expected = (logits[..., :9] / 0.8).log_softmax(-1)
    torch.testing.assert_close(found, expected.gather(-1, labels[..., None])[..., 0])
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))
    (gradient,) = torch.autograd.grad((found + entropy).sum(), logits, retain_graph=True)
    total = expected.gather(-1, labels[..., None]).sum() - (expected.exp() * expected).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(total, logits)[0])
