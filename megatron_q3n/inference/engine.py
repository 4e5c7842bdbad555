"""The loop over a batch of sequences: read prompts, draw a token each, draft, verify, let go of what is done.

A step is one pass of the trunk. Either it reads prompts, packed one behind the other, at most
`prefill_tokens` of them, so that a long prompt takes several steps and costs bounded memory; or it
takes every running sequence on: its last token and its drafts go in, the drafts are judged, and the
token after those that were kept is drawn. Without drafts that is plain decoding, by the same code.

Shapes: N sequences, T tokens of each, D drafts of each (T = D + 1), S all tokens, X hidden size,
V vocabulary.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.inference.passes import Passes
from megatron_q3n.inference.sampling import (
    Sampling,
    distribution,
    draw,
    judge,
    judge_greedily,
    likeliest,
)
from megatron_q3n.inference.sequence import Piece, Sequence
from megatron_q3n.model.decode_state import DecodeState


@dataclass
class _Drafts:
    """Drafted tokens [N,D], and the probabilities they were drawn from [N,D,V]; V = 0 when greedy."""

    tokens_ND: Tensor
    probabilities_NDV: Tensor

    def join(self, other: "_Drafts") -> "_Drafts":
        return _Drafts(
            torch.cat([self.tokens_ND, other.tokens_ND]),
            torch.cat([self.probabilities_NDV, other.probabilities_NDV]),
        )


class Engine:
    """Sequences on their way; `step` while `is_busy`."""

    def __init__(
        self,
        model: Any,
        sequences: list[Sequence],
        sampling: Sampling,
        *,
        draft_depth: int,
        prefill_tokens: int,
        max_sequences: int,
    ) -> None:
        self._passes = Passes(model, draft_depth)
        # greedy drafts need no probabilities
        self._num_choices = 0 if sampling.is_greedy else model.vocab_size
        self._sampling, self._depth = sampling, draft_depth
        self._prefill_tokens, self._max_sequences = prefill_tokens, max_sequences
        self._waiting = deque(sequences)
        # a prompt that is half read: no sequence or one, and its state
        self._reading: list[Sequence] = []
        self._reading_state = self._passes.empty_state(0)
        self._running: list[Sequence] = []
        self._state = self._passes.empty_state(0)
        self._drafts = self._no_drafts(0, self._depth)

    def is_busy(self) -> bool:
        """Say whether this rank or one it shares experts with has work. A collective call."""
        return self._passes.anyone(bool(self._waiting or self._reading or self._running))

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """Make one pass of the trunk, and those of the draft layer for the next drafts.

        Returns: the new tokens.
        """
        pieces: list[Piece] = []
        has_place = len(self._running) < self._max_sequences
        if self._reading or (self._waiting and has_place):
            pieces = self._read_prompts()
        elif self._running:
            pieces = self._take_on()
        self._passes.finish_step()
        return pieces

    def _read_prompts(self) -> list[Piece]:
        """Read the next tokens of prompts; those read to their end get a token and join the running ones."""
        sequences, counts = self._next_prompts()
        state = self._reading_state.join(
            self._passes.empty_state(len(sequences) - len(self._reading))
        )
        span = self._passes.span(state.lengths, counts)
        read = [token for s, n in zip(sequences, counts) for token in s.read(n)]
        hidden_SX = self._passes.trunk(self._passes.tokens(read), span, state)
        state.settle(counts)
        done = [row for row, s in enumerate(sequences) if s.is_read]
        last = torch.tensor(counts).cumsum(0) - 1
        pieces = self._first_tokens([sequences[row] for row in done], hidden_SX[last[done]])
        if self._depth:
            following = [token for s, n in zip(sequences, counts) for token in s.following(n)]
            hidden_SX = self._passes.draft_layer(
                hidden_SX, self._passes.tokens(following), span, state
            )
        going = [row for row in done if not sequences[row].is_done]
        self._add([sequences[row] for row in going], state.select(going), hidden_SX[last[going]])
        half = [row for row, s in enumerate(sequences) if not s.is_read]
        self._reading, self._reading_state = [sequences[row] for row in half], state.select(half)
        return pieces

    def _next_prompts(self) -> tuple[list[Sequence], list[int]]:
        """Choose what to read: the half-read prompt, then waiting ones, within the tokens and places there are."""
        sequences: list[Sequence] = []
        counts: list[int] = []
        budget, queue = self._prefill_tokens, [*self._reading, *self._waiting]
        places = min(len(queue), self._max_sequences - len(self._running))
        while len(sequences) < places and budget:
            sequence = queue[len(sequences)]
            counts.append(min(budget, len(sequence.prompt) - sequence.num_read))
            sequences.append(sequence)
            budget -= counts[-1]
        for _ in range(len(sequences) - len(self._reading)):
            self._waiting.popleft()
        return sequences, counts

    def _first_tokens(self, sequences: list[Sequence], hidden_NX: Tensor) -> list[Piece]:
        if not sequences:
            return []
        logits_N1V = self._passes.logits(hidden_NX).unsqueeze(1)
        return self._draw(sequences, logits_N1V, self._no_drafts(len(sequences), 0))[0]

    def _add(self, sequences: list[Sequence], state: DecodeState, hidden_NX: Tensor) -> None:
        """Let sequences whose prompt is read join the running ones."""
        if sequences:
            self._drafts = self._drafts.join(self._draft(sequences, state, hidden_NX))
            self._running += sequences
            self._state = self._state.join(state)

    def _take_on(self) -> list[Piece]:
        """Take every running sequence on by the drafts that are kept and one token more."""
        rows, tokens, state = len(self._running), self._depth + 1, self._state
        span = self._passes.span(state.lengths, [tokens] * rows)
        last_N1 = self._passes.tokens([s.last_token for s in self._running]).unsqueeze(1)
        tokens_NT = torch.cat([last_N1, self._drafts.tokens_ND], 1)
        hidden_SX = self._passes.trunk(tokens_NT.flatten(), span, state, each_prefix=True)
        logits_NTV = self._passes.logits(hidden_SX).view(rows, tokens, -1)
        pieces, kept, chosen_NT = self._draw(self._running, logits_NTV, self._drafts)
        for sequence, num_kept in zip(self._running, kept):
            sequence.count_drafts(num_kept)
        state.settle([num_kept + 1 for num_kept in kept])
        going = [row for row, s in enumerate(self._running) if not s.is_done]
        if self._depth and going:
            hidden_SX = self._passes.draft_layer(hidden_SX, chosen_NT.flatten(), span, state)
        newest = self._passes.tokens([row * tokens + kept[row] for row in going])
        self._running = [self._running[row] for row in going]
        self._state = state.select(going)
        self._drafts = self._draft(self._running, self._state, hidden_SX[newest])
        return pieces

    def _draw(
        self, sequences: list[Sequence], logits_NTV: Tensor, drafts: _Drafts
    ) -> tuple[list[Piece], list[int], Tensor]:
        """Judge the drafts, draw the token after them, and give the sequences their tokens.

        Returns: the pieces; how many drafts were kept; the tokens chosen [N,T], meaningful up to the
            one drawn.
        """
        tokens = logits_NTV.shape[1]
        drafts_ND = drafts.tokens_ND
        if self._sampling.is_greedy:
            kept_N, drawn_N = judge_greedily(likeliest(logits_NTV, self._sampling), drafts_ND)
        else:
            target_NTV = distribution(logits_NTV, self._sampling)
            uniform_NT = self._passes.numbers([sequence.uniforms(tokens) for sequence in sequences])
            kept_N, drawn_N = judge(target_NTV, drafts.probabilities_NDV, drafts_ND, uniform_NT)
        chosen_NT = F.pad(drafts_ND, (0, 1)).scatter(1, kept_N[:, None], drawn_N[:, None])
        own_NT = _at(logits_NTV.log_softmax(-1), chosen_NT).double()
        greedy = self._sampling.is_greedy
        drawn_from_NT = torch.zeros_like(own_NT) if greedy else _at(target_NTV, chosen_NT).log()
        # one tensor, so that a GPU is waited for once: kept | tokens | log probabilities, twice
        packed = torch.cat([kept_N[:, None], chosen_NT, own_NT, drawn_from_NT], 1)
        packed = self._passes.take_first_ranks(packed)
        pieces, kept = [], []
        for sequence, (num_kept, *rest) in zip(sequences, packed.tolist()):
            kept.append(int(num_kept))
            ids, own, drawn_from = (rest[i * tokens :][: kept[-1] + 1] for i in range(3))
            pieces.append(sequence.take([int(token) for token in ids], own, drawn_from))
        return pieces, kept, packed[:, 1 : 1 + tokens].long()

    def _draft(self, sequences: list[Sequence], state: DecodeState, hidden_NX: Tensor) -> _Drafts:
        """Draft from the MTP layer's output at each sequence's newest position, repeating the layer."""
        if not self._depth or not sequences:
            return self._no_drafts(len(sequences), self._depth)
        tokens, probabilities = [], []
        for depth in range(self._depth):
            draft_N, q_NV = self._draw_draft(sequences, self._passes.logits(hidden_NX))
            tokens.append(self._passes.take_first_ranks(draft_N))
            probabilities.append(q_NV)
            if depth + 1 < self._depth:
                starts = [length + depth for length in state.lengths]
                span = self._passes.span(starts, [1] * len(sequences))
                hidden_NX = self._passes.draft_layer(hidden_NX, tokens[-1], span, state)
        return _Drafts(torch.stack(tokens, 1), torch.stack(probabilities, 1))

    def _draw_draft(self, sequences: list[Sequence], logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Draw one draft for each sequence. Returns: tokens [N], and what they were drawn from [N,V]."""
        if self._sampling.is_greedy:
            return likeliest(logits_NV, self._sampling), logits_NV[:, :0]
        q_NV = distribution(logits_NV, self._sampling)
        uniform_N = self._passes.numbers([s.uniforms(1) for s in sequences]).squeeze(1)
        return draw(q_NV, uniform_N), q_NV

    def _no_drafts(self, rows: int, depth: int) -> _Drafts:
        device = self._passes.device
        return _Drafts(
            torch.zeros(rows, depth, dtype=torch.long, device=device),
            torch.zeros(rows, depth, self._num_choices, device=device),
        )


def _at(values_NTV: Tensor, tokens_NT: Tensor) -> Tensor:
    return values_NTV.gather(-1, tokens_NT[..., None]).squeeze(-1)
