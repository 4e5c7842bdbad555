"""Held-out loss and draft acceptance, summed by position bucket.

Sequences have equal length and come in batches. Every replica must pass the same number of batches, because replicas
may share experts. Sums cover the sequences of this rank; the caller adds them over replicas.

Shapes: N sequences, T + 1 tokens each, P position buckets, D draft depths.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_q3n.evaluation.draft_acceptance import verify_drafts
from megatron_q3n.model.decode.protocols import DecodeModel

# summed over draft positions, for each depth
VERIFICATION_FIELDS = ("greedy_reached", "greedy_accepted", "sampled_reached", "sampled_accepted")


@dataclass(frozen=True)
class EvaluationSums:
    """Sums over sequences, fp64 on the CPU.

    Shapes: text [P,3] of (nats, tokens, bytes); drafts [P,D,5] of (positions, then VERIFICATION_FIELDS).
    """

    text: Tensor
    drafts: Tensor


@dataclass(frozen=True)
class MeasurementSettings:
    """Settings of the measurement. `draft_depth` 0 disables drafts; token ids from `vocab_size` on are padding."""

    token_bytes: Tensor
    buckets: int
    draft_depth: int
    draft_stride: int
    seed: int
    vocab_size: int


def measure_sequences(
    model: DecodeModel, batches: list[tuple[Tensor, Tensor]], settings: MeasurementSettings
) -> EvaluationSums:
    """Run batches of (tokens [N,T+1], mask [N]) and return the sums over sequences whose mask is set.

    Raises: UserError if `draft_depth` is set and the model cannot draft.
    """
    sums = EvaluationSums(
        torch.zeros(settings.buckets, 3, dtype=torch.float64),
        torch.zeros(settings.buckets, settings.draft_depth, 1 + len(VERIFICATION_FIELDS), dtype=torch.float64),
    )
    for batch_index, (tokens_NT, mask_N) in enumerate(batches):
        _add_text(model, tokens_NT, mask_N.double(), settings, sums.text)
        if settings.draft_depth:
            _add_drafts(model, tokens_NT, mask_N.double(), settings, sums.drafts, batch_index)
    return sums


@torch.no_grad()
def token_losses(model: DecodeModel, tokens_NT: Tensor) -> Tensor:
    """Return the loss of each token but the first, in nats, fp32 [N,T], from the training forward pass."""
    device = next(model.parameters()).device
    tokens = tokens_NT.to(device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1], device=device).expand_as(inputs)
    model.eval()
    return model(inputs, positions, None, labels=labels).float()


def _add_text(
    model: DecodeModel, tokens_NT: Tensor, mask_N: Tensor, settings: MeasurementSettings, text: Tensor
) -> None:
    losses_NT = token_losses(model, tokens_NT).double().cpu()
    num_bytes_NT = settings.token_bytes[tokens_NT[:, 1:]].double()
    for column, values_NT in enumerate((losses_NT, torch.ones_like(losses_NT), num_bytes_NT)):
        counted_NT = values_NT * mask_N[:, None]
        text[:, column] += counted_NT.sum(0).view(settings.buckets, -1).sum(1)


def _add_drafts(
    model: DecodeModel,
    tokens_NT: Tensor,
    mask_N: Tensor,
    settings: MeasurementSettings,
    drafts: Tensor,
    batch_index: int,
) -> None:
    bucket_tokens = (tokens_NT.shape[1] - 1) // settings.buckets
    tokens = tokens_NT.to(next(model.parameters()).device)
    verifications = verify_drafts(
        model, tokens, settings.draft_depth, settings.draft_stride, settings.seed + batch_index, settings.vocab_size
    )
    for verification in verifications:
        bucket = drafts[(verification.position - 1) // bucket_tokens]
        bucket[:, 0] += mask_N.sum()
        for column, name in enumerate(VERIFICATION_FIELDS, start=1):
            bucket[:, column] += (getattr(verification, name).cpu() * mask_N[:, None]).sum(0)
