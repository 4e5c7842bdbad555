"""Token sampling, and verification of draft tokens by speculative sampling.

**Sampling.** Logits are divided by the temperature and restricted to the `top_k` most probable tokens, then to the
smallest set of those that holds `top_p` of the mass (nucleus sampling); the rest is renormalized. Temperature 0 is
greedy decoding.

**Verification of drafts** (speculative sampling, Leviathan et al., arXiv 2211.17192, algorithm 1). Draft d, sampled
from q, is accepted with probability min(1, p(d) / q(d)). At the first rejected draft a token is sampled from max(0, p -
q), renormalized; if all are accepted, one more token is sampled from p. The output is distributed as p, whatever q is.
With greedy decoding p and q have all mass on one token, so a draft is accepted where it is the argmax of p.

The caller passes random numbers in [0, 1), so that each sequence has its own random stream, the same in any batch and
on any device.

Shapes: N sequences, T tokens, V vocabulary, D drafts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_q3n.config import UserError
from megatron_q3n.config.sampling import temperature_complaint, top_k_complaint, top_p_complaint


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters and stop conditions.

    `vocab_size`, if set, excludes ids from there on (padding rows of the embedding). `num_top_logprobs` alternatives of
    each token are recorded with their log-probs, by engines of mixed sampling only.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    stop_tokens: frozenset[int] = frozenset()
    vocab_size: int | None = None
    num_top_logprobs: int = 0

    def __post_init__(self) -> None:
        """Raises: UserError for a parameter that describes no distribution."""
        complaints = {
            "max_new_tokens": None if self.max_new_tokens >= 1 else "must be at least 1",
            "temperature": temperature_complaint(self.temperature),
            "top_k": top_k_complaint(self.top_k),
            "top_p": top_p_complaint(self.top_p),
        }
        for name, complaint in complaints.items():
            if complaint:
                raise UserError(f"{name}={getattr(self, name)!r} {complaint}.")

    @property
    def is_greedy(self) -> bool:
        """Whether decoding is greedy: temperature 0."""
        return self.temperature == 0


def distribution(logits_NV: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities that tokens are sampled from, fp32, shaped as the logits [...,V]."""
    logits = mask_padding(logits_NV.float(), sampling.vocab_size) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        probabilities = _restrict_to_nucleus(probabilities, sampling.top_p)
    return probabilities


def greedy_tokens(logits_NV: Tensor, vocab_size: int | None) -> Tensor:
    """Return the most probable tokens [...] with ids below `vocab_size`."""
    return logits_NV[..., :vocab_size].argmax(-1)


def sample_tokens(weights_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Sample a token from each row of unnormalized weights by inverting its cumulative distribution.

    Shapes: weights [N,V]; uniform [N] in [0, 1), fp64.
    Returns: tokens [N].
    """
    cumulative = weights_NV.double().cumsum(-1)
    target = uniform_N[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=cumulative.shape[-1] - 1)


def rejection_sample(
    target_NTV: Tensor, draft_NDV: Tensor, drafts_ND: Tensor, uniform_NT: Tensor
) -> tuple[Tensor, Tensor]:
    """Accept or reject drafts, and sample the token after the last accepted one.

    Shapes: target, the probabilities p of each draft's position and of the position after the last, T = D + 1; draft,
        the probabilities q that the drafts were sampled from; uniform fp64, one number for each draft and one for the
        token sampled here.
    Returns: the number of accepted drafts [N], and the token after them [N].
    Reference: Leviathan et al. (arXiv 2211.17192), algorithm 1.
    """
    rows = torch.arange(len(drafts_ND), device=drafts_ND.device)
    p_of_draft = target_NTV[:, :-1].gather(-1, drafts_ND[..., None]).squeeze(-1)
    q_of_draft = draft_NDV.gather(-1, drafts_ND[..., None]).squeeze(-1)
    is_accepted_ND = uniform_NT[:, :-1] * q_of_draft < p_of_draft
    num_accepted_N = is_accepted_ND.int().cumprod(1).sum(1)
    after_last = draft_NDV.new_zeros(len(rows), 1, draft_NDV.shape[-1])
    p = target_NTV[rows, num_accepted_N]
    residual = (p - torch.cat([draft_NDV, after_last], 1)[rows, num_accepted_N]).clamp(min=0)
    # where p equals q up to rounding, the difference has no mass
    weights = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)
    return num_accepted_N, sample_tokens(weights, uniform_NT[:, -1])


def mask_padding(logits_NV: Tensor, vocab_size: int | None) -> Tensor:
    """Set the logits of ids beyond the vocabulary to -inf."""
    if vocab_size is None or vocab_size >= logits_NV.shape[-1]:
        return logits_NV
    is_padding = torch.arange(logits_NV.shape[-1], device=logits_NV.device) >= vocab_size
    return logits_NV.masked_fill(is_padding, float("-inf"))


def _restrict_to_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Restrict to the smallest set of most probable tokens whose mass reaches `top_p`, renormalized."""
    ordered, order = probabilities.sort(-1, descending=True)
    mass_before = ordered.cumsum(-1) - ordered
    nucleus = ordered.masked_fill(mass_before >= top_p, 0.0)
    nucleus = nucleus / nucleus.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, order, nucleus)
