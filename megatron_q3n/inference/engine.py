"""Generation engine: continuous batching with chunked prefill and speculative decoding.

A step is one pass of the trunk. It is either a prefill of waiting prompts, packed and at most `prefill_tokens` of them,
so that a long prompt takes several steps of bounded memory (chunked prefill); or a decode step of all running
sequences: each brings its last token and its draft tokens, the drafts are verified, and the next token is sampled.
Without drafts the same code is plain decoding. Requests are admitted to the running batch when their prompt is
complete, and retired when they are finished. A server adds requests while others run (`add`), and removes those whose
client has left (`cancel`); they may differ in their sampling parameters (MixedSampling).

The host keeps prompts, random numbers and completions; decode_step.py runs on the device. Where possible a decode step
is replayed as a CUDA graph (decode_graph.py).

Shapes: N sequences, T tokens of each, S all tokens, X hidden size.
"""

from collections import deque
from collections.abc import Set

import torch
from torch import Tensor

from megatron_q3n.inference.decode_graph import DecodeGraphs
from megatron_q3n.inference.decode_step import DecodeStep
from megatron_q3n.inference.mixed_sampling import MixedSampling
from megatron_q3n.inference.model_runner import ModelRunner
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.inference.sequence import Sequence, TokenChunk
from megatron_q3n.model.decode.protocols import DecodeModel
from megatron_q3n.model.decode.state import DecodeState


