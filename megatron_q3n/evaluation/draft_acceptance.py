"""Draft acceptance of speculative decoding, measured on given texts by drafting and verifying.

At regular positions of each text the MTP layer drafts a chain of tokens, once greedily and once by sampling at
temperature 1 from the draft distribution q. One forward pass of the trunk over the drafts gives the target distribution
p at each. The measurement therefore holds for any continuation; the text only provides the prefixes. The estimate made
during training (model/mtp/draft_losses.py) is limited to positions where the drafts repeat the text.

A greedy draft is accepted if it is the argmax of p. A sampled draft is accepted with probability min(1, p/q), so its
depth's acceptance rate *given* the earlier drafts is Σ min(p, q). A chain is weighted by the probability that it
reaches the depth, the product of its own min(1, p/q). This is the expectation of speculative sampling (Leviathan et
al., arXiv 2211.17192) with less variance than simulating accept and reject decisions.

All ranks that share experts must pass the same number of rows of the same length.

Shapes: N texts, T tokens, D drafts, V vocabulary, B = 2 N branches (draft chains): N greedy, then N sampled.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_q3n.inference.limits import GenerationLimits
from megatron_q3n.inference.model_runner import ModelRunner
from megatron_q3n.inference.sampling import Sampling, distribution, greedy_tokens, sample_tokens
from megatron_q3n.model.decode.forward import generating
from megatron_q3n.model.decode.protocols import DecodeModel
from megatron_q3n.model.decode.state import DecodeState


@dataclass(frozen=True)
class Verification:
    """Verified drafts at one position of N texts, by depth. Shapes: [N,D] each, fp64.

    `greedy_reached`: 1 where all earlier greedy drafts were accepted; `greedy_accepted`: 1 where this one is, too.
    `sampled_reached`: probability that a sampled chain reaches this depth; `sampled_accepted`: that it also passes it.
    """

    position: int
    greedy_reached: Tensor
    greedy_accepted: Tensor
    sampled_reached: Tensor
    sampled_accepted: Tensor


@torch.no_grad()
def verify_drafts(
    model: DecodeModel, tokens_NT: Tensor, depth: int, stride: int, seed: int, vocab_size: int | None = None
) -> Iterator[Verification]:
    """Yield the verification of `depth` drafts after every `stride` tokens of each text.

    Drafts may extend beyond the end of the text. Token ids from `vocab_size` on are padding and never drafted.

    Raises: UserError if the model cannot draft, or its parallel layout cannot generate.
    """
    GenerationLimits.from_model(model).check([], Sampling(1), depth)
    verifier = _DraftVerifier(model, depth, seed, vocab_size)
    state = verifier.runner.empty_state(len(tokens_NT))
    with generating(model):
        # the MTP layer needs the token after its position
        for end in range(stride, tokens_NT.shape[1], stride):
            start, rows = end - stride, len(tokens_NT)
            span = verifier.runner.span([start] * rows, [stride] * rows)
            hidden = verifier.runner.run_trunk(tokens_NT[:, start:end].flatten(), span, state)
            next_tokens = tokens_NT[:, start + 1 : end + 1].flatten()
            hidden = verifier.runner.run_mtp_layer(hidden, next_tokens, span, state)
            state.commit([stride] * rows)
            last_hidden = hidden.view(rows, stride, -1)[:, -1]
            yield verifier(state, last_hidden, tokens_NT[:, end])


class _DraftVerifier:
    """Drafts after the current position of each text and verifies the drafts."""

    def __init__(self, model: DecodeModel, depth: int, seed: int, vocab_size: int | None) -> None:
        self.runner, self._depth = ModelRunner(model, depth), depth
        self._vocab_size = vocab_size
        self._sampled = Sampling(1, 1.0, vocab_size=vocab_size)
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, state: DecodeState, hidden_NX: Tensor, next_N: Tensor) -> Verification:
        """Draft and verify after the next token of each text; `state` is not changed."""
        rows = len(next_N)
        position = state.lengths[0]
        # select copies the state
        branches = state.select([*range(rows), *range(rows)])
        drafts_BD, q_BDV = self._draft(branches, torch.cat([hidden_NX, hidden_NX]))
        tokens_BT = torch.cat([torch.cat([next_N, next_N])[:, None], drafts_BD], 1)
        span = self.runner.span(branches.lengths, [self._depth + 1] * 2 * rows)
        hidden = self.runner.run_trunk(tokens_BT.flatten(), span, branches, state_per_token=True)
        logits = self.runner.compute_logits(hidden).view(2 * rows, self._depth + 1, -1)[:, :-1]
        accepted_ND = (greedy_tokens(logits[:rows], self._vocab_size) == drafts_BD[:rows]).double().cumprod(1)
        p, q = distribution(logits[rows:], self._sampled).double(), q_BDV[rows:]
        index_ND1 = drafts_BD[rows:, :, None]
        passed_ND = (p.gather(-1, index_ND1) / q.gather(-1, index_ND1)).clamp(max=1)[..., 0].cumprod(1)
        reached_ND = _before(passed_ND)
        overlap_ND = torch.minimum(p, q).sum(-1)
        return Verification(position, _before(accepted_ND), accepted_ND, reached_ND, reached_ND * overlap_ND)

    def _draft(self, branches: DecodeState, hidden_BX: Tensor) -> tuple[Tensor, Tensor]:
        """Draft greedily on the first half of the branches and by sampling on the second.

        Returns: drafts [B,D]; the draft distributions q [B,D,V], fp64.
        """
        half, drafts, distributions = len(hidden_BX) // 2, [], []
        for depth in range(self._depth):
            logits = self.runner.compute_logits(hidden_BX)
            q = distribution(logits, self._sampled).double()
            uniform = torch.rand(half, generator=self._generator, dtype=torch.float64)
            sampled = sample_tokens(q[half:], uniform.to(q.device))
            draft = torch.cat([greedy_tokens(logits[:half], self._vocab_size), sampled])
            drafts.append(self.runner.broadcast_from_first_tp_rank(draft))
            distributions.append(q)
            if depth + 1 < self._depth:
                starts = [length + depth for length in branches.lengths]
                span = self.runner.span(starts, [1] * len(starts))
                hidden_BX = self.runner.run_mtp_layer(hidden_BX, drafts[-1], span, branches)
        return torch.stack(drafts, 1), torch.stack(distributions, 1)


def _before(values_ND: Tensor) -> Tensor:
    """Return the value of the previous depth, 1 at the first."""
    return torch.cat([torch.ones_like(values_ND[:, :1]), values_ND[:, :-1]], 1)
