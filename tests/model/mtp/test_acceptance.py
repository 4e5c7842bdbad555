"""Acceptance is measured against the model itself: by hand over whole sequences, the same counts and chances.

fp32, one process. The measure over tensor- and expert-parallel ranks: tests/stages/test_evaluate.py.
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
    """Return the tokens and their likeliest continuation."""
    for _ in range(count):
        tokens = [*tokens, int(full_logits(model, tokens)[-1].argmax())]
    return tokens


def test_verified_drafts_are_those_kept_over_the_whole_sequence(model: Any) -> None:
    from megatron_q3n.evaluation.draft_acceptance import judge_drafts

    prompts = [continued(model, prompt, 12) for prompt in random_prompts([6] * 6, 8, seed=3)]
    found = list(judge_drafts(model, torch.tensor(prompts), DEPTH, stride=4, seed=0))
    assert [judgement.position for judgement in found] == [4, 8, 12, 16]
    kept = 0.0
    for judgement in found:
        for row, tokens in enumerate(prompts):
            read = tokens[: judgement.position + 1]
            drafts = drafted(model, read)[:DEPTH].argmax(-1).tolist()
            best = full_logits(model, read + drafts)[len(read) - 1 :].argmax(-1).tolist()
            agrees = torch.tensor([float(d == b) for d, b in zip(drafts, best)])
            wanted = agrees.cumprod(0).double()
            assert judgement.greedy_kept[row].tolist() == wanted.tolist()
            assert judgement.greedy_reached[row].tolist() == [1, *wanted[:-1].tolist()]
            kept += wanted.sum().item()
    assert 0 < kept < len(prompts) * len(found) * DEPTH, "nothing is told apart"


def test_drawn_drafts_are_kept_with_the_overlap_of_the_two_distributions(model: Any) -> None:
    from megatron_q3n.evaluation.draft_acceptance import judge_drafts

    tokens = random_prompts([9], 8)[0]
    (first, _) = judge_drafts(model, torch.tensor([tokens]), 1, stride=4, seed=0)
    p = full_logits(model, tokens[:5])[-1].softmax(-1)
    q = drafted(model, tokens[:5])[0].softmax(-1)
    assert first.drawn_kept.item() == pytest.approx(torch.minimum(p, q).sum().item(), abs=1e-5)
    assert first.drawn_reached.item() == 1


def test_second_draft_counts_by_the_chance_of_the_first(model: Any) -> None:
    """Over many draws, the mean of what the second depth is reached with is the first one's Σ min(p, q)."""
    from megatron_q3n.evaluation.draft_acceptance import judge_drafts

    texts = torch.tensor(random_prompts([5], 8) * 400)
    (judgement,) = judge_drafts(model, texts, 2, stride=4, seed=5)
    chance = judgement.drawn_kept[0, 0].item()
    reached_N = judgement.drawn_reached[:, 1]
    error = (reached_N.std() / len(reached_N) ** 0.5).item()
    assert error > 0
    assert abs(reached_N.mean().item() - chance) < 4 * error


def test_validation_counts_drafts_where_the_text_goes_on_as_drafted(model: Any) -> None:
    from megatron_q3n.model.mtp.loss import MTPLosses

    texts = [continued(model, prompt, 16) for prompt in random_prompts([4] * 8, 8, seed=2)]
    ids, length = torch.tensor(texts), len(texts[0]) - 1
    ledger = model.config.mtp_losses = MTPLosses(4, MtpConfig(acceptance_depth=DEPTH))
    model.eval()
    with torch.no_grad():
        positions = torch.arange(length).expand(8, length)
        mask = torch.ones(8, length)
        model(ids[:, :-1], positions, None, labels=ids[:, 1:].contiguous(), loss_mask=mask)
    wanted = sum(by_hand(model, tokens) for tokens in texts)
    assert wanted[DEPTH - 1, 0] > 0, "the deepest draft is never judged"
    torch.testing.assert_close(ledger.take_kept(), wanted, rtol=0, atol=1e-3)


def by_hand(model: Any, tokens: list[int]) -> torch.Tensor:
    """Draft at every place of a text. Returns: [depths, 3], judged, kept greedily, Σ min(p, q)."""
    length, target = len(tokens) - 1, full_logits(model, tokens)
    counts = torch.zeros(DEPTH, 3, dtype=torch.float64)
    for anchor in range(length):
        logits = drafted(model, tokens[: anchor + 2])
        for depth in range(DEPTH):
            place = anchor + depth + 1
            if place >= length:
                break
            p, q = target[place].softmax(-1), logits[depth].softmax(-1)
            agrees = bool(p.argmax() == q.argmax())
            shared = torch.minimum(p, q).sum().item()
            counts[depth] += torch.tensor([1, agrees, shared], dtype=torch.float64)
            if not agrees or q.argmax() != tokens[place + 1]:
                break
    return counts