class Engine:
    """Scheduler of waiting, prefilling and running sequences; call `step` while `is_busy`."""

    def __init__(
        self,
        model: DecodeModel,
        sequences: list[Sequence],
        sampling: Sampling | MixedSampling,
        *,
        draft_depth: int,
        prefill_tokens: int,
        max_sequences: int,
        cuda_graph: bool | None = False,
        alternates: bool = False,
    ) -> None:
        """Make the engine; with `alternates` running sequences get a decode step between two prefill passes."""
        self._runner = ModelRunner(model, draft_depth)
        self._decode_step = DecodeStep(self._runner, sampling, draft_depth)
        self.graphs = DecodeGraphs(self._decode_step, cuda_graph)
        self._depth = draft_depth
        self._prefill_tokens, self._max_sequences = prefill_tokens, max_sequences
        self._alternates = alternates
        self._waiting = deque(sequences)
        # at most one sequence whose prompt is partly prefilled, and its state
        self._prefilling: list[Sequence] = []
        self._prefilling_state = self._runner.empty_state(0)
        self._running: list[Sequence] = []
        self._batch = self._decode_step.empty_batch()
        # whether the newest pass was a prefill
        self._has_prefilled = False
        # sequences of the newest pass, each with its number of tokens; empty on an idle rank
        self.last_pass: list[tuple[Sequence, int]] = []

    def is_busy(self) -> bool:
        """Return whether this rank, or one that shares experts with it, has work. A collective call."""
        return self._runner.any_rank_has_work(bool(self._waiting or self._prefilling or self._running))

    @property
    def num_waiting(self) -> int:
        """Sequences that are not in the running batch yet."""
        return len(self._waiting) + len(self._prefilling)

    @property
    def num_running(self) -> int:
        """Sequences in the running batch."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Add a sequence after those that wait."""
        self._waiting.append(sequence)

    @torch.no_grad()
    def cancel(self, cancelled: Set[Sequence]) -> None:
        """Remove sequences, wherever they are; those that are finished already are ignored."""
        self._waiting = deque(s for s in self._waiting if s not in cancelled)
        kept = [row for row, s in enumerate(self._prefilling) if s not in cancelled]
        if len(kept) < len(self._prefilling):
            self._prefilling = [self._prefilling[row] for row in kept]
            self._prefilling_state = self._prefilling_state.select(kept)
        self._keep_running([row for row, s in enumerate(self._running) if s not in cancelled])

    @torch.no_grad()
    def step(self) -> list[TokenChunk]:
        """Run one pass of the trunk, and the MTP passes for the next drafts.

        Returns: the new tokens.
        """
        chunks: list[TokenChunk] = []
        self.last_pass = []
        has_capacity = len(self._running) < self._max_sequences
        must_decode = self._alternates and self._has_prefilled and bool(self._running)
        self._has_prefilled = False
        if not must_decode and (self._prefilling or (self._waiting and has_capacity)):
            chunks = self._prefill()
            self._has_prefilled = True
        elif self._running:
            chunks = self._decode()
        self._runner.run_dummy_passes()
        return chunks

    def _prefill(self) -> list[TokenChunk]:
        """Prefill the next prompt tokens; sequences whose prompt is complete get their first token and are admitted."""
        sequences, counts = self._schedule_prefill()
        self.last_pass = list(zip(sequences, counts))
        state = self._prefilling_state.join(self._runner.empty_state(len(sequences) - len(self._prefilling)))
        span = self._runner.span(state.lengths, counts)
        tokens = [token for s, n in zip(sequences, counts) for token in s.next_prompt_tokens(n)]
        hidden_SX = self._runner.run_trunk(self._runner.token_tensor(tokens), span, state)
        state.commit(counts)
        complete = [row for row, s in enumerate(sequences) if s.is_prefilled]
        last = torch.tensor(counts).cumsum(0) - 1
        chunks = self._sample_first_tokens([sequences[row] for row in complete], hidden_SX, last[complete])
        if self._depth:
            shifted = [token for s, n in zip(sequences, counts) for token in s.following_tokens(n)]
            hidden_SX = self._runner.run_mtp_layer(hidden_SX, self._runner.token_tensor(shifted), span, state)
        admitted = [row for row in complete if not sequences[row].is_finished]
        self._admit([sequences[row] for row in admitted], state.select(admitted), hidden_SX, last[admitted])
        partial = [row for row, s in enumerate(sequences) if not s.is_prefilled]
        self._prefilling, self._prefilling_state = [sequences[row] for row in partial], state.select(partial)
        return chunks

    def _schedule_prefill(self) -> tuple[list[Sequence], list[int]]:
        """Choose prompts to prefill: the partly prefilled one, then waiting ones, within the token and batch limits.

        Returns: sequences, and how many prompt tokens of each.
        """
        sequences: list[Sequence] = []
        counts: list[int] = []
        budget, queue = self._prefill_tokens, [*self._prefilling, *self._waiting]
        max_admitted = min(len(queue), self._max_sequences - len(self._running))
        while len(sequences) < max_admitted and budget:
            sequence = queue[len(sequences)]
            counts.append(min(budget, len(sequence.prompt) - sequence.num_prefilled))
            sequences.append(sequence)
            budget -= counts[-1]
        for _ in range(len(sequences) - len(self._prefilling)):
            self._waiting.popleft()
        return sequences, counts

    def _sample_first_tokens(self, sequences: list[Sequence], hidden_SX: Tensor, last: Tensor) -> list[TokenChunk]:
        if not sequences:
            return []
        num_random = 0 if self._decode_step.sampling.is_greedy else 1
        hidden_NX, uniform_NU = self._select_rows(hidden_SX, last), self._random_numbers(sequences, num_random)
        self._adapt_sampling(sequences)
        parameters_NP = self._decode_step.parameters([s.sampling for s in sequences])
        packed = self._decode_step.sample_first_tokens(hidden_NX, uniform_NU, parameters_NP)
        return self._append_tokens(sequences, packed)[0]

    def _admit(self, sequences: list[Sequence], state: DecodeState, hidden_SX: Tensor, last: Tensor) -> None:
        """Add prefilled sequences to the running batch."""
        if not sequences:
            return
        num_random = 0 if self._decode_step.sampling.is_greedy else self._depth
        last_token_N = self._runner.token_tensor([s.last_token for s in sequences])
        hidden_NX, uniform_ND = self._select_rows(hidden_SX, last), self._random_numbers(sequences, num_random)
        parameters_NP = self._decode_step.parameters([s.sampling for s in sequences])
        admitted = self._decode_step.start(state, last_token_N, hidden_NX, uniform_ND, parameters_NP)
        self._running += sequences
        self._batch = self._batch.join(admitted)

    def _decode(self) -> list[TokenChunk]:
        """Run a decode step of all running sequences."""
        self.last_pass = [(sequence, self._depth + 1) for sequence in self._running]
        self._adapt_sampling(self._running)
        uniform_NU = self._random_numbers(self._running, self._decode_step.num_random)
        self._batch, packed = self.graphs.run(self._batch, uniform_NU, self._max_final_length())
        chunks, num_accepted = self._append_tokens(self._running, packed)
        for sequence, count in zip(self._running, num_accepted):
            sequence.record_verification(count)
        self._batch.state.advance([count + 1 for count in num_accepted])
        self._retire_finished()
        return chunks

    def _retire_finished(self) -> None:
        """Remove finished sequences from the running batch."""
        self._keep_running([row for row, s in enumerate(self._running) if not s.is_finished])

    def _keep_running(self, rows: list[int]) -> None:
        """Keep these rows of the running batch."""
        self._running = [self._running[row] for row in rows]
        self._batch = self._batch.select(rows)

    def _adapt_sampling(self, sequences: list[Sequence]) -> None:
        """With mixed sampling, prepare the next verification for what these sequences need."""
        sampling = self._decode_step.sampling
        if isinstance(sampling, MixedSampling):
            self._decode_step.sampling = sampling.for_sequences([s.sampling for s in sequences])

    def _max_final_length(self) -> int:
        """Return the largest length that a running sequence can reach."""
        return max(len(s.prompt) + s.sampling.max_new_tokens for s in self._running)

    def _append_tokens(self, sequences: list[Sequence], packed: Tensor) -> tuple[list[TokenChunk], list[int]]:
        """Append the step's tokens to the sequences; this synchronizes with the device.

        Returns: token chunks, and the number of accepted drafts of each sequence.
        """
        chunks, accepted = [], []
        tokens = (packed.shape[1] - 1) // 3
        for sequence, (num_accepted, *values) in zip(sequences, packed.tolist()):
            accepted.append(int(num_accepted))
            ids, logprobs, sampled_logprobs = (values[i * tokens :][: accepted[-1] + 1] for i in range(3))
            chunks.append(sequence.append([int(token) for token in ids], logprobs, sampled_logprobs))
        self._record_top_logprobs(sequences, chunks)
        return chunks, accepted

    def _record_top_logprobs(self, sequences: list[Sequence], chunks: list[TokenChunk]) -> None:
        """Record the most probable tokens at the positions of the new ones, for sequences that ask for them."""
        if self._decode_step.top_logprobs is None:
            return
        ids_NTK, logprobs_NTK = (values.tolist() for values in self._decode_step.top_logprobs)
        for sequence, chunk, ids_TK, logprobs_TK in zip(sequences, chunks, ids_NTK, logprobs_NTK):
            count = sequence.sampling.num_top_logprobs
            for ids, logprobs in zip(ids_TK[: len(chunk.tokens)], logprobs_TK):
                sequence.top_logprobs.append(dict(zip(ids[:count], logprobs)))

    def _random_numbers(self, sequences: list[Sequence], count: int) -> Tensor:
        """Return the next random numbers of each sequence [N,count]."""
        return self._runner.uniform_tensor([sequence.next_random_numbers(count) for sequence in sequences])

    def _select_rows(self, hidden_SX: Tensor, rows: Tensor) -> Tensor:
        return hidden_SX.index_select(0, rows.to(hidden_SX.device, non_blocking=True))
