"""How many drafts a model keeps, measured on given texts by really drafting and really verifying.

At places along each text the draft layer drafts, once greedily and once drawing at temperature 1, and
one pass of the trunk over the drafts gives the model's own distribution p behind each. So nothing is
assumed of how the text goes on, and the text is only where drafting begins: training's measure
(model/mtp/draft_losses.py) knows p only where drafts repeat the text.

Greedily a draft is kept if p has it as likeliest. A drawn one is kept with probability min(1, p/q), so
Σ min(p, q) is the chance that a depth's draft is kept, *given* those before; a chain counts by the
probability that it gets there, the product of its own min(1, p/q). That is the expectation that
speculative sampling has (Leviathan et al., arXiv 2211.17192), with less noise than by tossing coins.

All ranks that share experts must bring equally many rows of equal length.

Shapes: N texts, T tokens, D drafts, V vocabulary. A branch is a chain of drafts: N greedy, N drawn.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_q3n.inference.passes import Passes
from megatron_q3n.inference.request import Abilities
from megatron_q3n.inference.sampling import Sampling, distribution, draw, likeliest
from megatron_q3n.model.decode.forward import generating
from megatron_q3n.model.decode.state import DecodeState


@dataclass(frozen=True)
class Judgement:
    """Drafts at one place of N texts, by depth. Shapes: [N,D] each, fp64.

    `greedy_reached`: 1 where all greedy drafts before were kept; `greedy_kept`: and this one too.
    `drawn_reached`: the probability that a drawn chain got here; `drawn_kept`: that it goes on.
    """

    position: int
    greedy_reached: Tensor
    greedy_kept: Tensor
    drawn_reached: Tensor
    drawn_kept: Tensor


@torch.no_grad()
def judge_drafts(
    model: Any, tokens_NT: Tensor, depth: int, stride: int, seed: int, vocab_size: int | None = None
) -> Iterator[Judgement]:
    """Draft after every `stride` tokens of each text and judge; deeper drafts than the text is long are no matter.

    `vocab_size`: ids from there on are padding, never drafted.

    Raises: UserError if the model cannot draft, or its layout not generate.
    """
    Abilities.of(model).check([], Sampling(1), depth)
    judge = _Judge(model, depth, seed, vocab_size)
    state = judge.passes.empty_state(len(tokens_NT))
    with generating(model):
        # the draft layer needs the token after its position
        for end in range(stride, tokens_NT.shape[1], stride):
            start, rows = end - stride, len(tokens_NT)
            span = judge.passes.span([start] * rows, [stride] * rows)
            hidden = judge.passes.trunk(tokens_NT[:, start:end].flatten(), span, state)
            following = tokens_NT[:, start + 1 : end + 1].flatten()
            hidden = judge.passes.draft_layer(hidden, following, span, state)
            state.settle([stride] * rows)
            newest = hidden.view(rows, stride, -1)[:, -1]
            yield judge(state, newest, tokens_NT[:, end])


class _Judge:
    """Drafts from where texts stand, and verifies."""

    def __init__(self, model: Any, depth: int, seed: int, vocab_size: int | None) -> None:
        self.passes, self._depth = Passes(model, depth), depth
        self._greedy = Sampling(1, 0.0, vocab_size=vocab_size)
        self._drawn = Sampling(1, 1.0, vocab_size=vocab_size)
        self._random = torch.Generator().manual_seed(seed)

    def __call__(self, state: DecodeState, hidden_NX: Tensor, next_N: Tensor) -> Judgement:
        """Judge drafts after the next token of each text; the state stays as it is."""
        rows = len(next_N)
        position = state.lengths[0]
        branches = state.select([*range(rows), *range(rows)])  # a copy
        drafts_BD, q_BDV = self._draft(branches, torch.cat([hidden_NX, hidden_NX]))
        tokens_BT = torch.cat([torch.cat([next_N, next_N])[:, None], drafts_BD], 1)
        span = self.passes.span(branches.lengths, [self._depth + 1] * 2 * rows)
        hidden = self.passes.trunk(tokens_BT.flatten(), span, branches, each_prefix=True)
        logits = self.passes.logits(hidden).view(2 * rows, self._depth + 1, -1)[:, :-1]
        kept_ND = (likeliest(logits[:rows], self._greedy) == drafts_BD[:rows]).double().cumprod(1)
        p, q = distribution(logits[rows:], self._drawn).double(), q_BDV[rows:]
        chosen = drafts_BD[rows:, :, None]
        passes_ND = (p.gather(-1, chosen) / q.gather(-1, chosen)).clamp(max=1)[..., 0].cumprod(1)
        reached_ND = _before(passes_ND)
        shared_ND = torch.minimum(p, q).sum(-1)
        return Judgement(position, _before(kept_ND), kept_ND, reached_ND, reached_ND * shared_ND)

    def _draft(self, branches: DecodeState, hidden_BX: Tensor) -> tuple[Tensor, Tensor]:
        """Draft greedily on the first half of the branches, by chance on the second.

        Returns: drafts [B,D]; the distributions they could be drawn from [B,D,V], fp64.
        """
        half, drafts, chances = len(hidden_BX) // 2, [], []
        for depth in range(self._depth):
            logits = self.passes.logits(hidden_BX)
            q = distribution(logits, self._drawn).double()
            uniform = torch.rand(half, generator=self._random, dtype=torch.float64)
            drawn = draw(q[half:], uniform.to(q.device))
            draft = torch.cat([likeliest(logits[:half], self._greedy), drawn])
            drafts.append(self.passes.take_first_ranks(draft))
            chances.append(q)
            if depth + 1 < self._depth:
                starts = [length + depth for length in branches.lengths]
                span = self.passes.span(starts, [1] * len(starts))
                hidden_BX = self.passes.draft_layer(hidden_BX, drafts[-1], span, branches)
        return torch.stack(drafts, 1), torch.stack(chances, 1)


def _before(chance_ND: Tensor) -> Tensor:
    """Return what held before each depth: 1 at the first."""
    return torch.cat([torch.ones_like(chance_ND[:, :1]), chance_ND[:, :-1]], 1)
