"""How the next token is chosen, and how drafts are judged so that the outcome is the same.

**Sampling.** Logits / temperature, then only the `top_k` likeliest, then of those only the smallest
set that holds `top_p` of the mass; what is left is renormalised and drawn from. Temperature 0 is the
likeliest token.

**Drafts** (speculative sampling, Leviathan et al., arXiv 2211.17192, algorithm 1). Draft d, drawn
from q, is kept with probability min(1, p(d) / q(d)). At the first one refused, a token is drawn from
max(0, p - q), renormalised; if all are kept, one more from p. What comes out is distributed as p,
whatever q is. Greedily all of p and q is on one token, so a draft is kept where it is p's own.

Randomness enters as numbers in [0, 1) that the caller provides, so each sequence can have its own
stream, the same in any batch and on any device.

Shapes: N sequences, T tokens, V vocabulary, D drafts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """What to draw, and when to stop.

    `vocab_size`, if given, keeps ids from there on (rows that pad the embedding) from being drawn.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    stop_tokens: frozenset[int] = frozenset()
    vocab_size: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether there is nothing random."""
        return self.temperature == 0


def distribution(logits_NV: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities that tokens are drawn from, fp32, shaped as the logits [...,V]."""
    logits = _without_padding(logits_NV.float(), sampling) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        probabilities = _nucleus(probabilities, sampling.top_p)
    return probabilities


def likeliest(logits_NV: Tensor, sampling: Sampling) -> Tensor:
    """Return the likeliest tokens [...]: what greedy generation takes."""
    return logits_NV[..., : sampling.vocab_size].argmax(-1)


def draw(weights_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Draw a token from each row of unnormalised weights by inverting its distribution function.

    Shapes: weights [N,V]; uniform [N] in [0, 1), fp64.
    Returns: tokens [N].
    """
    mass = weights_NV.double().cumsum(-1)
    target = uniform_N[:, None] * mass[:, -1:]
    return torch.searchsorted(mass, target, right=True).squeeze(-1).clamp(max=mass.shape[-1] - 1)


def judge(target_NTV: Tensor, draft_NDV: Tensor, drafts_ND: Tensor, uniform_NT: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the drafts that may stay, and draw the token after them.

    Shapes: target, the probabilities p for each draft and for the token after the last, T = D + 1;
        draft, the probabilities q the drafts were drawn from; uniform fp64, one number per draft and
        one for the token drawn here.
    Returns: how many drafts were kept [N], and the token after them [N].
    """
    rows = torch.arange(len(drafts_ND), device=drafts_ND.device)
    p_of_draft = target_NTV[:, :-1].gather(-1, drafts_ND[..., None]).squeeze(-1)
    q_of_draft = draft_NDV.gather(-1, drafts_ND[..., None]).squeeze(-1)
    keep_ND = uniform_NT[:, :-1] * q_of_draft < p_of_draft
    kept_N = keep_ND.int().cumprod(1).sum(1)
    after_last = draft_NDV.new_zeros(len(rows), 1, draft_NDV.shape[-1])
    p = target_NTV[rows, kept_N]
    residual = (p - torch.cat([draft_NDV, after_last], 1)[rows, kept_N]).clamp(min=0)
    # where p = q but for rounding, nothing is left of the difference
    weights = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)
    return kept_N, draw(weights, uniform_NT[:, -1])


def _without_padding(logits_NV: Tensor, sampling: Sampling) -> Tensor:
    """Make ids beyond the vocabulary impossible."""
    if sampling.vocab_size is None or sampling.vocab_size >= logits_NV.shape[-1]:
        return logits_NV
    padding = torch.arange(logits_NV.shape[-1], device=logits_NV.device) >= sampling.vocab_size
    return logits_NV.masked_fill(padding, float("-inf"))


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens whose mass reaches `top_p`, renormalised."""
    ordered, order = probabilities.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0.0)
    kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, order, kept)
