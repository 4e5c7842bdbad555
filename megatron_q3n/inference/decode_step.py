"""A round: one pass of the trunk for every running sequence, with all that is decided on its logits.

The last token and its drafts go in; the drafts are judged, the token after those kept is drawn, what
was refused is taken back, and the draft layer drafts anew. All of it happens on the device, which
alone knows meanwhile how long the sequences are, and is waited for once, when the host reads `packed`.
Everything that a round leaves behind is written where it lay before, so a round may be captured as a
CUDA graph (decode_graph.py) and is the same code where it is not.

Shapes: N sequences, D drafts of each, T = D + 1, X hidden size, V vocabulary, U random numbers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.inference.passes import Passes
from megatron_q3n.inference.sampling import Sampling, distribution, draw, judge, likeliest
from megatron_q3n.kernels.decode.argmax import Judged, judge_likeliest, take_likeliest
from megatron_q3n.model.decode.forward import raw_logits_of
from megatron_q3n.model.decode.span import Span
from megatron_q3n.model.decode.state import DecodeState


@dataclass
class Running:
    """Sequences between two rounds, on the device.

    Shapes: lengths and last tokens [N], drafts [N,D], the probabilities they were drawn from [N,D,V] fp32
        (V = 0 when greedy).
    """

    state: DecodeState
    length_N: Tensor
    last_N: Tensor
    drafts_ND: Tensor
    chances_NDV: Tensor

    def join(self, other: "Running") -> "Running":
        """Return these sequences followed by the others."""
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return Running(self.state.join(other.state), *(torch.cat(pair) for pair in pairs))

    def select(self, rows: list[int]) -> "Running":
        """Return some of the sequences, in this order; all of them are the same object."""
        if rows == list(range(len(self.state.lengths))):
            return self
        index = torch.tensor(rows, dtype=torch.long).to(self.last_N.device, non_blocking=True)
        return Running(self.state.select(rows), *(x.index_select(0, index) for x in self.tensors()))

    def own(self) -> None:
        """Move to memory of its own what may be a view of a captured round's buffers."""
        self.state.own()
        self.length_N, self.last_N, self.drafts_ND, self.chances_NDV = (x.clone() for x in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Return what is kept beside the state."""
        return [self.length_N, self.last_N, self.drafts_ND, self.chances_NDV]


class Rounds:
    """Runs rounds of one model, always drafting so deep and drawing so."""

    def __init__(self, passes: Passes, sampling: Sampling, depth: int) -> None:
        self.passes, self.sampling, self.depth = passes, sampling, depth
        # greedy drafts need no probabilities
        self._num_choices = 0 if sampling.is_greedy else passes.model.vocab_size

    @property
    def tokens(self) -> int:
        """Tokens of each sequence that the trunk sees in a round."""
        return self.depth + 1

    @property
    def numbers(self) -> int:
        """Random numbers that a round takes of each sequence."""
        return 0 if self.sampling.is_greedy else self.tokens + self.depth

    def reach(self, longest: int) -> int:
        """Return the end of all positions that a round may write, for sequences of at most `longest` tokens."""
        return longest + self.tokens + max(0, self.depth - 1)

    def nobody(self, rows: int = 0) -> Running:
        """Return room for sequences, with nothing in it."""
        zeros_N = torch.zeros(rows, dtype=torch.long, device=self.passes.device)
        state = self.passes.empty_state(rows)
        state.stack_up()
        return self._without_drafts(state, zeros_N, zeros_N.clone())

    def _without_drafts(self, state: DecodeState, length_N: Tensor, last_N: Tensor) -> Running:
        drafts_ND = last_N.new_zeros(len(last_N), self.depth)
        chances = torch.zeros(*drafts_ND.shape, self._num_choices, device=last_N.device)
        return Running(state, length_N, last_N, drafts_ND, chances)

    def first_tokens(self, hidden_NX: Tensor, uniform_NU: Tensor) -> Tensor:
        """Draw each sequence's first token behind its prompt. Returns: packed, see `take_on`."""
        logits_N1V = self._logits(hidden_NX).unsqueeze(1)
        no_drafts_N0 = torch.zeros(len(hidden_NX), 0, dtype=torch.long, device=hidden_NX.device)
        no_chances = torch.zeros(*no_drafts_N0.shape, self._num_choices, device=hidden_NX.device)
        return self._choose(logits_N1V, no_drafts_N0, no_chances, uniform_NU).packed

    def begin(self, state: DecodeState, last_N: Tensor, hidden_NX: Tensor, uniform_ND: Tensor) -> Running:
        """Let sequences begin: draft from the draft layer's output at their newest position."""
        running = self._without_drafts(state, self.passes.tokens(state.lengths), last_N)
        if self.depth:
            newest = hidden_NX, self._logits(hidden_NX)
            self._draft(running, *newest, uniform_ND, self.reach(max(state.lengths)))
        return running

    def take_on(self, running: Running, uniform_NU: Tensor, reach: int) -> Tensor:
        """Take every sequence on by the drafts that are kept and one token more, in place.

        Shapes: uniform [N,U] in [0, 1), fp64, U = `numbers`: for judging, then for the next drafts.
        Returns: packed [N, 1 + 3·T] fp64: drafts kept, the tokens chosen (meaningful up to the one drawn),
            their log probabilities, and under what they were drawn from (0 when greedy).
        """
        rows, tokens, state = len(running.last_N), self.tokens, running.state
        span = Span.at(running.length_N, tokens, reach)
        tokens_NT = torch.cat([running.last_N[:, None], running.drafts_ND], 1)
        hidden_SX = self.passes.trunk(tokens_NT.flatten(), span, state, each_prefix=True, normed=False)
        hidden_SX, logits_SV = self._read_out(hidden_SX, drafts=False)
        logits_NTV = logits_SV.view(rows, tokens, -1)
        judged = self._choose(logits_NTV, running.drafts_ND, running.chances_NDV, uniform_NU[:, :tokens])
        chosen_S = judged.chosen_NT.flatten()
        state.keep(judged.row_N)
        if self.depth:  # the span's positions are those before the sequences grow
            hidden_SX = self.passes.draft_layer(hidden_SX, chosen_S, span, state, normed=False)
        running.length_N.add_(judged.grown_N)
        torch.index_select(chosen_S, 0, judged.row_N, out=running.last_N)
        if self.depth:
            newest = self._read_out(hidden_SX.index_select(0, judged.row_N), drafts=True)
            self._draft(running, *newest, uniform_NU[:, tokens:], reach)
        return judged.packed

    def _read_out(self, hidden_SX: Tensor, *, drafts: bool) -> tuple[Tensor, Tensor]:
        """Norm what came un-normed, and return it with the logits that the sampling wants."""
        hidden_SX, logits_SV = self.passes.read_out(hidden_SX, drafts=drafts)
        return hidden_SX, logits_SV if self.sampling.is_greedy else logits_SV.float()

    def _logits(self, hidden_SX: Tensor) -> Tensor:
        """Return logits [S,V] that the sampling wants: greedily in their own format, which loses nothing."""
        if self.sampling.is_greedy:
            return raw_logits_of(self.passes.model, hidden_SX)
        return self.passes.logits(hidden_SX)

    def _choose(self, logits_NTV: Tensor, drafts_ND: Tensor, chances_NDV: Tensor, uniform_NT: Tensor) -> Judged:
        """Judge the drafts, and draw the token after those kept. Returns: among others packed, see `take_on`."""
        if self.sampling.is_greedy:
            judged = judge_likeliest(logits_NTV, drafts_ND, self.sampling.vocab_size)
            if self.passes.is_alone:
                return judged
            return _read(self.passes.take_first_ranks(judged.packed))
        target_NTV = distribution(logits_NTV, self.sampling)
        kept_N, drawn_N = judge(target_NTV, chances_NDV, drafts_ND, uniform_NT)
        chosen_NT = F.pad(drafts_ND, (0, 1)).scatter(1, kept_N[:, None], drawn_N[:, None])
        own_NT = _at(logits_NTV.log_softmax(-1), chosen_NT)
        drawn_from_NT = _at(target_NTV, chosen_NT).log()
        # one tensor, so that a GPU is waited for once
        parts = kept_N[:, None], chosen_NT, own_NT, drawn_from_NT
        return _read(self.passes.take_first_ranks(torch.cat([part.double() for part in parts], 1)))

    def _draft(self, running: Running, hidden_NX: Tensor, logits_NV: Tensor, uniform_ND: Tensor, reach: int) -> None:
        """Draft from the MTP layer's output at each sequence's newest position, repeating the layer."""
        for depth in range(self.depth):
            draft_N = running.drafts_ND[:, depth]
            if self.sampling.is_greedy and self.passes.is_alone:
                take_likeliest(logits_NV, draft_N, self.sampling.vocab_size)
            else:
                drawn_N = self._drawn(running, logits_NV, uniform_ND, depth)
                draft_N.copy_(self.passes.take_first_ranks(drawn_N))
            if depth + 1 < self.depth:
                span = Span.at(running.length_N + depth, 1, reach)
                hidden_NX = self.passes.draft_layer(hidden_NX, draft_N, span, running.state, normed=False)
                hidden_NX, logits_NV = self._read_out(hidden_NX, drafts=True)

    def _drawn(self, running: Running, logits_NV: Tensor, uniform_ND: Tensor, depth: int) -> Tensor:
        """Draw a draft of each sequence, and note the probabilities where they are asked for later."""
        if self.sampling.is_greedy:
            return likeliest(logits_NV, self.sampling)
        chances_NV = distribution(logits_NV, self.sampling)
        running.chances_NDV[:, depth] = chances_NV
        return draw(chances_NV, uniform_ND[:, depth])


def _read(packed: Tensor) -> Judged:
    """Read what was judged off the packed numbers, which are the first rank's."""
    rows, tokens = len(packed), packed.shape[1] // 3
    kept_N, chosen_NT = packed[:, 0].long(), packed[:, 1 : 1 + tokens].long()
    row_N = torch.arange(rows, device=packed.device) * tokens + kept_N
    return Judged(packed, chosen_NT, kept_N + 1, row_N)


def _at(values_NTV: Tensor, tokens_NT: Tensor) -> Tensor:
    return values_NTV.gather(-1, tokens_NT[..., None]).squeeze(-1)
