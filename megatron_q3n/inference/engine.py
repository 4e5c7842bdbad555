"""The loop over a batch of sequences: read prompts, draw a token each, draft, verify, let go of what is done.

A step is one pass of the trunk. Either it reads prompts, packed one behind the other, at most
`prefill_tokens` of them, so that a long prompt takes several steps and costs bounded memory; or it
takes every running sequence on: its last token and its drafts go in, the drafts are judged, and the
token after those that were kept is drawn. Without drafts that is plain decoding, by the same code.

The host keeps the books, of prompts, random numbers and what is finished; decode_step.py is the device's
part. Where nothing stands against it, a round is replayed as a CUDA graph (decode_graph.py).

Shapes: N sequences, T tokens of each, S all tokens, X hidden size.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from megatron_q3n.inference.decode_graph import RoundGraphs
from megatron_q3n.inference.decode_step import Rounds
from megatron_q3n.inference.passes import Passes
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.inference.sequence import Piece, Sequence
from megatron_q3n.model.decode.state import DecodeState


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
        cuda_graph: bool | None = False,
    ) -> None:
        self._passes = Passes(model, draft_depth)
        self._rounds = Rounds(self._passes, sampling, draft_depth)
        self.graphs = RoundGraphs(self._rounds, cuda_graph)
        self._depth = draft_depth
        self._prefill_tokens, self._max_sequences = prefill_tokens, max_sequences
        self._waiting = deque(sequences)
        # a prompt that is half read: no sequence or one, and its state
        self._reading: list[Sequence] = []
        self._reading_state = self._passes.empty_state(0)
        self._running: list[Sequence] = []
        self._carried = self._rounds.nobody()
        # the newest pass: its sequences in their order, each with the tokens it read; nobody on an idle rank
        self.last_pass: list[tuple[Sequence, int]] = []

    def is_busy(self) -> bool:
        """Say whether this rank or one it shares experts with has work. A collective call."""
        return self._passes.anyone(bool(self._waiting or self._reading or self._running))

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """Make one pass of the trunk, and those of the draft layer for the next drafts.

        Returns: the new tokens.
        """
        pieces: list[Piece] = []
        self.last_pass = []
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
        self.last_pass = list(zip(sequences, counts))
        state = self._reading_state.join(self._passes.empty_state(len(sequences) - len(self._reading)))
        span = self._passes.span(state.lengths, counts)
        read = [token for s, n in zip(sequences, counts) for token in s.read(n)]
        hidden_SX = self._passes.trunk(self._passes.tokens(read), span, state)
        state.settle(counts)
        done = [row for row, s in enumerate(sequences) if s.is_read]
        last = torch.tensor(counts).cumsum(0) - 1
        pieces = self._first_tokens([sequences[row] for row in done], hidden_SX, last[done])
        if self._depth:
            following = [token for s, n in zip(sequences, counts) for token in s.following(n)]
            hidden_SX = self._passes.draft_layer(hidden_SX, self._passes.tokens(following), span, state)
        going = [row for row in done if not sequences[row].is_done]
        self._add([sequences[row] for row in going], state.select(going), hidden_SX, last[going])
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

    def _first_tokens(self, sequences: list[Sequence], hidden_SX: Tensor, last: Tensor) -> list[Piece]:
        if not sequences:
            return []
        numbers = 0 if self._rounds.sampling.is_greedy else 1
        packed = self._rounds.first_tokens(self._at(hidden_SX, last), self._numbers(sequences, numbers))
        return self._hand_out(sequences, packed)[0]

    def _add(self, sequences: list[Sequence], state: DecodeState, hidden_SX: Tensor, last: Tensor) -> None:
        """Let sequences whose prompt is read join the running ones."""
        if not sequences:
            return
        numbers = 0 if self._rounds.sampling.is_greedy else self._depth
        last_N = self._passes.tokens([s.last_token for s in sequences])
        begun = self._rounds.begin(state, last_N, self._at(hidden_SX, last), self._numbers(sequences, numbers))
        self._running += sequences
        self._carried = self._carried.join(begun)

    def _take_on(self) -> list[Piece]:
        """Take every running sequence on by the drafts that are kept and one token more."""
        self.last_pass = [(sequence, self._depth + 1) for sequence in self._running]
        numbers = self._numbers(self._running, self._rounds.numbers)
        self._carried, packed = self.graphs.take_on(self._carried, numbers, self._longest())
        pieces, kept = self._hand_out(self._running, packed)
        for sequence, num_kept in zip(self._running, kept):
            sequence.count_drafts(num_kept)
        self._carried.state.count([num_kept + 1 for num_kept in kept])
        going = [row for row, s in enumerate(self._running) if not s.is_done]
        self._running = [self._running[row] for row in going]
        self._carried = self._carried.select(going)
        return pieces

    def _longest(self) -> int:
        """Return the most tokens that a running sequence may come to have."""
        return max(len(s.prompt) + s.sampling.max_new_tokens for s in self._running)

    def _hand_out(self, sequences: list[Sequence], packed: Tensor) -> tuple[list[Piece], list[int]]:
        """Give the sequences their tokens; this waits for the device. Returns: pieces, drafts kept of each."""
        pieces, kept = [], []
        tokens = (packed.shape[1] - 1) // 3
        for sequence, (num_kept, *rest) in zip(sequences, packed.tolist()):
            kept.append(int(num_kept))
            ids, own, drawn_from = (rest[i * tokens :][: kept[-1] + 1] for i in range(3))
            pieces.append(sequence.take([int(token) for token in ids], own, drawn_from))
        return pieces, kept

    def _numbers(self, sequences: list[Sequence], count: int) -> Tensor:
        """Return the next random numbers of each sequence [N,count]."""
        return self._passes.numbers([sequence.uniforms(count) for sequence in sequences])

    def _at(self, hidden_SX: Tensor, rows: Tensor) -> Tensor:
        return hidden_SX.index_select(0, rows.to(hidden_SX.device, non_blocking=True))
