"""Decode step: one trunk pass for every running sequence, verification of its draft tokens, sampling, new drafts.

A step gets the last token and the draft tokens of each sequence. It verifies the drafts, samples the token after the
last accepted one, commits the accepted tokens and rolls back the others, and drafts again with the MTP layer.
Everything runs on the device, which alone has the sequences' lengths meanwhile; the only host synchronization is the
caller's read of `packed`. All results are written in place, so that a step can be captured as a CUDA graph
(decode_graph.py); the same code runs without one.

Reference: speculative decoding, Leviathan et al. (arXiv 2211.17192).

Shapes: N sequences, D drafts of each, T = D + 1, S = N·T, X hidden size, V vocabulary, U random numbers, P sampling
parameters, K alternatives.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.config.execution_plan import DecodePlan
from megatron_q3n.inference import mixed_sampling
from megatron_q3n.inference.mixed_sampling import MixedSampling
from megatron_q3n.inference.model_runner import ModelRunner
from megatron_q3n.inference.sampling import Sampling, distribution, greedy_tokens, rejection_sample, sample_tokens
from megatron_q3n.kernels.decode.argmax import VerifiedDrafts, greedy_token, verify_greedy
from megatron_q3n.model.decode.forward import compute_raw_logits
from megatron_q3n.model.decode.span import Span
from megatron_q3n.model.decode.state import DecodeState


@dataclass
class RunningBatch:
    """Sequences between two decode steps, on the device.

    Shapes: lengths and last tokens [N], drafts [N,D], the probabilities that they were sampled from [N,D,V] fp32
        (V = 0 when greedy), and with mixed sampling each sequence's parameters [N,P] (P = 0 otherwise).
    """

    state: DecodeState
    length_N: Tensor
    last_token_N: Tensor
    drafts_ND: Tensor
    draft_probs_NDV: Tensor
    parameters_NP: Tensor

    def join(self, other: "RunningBatch") -> "RunningBatch":
        """Return these sequences followed by the other's."""
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return RunningBatch(self.state.join(other.state), *(torch.cat(pair) for pair in pairs))

    def select(self, rows: list[int]) -> "RunningBatch":
        """Return some sequences, in this order; this same object if it is all of them."""
        if rows == list(range(len(self.state.lengths))):
            return self
        index = torch.tensor(rows, dtype=torch.long).to(self.last_token_N.device, non_blocking=True)
        return RunningBatch(self.state.select(rows), *(x.index_select(0, index) for x in self.tensors()))

    def clone_tensors(self) -> None:
        """Replace the tensors, which may be views of a CUDA graph's buffers, by copies."""
        self.state.clone_tensors()
        copies = (x.clone() for x in self.tensors())
        self.length_N, self.last_token_N, self.drafts_ND, self.draft_probs_NDV, self.parameters_NP = copies

    def tensors(self) -> list[Tensor]:
        """Return the tensors apart from the decode state."""
        return [self.length_N, self.last_token_N, self.drafts_ND, self.draft_probs_NDV, self.parameters_NP]


