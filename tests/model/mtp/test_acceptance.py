"""Acceptance against the model itself: the same counts and probabilities as by recomputing whole sequences.

fp32, one process. Acceptance over tensor- and expert-parallel ranks: tests/stages/test_evaluate.py.
"""

from typing import Any

import pytest
import torch

from megatron_q3n.config.mtp import MtpConfig
from tests.inference.tiny_model import full_logits, random_prompts, tiny_model
from tests.model.mtp.test_draft_chain import drafted

DEPTH = 3


@pytest.fixture(scope="module")
def model(alone: Any) -> Any:
    return tiny_model(alone, mtp_num_layers=4, mtp_use_repeated_layer=True, vocab_size=8)


def continued(model: Any, tokens: list[int], count: int) -> list[int]:
    """Return the tokens and their greedy continuation."""
    for _ in range(count):
        tokens = [*tokens, int(full_logits(model, tokens)[-1].argmax())]
    return tokens


def test_accepted_drafts_are_those_of_the_full_forward_pass(model: Any) -> None:
    from megatron_q3n.evaluation.draft_acceptance import verify_drafts

    prompts = [continued(model, prompt, 12) for prompt in random_prompts([6] * 6, 8, seed=3)]
    verifications = list(verify_drafts(model, torch.tensor(prompts), DEPTH, stride=4, seed=0))
    assert [verification.position for verification in verifications] == [4, 8, 12, 16]
    num_accepted = 0.0
    for verification in verifications:
        for row, tokens in enumerate(prompts):
            prefix = tokens[: verification.position + 1]
            drafts = drafted(model, prefix)[:DEPTH].argmax(-1).tolist()
            best = full_logits(model, prefix + drafts)[len(prefix) - 1 :].argmax(-1).tolist()
            agrees = torch.tensor([float(d == b) for d, b in zip(drafts, best)])
            expected = agrees.cumprod(0).double()
            assert verification.greedy_accepted[row].tolist() == expected.tolist()
            assert verification.greedy_reached[row].tolist() == [1, *expected[:-1].tolist()]
            num_accepted += expected.sum().item()
    assert 0 < num_accepted < len(prompts) * len(verifications) * DEPTH, "drafts are both accepted and rejected"


def test_sampled_drafts_are_accepted_with_the_overlap_of_the_two_distributions(model: Any) -> None:
    from megatron_q3n.evaluation.draft_acceptance import verify_drafts

    tokens = random_prompts([9], 8)[0]
    (first, _) = verify_drafts(model, torch.tensor([tokens]), 1, stride=4, seed=0)
    p = full_logits(model, tokens[:5])[-1].softmax(-1)
    q = drafted(model, tokens[:5])[0].softmax(-1)
    assert first.sampled_accepted.item() == pytest.approx(torch.minimum(p, q).sum().item(), abs=1e-5)
    assert first.sampled_reached.item() == 1


def test_the_second_draft_counts_by_the_probability_of_the_first(model: Any) -> None:
    """Over many samples, the mean probability of reaching depth 2 is Σ min(p, q) of depth 1."""
    from megatron_q3n.evaluation.draft_acceptance import verify_drafts

    texts = torch.tensor(random_prompts([5], 8) * 400)
    (verification,) = verify_drafts(model, texts, 2, stride=4, seed=5)
    chance = verification.sampled_accepted[0, 0].item()
    reached_N = verification.sampled_reached[:, 1]
    error = (reached_N.std() / len(reached_N) ** 0.5).item()
    assert error > 0
    assert abs(reached_N.mean().item() - chance) < 4 * error


def test_validation_counts_drafts_where_the_text_continues_as_drafted(model: Any) -> None:
    from megatron_q3n.model.mtp.accumulators import MTPLosses

    texts = [continued(model, prompt, 16) for prompt in random_prompts([4] * 8, 8, seed=2)]
    ids, length = torch.tensor(texts), len(texts[0]) - 1
    mtp_losses = model.config.pass_state.mtp = MTPLosses(4, MtpConfig(acceptance_depth=DEPTH))
    model.eval()
    with torch.no_grad():
        positions = torch.arange(length).expand(8, length)
        mask = torch.ones(8, length)
        model(ids[:, :-1], positions, None, labels=ids[:, 1:].contiguous(), loss_mask=mask)
    expected = sum(reference_counts(model, tokens) for tokens in texts)
    assert expected[DEPTH - 1, 0] > 0, "a draft of the deepest depth is verified"
    torch.testing.assert_close(mtp_losses.pop_acceptance(), expected, rtol=0, atol=1e-3)


def reference_counts(model: Any, tokens: list[int]) -> torch.Tensor:
    """Draft at every position of a text. Returns: [depths, 3], verified, accepted greedily, Σ min(p, q)."""
    length, target = len(tokens) - 1, full_logits(model, tokens)
    counts = torch.zeros(DEPTH, 3, dtype=torch.float64)
    for anchor in range(length):
        logits = drafted(model, tokens[: anchor + 2])
        for depth in range(DEPTH):
            position = anchor + depth + 1
            if position >= length:
                break
            p, q = target[position].softmax(-1), logits[depth].softmax(-1)
            agrees = bool(p.argmax() == q.argmax())
            overlap = torch.minimum(p, q).sum().item()
            counts[depth] += torch.tensor([1, agrees, overlap], dtype=torch.float64)
            if not agrees or q.argmax() != tokens[position + 1]:
                break
    return counts
