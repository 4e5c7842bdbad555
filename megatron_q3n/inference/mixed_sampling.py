"""Mixed sampling: every sequence of a batch has its own temperature, top_k and top_p, as requests to a server have.

A greedy sequence is one whose distribution has all mass on the most probable token, so greedy and sampled sequences
share a batch and one path. `sampling.py` has the same distribution for batches with equal parameters, which are
constants of a CUDA graph.

Shapes: N sequences, T tokens, V vocabulary, K most probable tokens, P parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.inference.sampling import Sampling, mask_padding

# temperature, top_k and top_p
NUM_PARAMETERS = 3


@dataclass(frozen=True)
class MixedSampling:
    """What the sequences of one pass need: whether any restricts its tokens, and the most alternatives any records."""

    vocab_size: int | None
    restricts_tokens: bool = True
    num_top_logprobs: int = 0
    is_greedy = False

    def for_sequences(self, samplings: Sequence[Sampling]) -> "MixedSampling":
        """Return the needs of sequences with these sampling parameters."""
        restricts = any(s.top_k is not None or s.top_p < 1 for s in samplings)
        return MixedSampling(self.vocab_size, restricts, max((s.num_top_logprobs for s in samplings), default=0))

    def distribution(self, logits_NTV: Tensor, parameters_NP: Tensor) -> Tensor:
        """Return the probabilities that each sequence's tokens are sampled from, fp32, shaped as the logits [N,T,V]."""
        logits_NTV = mask_padding(logits_NTV.float(), self.vocab_size)
        temperature, top_k, top_p = (column[:, None, None] for column in parameters_NP.unbind(1))
        is_greedy = temperature == 0
        scaled = logits_NTV / torch.where(is_greedy, 1.0, temperature).float()
        if self.restricts_tokens:
            probabilities = _restricted_softmax(scaled, top_k.long(), top_p.float())
        else:
            probabilities = scaled.softmax(-1)
        one_hot = F.one_hot(logits_NTV.argmax(-1), logits_NTV.shape[-1]).float()
        return torch.where(is_greedy, one_hot, probabilities)

    def logprobs(self, logits_NTV: Tensor) -> Tensor:
        """Return the model's log probabilities of the tokens that can be sampled, fp32 [N,T,V]."""
        return mask_padding(logits_NTV.float(), self.vocab_size).log_softmax(-1)


def parameters(samplings: Sequence[Sampling], vocab_size: int) -> Tensor:
    """Return the sampling parameters as one tensor [N,P], fp64; no top_k is `vocab_size`."""
    rows = [(s.temperature, s.top_k or vocab_size, s.top_p) for s in samplings]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, NUM_PARAMETERS)


def _restricted_softmax(logits_NTV: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Return the softmax over the top_k most probable tokens, then over the smallest set of them with mass top_p."""
    ordered, order = logits_NTV.sort(-1, descending=True)
    last_kept = (top_k.clamp(max=ordered.shape[-1]) - 1).expand(*ordered.shape[:-1], 1)
    # tokens as probable as the last one are kept too, as by sampling.distribution
    ordered = ordered.masked_fill(ordered < ordered.gather(-1, last_kept), float("-inf"))
    probabilities = ordered.softmax(-1)
    mass_before = probabilities.cumsum(-1) - probabilities
    # without a restriction rounding must not remove the last tokens
    limit = torch.where(top_p < 1, top_p, torch.inf)
    kept = probabilities.masked_fill(mass_before >= limit, 0.0)
    return torch.zeros_like(kept).scatter(-1, order, kept / kept.sum(-1, keepdim=True))
