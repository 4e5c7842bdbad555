"""What tokens are drawn from, that draws follow it, and that judging drafts does not change it."""

from typing import Any

import pytest
import torch

from megatron_q3n.inference.sampling import Sampling, distribution, draw, judge, likeliest
from megatron_q3n.kernels.decode.argmax import judge_likeliest
from tests.inference.chi_square import z_score

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
DRAWS = 20_000


def uniforms(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probabilities(**settings: Any) -> list[float]:
    return distribution(LOGITS[None], Sampling(1, **settings))[0].tolist()


def test_temperature_divides_the_logits() -> None:
    assert probabilities(temperature=0.5) == pytest.approx((2 * LOGITS).softmax(0).tolist())


def test_top_k_keeps_the_likeliest() -> None:
    kept = LOGITS[:2].softmax(0).tolist()
    assert probabilities(top_k=2) == pytest.approx([*kept, 0, 0, 0])
    assert probabilities(top_k=9) == pytest.approx(LOGITS.softmax(0).tolist())


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    mass = LOGITS.softmax(0).cumsum(0).tolist()
    assert [p > 0 for p in probabilities(top_p=mass[0] - 1e-3)] == [True] + [False] * 4
    assert [p > 0 for p in probabilities(top_p=mass[0] + 1e-3)] == [True] * 2 + [False] * 3
    assert sum(probabilities(top_p=0.7)) == pytest.approx(1)


def test_rows_that_pad_the_vocabulary_are_never_drawn() -> None:
    assert probabilities(vocab_size=2) == pytest.approx([*LOGITS[:2].softmax(0).tolist(), 0, 0, 0])
    assert likeliest(-LOGITS[None], Sampling(1, 0.0, vocab_size=3)).tolist() == [2]
    assert likeliest(-LOGITS[None], Sampling(1, 0.0)).tolist() == [4]


def test_draws_follow_the_distribution() -> None:
    weights = torch.tensor([0.1, 0.0, 0.5, 0.15, 0.25])
    tokens = draw(weights.expand(DRAWS, -1) * 3, uniforms(DRAWS))
    counts = torch.bincount(tokens, minlength=5).tolist()
    assert counts[1] == 0
    assert z_score(counts, weights.tolist()) < 3.5
    assert z_score(counts, [0.1, 1e-9, 0.5, 0.2, 0.2]) > 10, "the test would not see a wrong draw"


def test_draws_at_the_edges() -> None:
    weights = torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    assert draw(weights, torch.zeros(1, dtype=torch.float64)).tolist() == [1]
    assert draw(weights, torch.tensor([1 - 2.0**-53], dtype=torch.float64)).tolist() == [2]


@pytest.mark.parametrize("depth", [1, 3])
def test_judged_drafts_are_distributed_as_the_target(depth: int) -> None:
    """Each token that comes out, and how many do, as the target says; p and q differ by position."""
    generator = torch.Generator().manual_seed(depth)
    target = torch.randn(depth + 1, 5, generator=generator).softmax(-1)
    draft = torch.randn(depth, 5, generator=generator).softmax(-1)
    q = draft.expand(DRAWS, -1, -1)
    drafts = torch.stack([draw(q[:, d], uniforms(DRAWS, seed=10 + d)) for d in range(depth)], 1)
    kept, drawn = judge(target.expand(DRAWS, -1, -1), q, drafts, uniforms(DRAWS, depth + 1, seed=99))
    chosen = torch.nn.functional.pad(drafts, (0, 1)).scatter(1, kept[:, None], drawn[:, None])
    for place in range(depth + 1):
        tokens = chosen[kept >= place, place]
        counts = torch.bincount(tokens, minlength=5).tolist()
        assert z_score(counts, target[place].tolist()) < 3.5
    shares = [torch.minimum(target[d], draft[d]).sum().item() for d in range(depth)]
    reached = DRAWS
    for d, share in enumerate(shares):
        accepted = int((kept > d).sum())
        assert z_score([accepted, reached - accepted], [share, 1 - share]) < 3.5
        reached = accepted


def test_drafts_without_judgement_would_be_noticed() -> None:
    target, draft = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).softmax(-1)
    counts = torch.bincount(draw(draft.expand(DRAWS, -1), uniforms(DRAWS)), minlength=5)
    assert z_score(counts.tolist(), target.tolist()) > 10


@pytest.mark.parametrize(("drafts", "kept", "drawn"), [([1, 2, 0], 2, 3), ([1, 2, 3], 3, 4), ([0, 2, 3], 0, 1)])
def test_greedy_judgement_keeps_exactly_the_targets_own_tokens(drafts: list[int], kept: int, drawn: int) -> None:
    """And so does the general rule, with all probability on one token."""
    best, proposed = torch.tensor([[1, 2, 3, 4]]), torch.tensor([drafts])
    one_hot = torch.nn.functional.one_hot
    judged = judge_likeliest(one_hot(best, 5).float(), proposed)
    assert judged.packed[0, 0] == kept
    assert judged.chosen_NT.flatten()[judged.row_N].tolist() == [drawn]
    zeros = torch.zeros(1, 4, dtype=torch.float64)
    general = judge(one_hot(best, 5).float(), one_hot(proposed, 5).float(), proposed, zeros)
    assert [x.tolist() for x in general] == [[kept], [drawn]]