class DecodeStep:
    """Decode step of one model with a fixed draft depth, and with fixed or mixed sampling parameters."""

    def __init__(self, runner: ModelRunner, sampling: Sampling | MixedSampling, depth: int) -> None:
        self.runner, self.sampling, self.depth = runner, sampling, depth
        # with mixed sampling: the most probable tokens of the last verification, and their log-probs, [N,T,K] each
        self.top_logprobs: tuple[Tensor, Tensor] | None = None
        self._plan: DecodePlan = runner.model.config.plan.decode
        # greedy drafts need no probabilities
        self._num_draft_probs = 0 if sampling.is_greedy else runner.model.vocab_size

    @property
    def tokens_per_sequence(self) -> int:
        """Tokens of each sequence in the step's trunk pass."""
        return self.depth + 1

    @property
    def num_random(self) -> int:
        """Random numbers that a step consumes for each sequence."""
        return 0 if self.sampling.is_greedy else self.tokens_per_sequence + self.depth

    def max_end(self, longest: int) -> int:
        """Return the end of the positions that a step may write, for sequences of at most `longest` tokens."""
        return longest + self.tokens_per_sequence + max(0, self.depth - 1)

    def empty_batch(self, num_sequences: int = 0) -> RunningBatch:
        """Return buffers for this many sequences, filled with zeros."""
        zeros_N = torch.zeros(num_sequences, dtype=torch.long, device=self.runner.device)
        state = self.runner.empty_state(num_sequences)
        state.stack_states()
        return self._without_drafts(state, zeros_N, zeros_N.clone(), self.parameters([Sampling(1)] * num_sequences))

    def parameters(self, samplings: list[Sampling]) -> Tensor:
        """Return the parameters of sequences with mixed sampling [N,P], P = 0 where they are fixed."""
        device = self.runner.device
        if not isinstance(self.sampling, MixedSampling):
            return torch.empty(len(samplings), 0, dtype=torch.float64, device=device)
        return mixed_sampling.parameters(samplings, self.runner.model.vocab_size).to(device, non_blocking=True)

    def _without_drafts(
        self, state: DecodeState, length_N: Tensor, last_token_N: Tensor, parameters_NP: Tensor
    ) -> RunningBatch:
        drafts_ND = last_token_N.new_zeros(len(last_token_N), self.depth)
        draft_probs = torch.zeros(*drafts_ND.shape, self._num_draft_probs, device=last_token_N.device)
        return RunningBatch(state, length_N, last_token_N, drafts_ND, draft_probs, parameters_NP)

    def sample_first_tokens(self, hidden_NX: Tensor, uniform_NU: Tensor, parameters_NP: Tensor) -> Tensor:
        """Sample each sequence's first token after its prompt. Returns: packed, as `run`."""
        logits_N1V = self._compute_logits(hidden_NX).unsqueeze(1)
        no_drafts_N0 = torch.zeros(len(hidden_NX), 0, dtype=torch.long, device=hidden_NX.device)
        no_probs = torch.zeros(*no_drafts_N0.shape, self._num_draft_probs, device=hidden_NX.device)
        return self._verify_and_sample(logits_N1V, no_drafts_N0, no_probs, uniform_NU, parameters_NP).packed

    def start(
        self, state: DecodeState, last_token_N: Tensor, hidden_NX: Tensor, uniform_ND: Tensor, parameters_NP: Tensor
    ) -> RunningBatch:
        """Build a batch from prefilled sequences, with drafts from the MTP layer's output at their last position."""
        lengths_N = self.runner.token_tensor(state.lengths)
        batch = self._without_drafts(state, lengths_N, last_token_N, parameters_NP)
        if self.depth:
            logits_NV = self._compute_logits(hidden_NX)
            self._draft(batch, hidden_NX, logits_NV, uniform_ND, self.max_end(max(state.lengths)))
        return batch

    def run(self, batch: RunningBatch, uniform_NU: Tensor, max_end: int) -> Tensor:
        """Extend every sequence in place by its accepted drafts and one sampled token.

        Shapes: uniform [N,U] in [0, 1), fp64, U = `num_random`: for the verification, then for the next drafts.
        Returns: packed [N, 1 + 3·T] fp64: number of accepted drafts; tokens (valid up to the sampled one); their log
            probabilities under the model; and under the distribution they were sampled from (0 when greedy).
        """
        num_rows, tokens, state = len(batch.last_token_N), self.tokens_per_sequence, batch.state
        span = Span.from_device_starts(batch.length_N, tokens, max_end)
        tokens_NT = torch.cat([batch.last_token_N[:, None], batch.drafts_ND], 1)
        hidden_SX = self.runner.run_trunk(
            tokens_NT.flatten(), span, state, state_per_token=True, apply_final_norm=False
        )
        hidden_SX, logits_SV = self._norm_and_logits(hidden_SX, mtp=False)
        logits_NTV = logits_SV.view(num_rows, tokens, -1)
        verified = self._verify_and_sample(
            logits_NTV, batch.drafts_ND, batch.draft_probs_NDV, uniform_NU[:, :tokens], batch.parameters_NP
        )
        tokens_S = verified.chosen_NT.flatten()
        state.commit_states(verified.row_N)
        if self.depth:
            # before the lengths change, because the span's positions are views of them
            hidden_SX = self.runner.run_mtp_layer(hidden_SX, tokens_S, span, state, apply_final_norm=False)
        batch.length_N.add_(verified.num_new_tokens_N)
        torch.index_select(tokens_S, 0, verified.row_N, out=batch.last_token_N)
        if self.depth:
            newest = self._norm_and_logits(hidden_SX.index_select(0, verified.row_N), mtp=True)
            self._draft(batch, *newest, uniform_NU[:, tokens:], max_end)
        return verified.packed

    def _norm_and_logits(self, hidden_SX: Tensor, *, mtp: bool) -> tuple[Tensor, Tensor]:
        """Return normalized hidden states, and logits in the dtype that the sampling needs."""
        hidden_SX, logits_SV = self.runner.norm_and_logits(hidden_SX, mtp=mtp)
        return hidden_SX, logits_SV if self.sampling.is_greedy else logits_SV.float()

    def _compute_logits(self, hidden_SX: Tensor) -> Tensor:
        """Return logits [S,V]: fp32, or for greedy decoding in the model's dtype, which has the same argmax."""
        if self.sampling.is_greedy:
            return compute_raw_logits(self.runner.model, hidden_SX)
        return self.runner.compute_logits(hidden_SX)

    def _verify_and_sample(
        self, logits_NTV: Tensor, drafts_ND: Tensor, draft_probs_NDV: Tensor, uniform_NT: Tensor, parameters_NP: Tensor
    ) -> VerifiedDrafts:
        """Verify the drafts, and sample the token after the last accepted one."""
        if self.sampling.is_greedy:
            fused = bool(self._plan.argmax)
            verified = verify_greedy(logits_NTV, drafts_ND, self.sampling.vocab_size, fused=fused)
            if self.runner.is_alone:
                return verified
            return _unpack(self.runner.broadcast_from_first_tp_rank(verified.packed))
        target_NTV = self._distribution(logits_NTV, parameters_NP)
        num_accepted_N, sampled_N = rejection_sample(target_NTV, draft_probs_NDV, drafts_ND, uniform_NT)
        tokens_NT = F.pad(drafts_ND, (0, 1)).scatter(1, num_accepted_N[:, None], sampled_N[:, None])
        logprobs_NT = _gather_tokens(self._model_logprobs(logits_NTV), tokens_NT)
        sampled_logprobs_NT = _gather_tokens(target_NTV, tokens_NT).log()
        # one tensor, so that there is one host synchronization
        parts = num_accepted_N[:, None], tokens_NT, logprobs_NT, sampled_logprobs_NT
        return _unpack(self.runner.broadcast_from_first_tp_rank(torch.cat([part.double() for part in parts], 1)))

    def _distribution(self, logits_NTV: Tensor, parameters_NP: Tensor) -> Tensor:
        """Return the probabilities that tokens are sampled from, fp32 [N,T,V]."""
        if isinstance(self.sampling, MixedSampling):
            return self.sampling.distribution(logits_NTV, parameters_NP)
        return distribution(logits_NTV, self.sampling)

    def _model_logprobs(self, logits_NTV: Tensor) -> Tensor:
        """Return the model's log probabilities [N,T,V]; with mixed sampling, record the most probable tokens."""
        if not isinstance(self.sampling, MixedSampling):
            return logits_NTV.log_softmax(-1)
        logprobs_NTV = self.sampling.logprobs(logits_NTV)
        num_top = self.sampling.num_top_logprobs
        self.top_logprobs = (*logprobs_NTV.topk(num_top, dim=-1)[::-1],) if num_top else None
        return logprobs_NTV

    def _draft(
        self, batch: RunningBatch, hidden_NX: Tensor, logits_NV: Tensor, uniform_ND: Tensor, max_end: int
    ) -> None:
        """Write new drafts, from the MTP layer's output at each sequence's last position, by repeating the layer."""
        for depth in range(self.depth):
            draft_N = batch.drafts_ND[:, depth]
            if self.sampling.is_greedy and self.runner.is_alone:
                fused = bool(self._plan.draft_argmax)
                greedy_token(logits_NV, draft_N, self.sampling.vocab_size, fused=fused)
            else:
                sampled_N = self._sample_draft(batch, logits_NV, uniform_ND, depth)
                draft_N.copy_(self.runner.broadcast_from_first_tp_rank(sampled_N))
            if depth + 1 < self.depth:
                span = Span.from_device_starts(batch.length_N + depth, 1, max_end)
                hidden_NX = self.runner.run_mtp_layer(hidden_NX, draft_N, span, batch.state, apply_final_norm=False)
                hidden_NX, logits_NV = self._norm_and_logits(hidden_NX, mtp=True)

    def _sample_draft(self, batch: RunningBatch, logits_NV: Tensor, uniform_ND: Tensor, depth: int) -> Tensor:
        """Sample a draft of each sequence, and store its distribution for the verification."""
        if self.sampling.is_greedy:
            return greedy_tokens(logits_NV, self.sampling.vocab_size)
        probs_NV = self._distribution(logits_NV[:, None], batch.parameters_NP)[:, 0]
        batch.draft_probs_NDV[:, depth] = probs_NV
        return sample_tokens(probs_NV, uniform_ND[:, depth])


def _unpack(packed: Tensor) -> VerifiedDrafts:
    """Rebuild the result of a verification from its packed numbers, which are the first tensor-parallel rank's."""
    num_rows, tokens = len(packed), packed.shape[1] // 3
    num_accepted_N, tokens_NT = packed[:, 0].long(), packed[:, 1 : 1 + tokens].long()
    row_N = torch.arange(num_rows, device=packed.device) * tokens + num_accepted_N
    return VerifiedDrafts(packed, tokens_NT, num_accepted_N + 1, row_N)


def _gather_tokens(values_NTV: Tensor, tokens_NT: Tensor) -> Tensor:
    return values_NTV.gather(-1, tokens_NT[..., None]).squeeze(-1)
