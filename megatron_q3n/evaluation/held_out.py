"""How well a model predicts given texts, and its own next tokens by drafts: sums by position in the context.

Rows of equal length come in batches, every replica's as many, since replicas may share experts. Sums
are over this rank's rows; whoever calls adds up over replicas.

Shapes: N rows, T + 1 tokens of a row, P stretches of positions, D draft depths.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_q3n.evaluation.draft_acceptance import judge_drafts

# what a place adds for each depth
JUDGED = ("greedy_reached", "greedy_kept", "drawn_reached", "drawn_kept")


@dataclass(frozen=True)
class Sums:
    """Shapes: text [P,3] of (nats, tokens, bytes); drafts [P,D,5] of (places, then JUDGED). fp64, on the CPU."""

    text: Tensor
    drafts: Tensor


@dataclass(frozen=True)
class Measure:
    """What to measure of each row. `draft_depth` 0 drafts nothing; `vocab_size`: ids from there on are padding."""

    token_bytes: Tensor
    buckets: int
    draft_depth: int
    draft_stride: int
    seed: int
    vocab_size: int


def measure_rows(model: Any, batches: list[tuple[Tensor, Tensor]], measure: Measure) -> Sums:
    """Run rows [N,T+1], each with whether it counts [N], and add up.

    Raises: UserError if drafts are asked of a model that cannot draft.
    """
    sums = Sums(
        torch.zeros(measure.buckets, 3, dtype=torch.float64),
        torch.zeros(measure.buckets, measure.draft_depth, 1 + len(JUDGED), dtype=torch.float64),
    )
    for number, (tokens_NT, counts_N) in enumerate(batches):
        _add_text(model, tokens_NT, counts_N.double(), measure, sums.text)
        if measure.draft_depth:
            _add_drafts(model, tokens_NT, counts_N.double(), measure, sums.drafts, number)
    return sums


@torch.no_grad()
def token_losses(model: Any, tokens_NT: Tensor) -> Tensor:
    """Return the loss of each token but the first, in nats, fp32 [N,T], by the training forward pass."""
    device = next(model.parameters()).device
    tokens = tokens_NT.to(device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1], device=device).expand_as(inputs)
    model.eval()
    return model(inputs, positions, None, labels=labels).float()


def _add_text(model: Any, tokens_NT: Tensor, counts_N: Tensor, measure: Measure, text: Tensor) -> None:
    losses_NT = token_losses(model, tokens_NT).double().cpu()
    num_bytes_NT = measure.token_bytes[tokens_NT[:, 1:]].double()
    for column, values_NT in enumerate((losses_NT, torch.ones_like(losses_NT), num_bytes_NT)):
        counted_NT = values_NT * counts_N[:, None]
        text[:, column] += counted_NT.sum(0).view(measure.buckets, -1).sum(1)


def _add_drafts(model: Any, tokens_NT: Tensor, counts_N: Tensor, measure: Measure, drafts: Tensor, number: int) -> None:
    stretch = (tokens_NT.shape[1] - 1) // measure.buckets
    tokens = tokens_NT.to(next(model.parameters()).device)
    judgements = judge_drafts(
        model, tokens, measure.draft_depth, measure.draft_stride, measure.seed + number, measure.vocab_size
    )
    for judgement in judgements:
        bucket = drafts[(judgement.position - 1) // stretch]
        bucket[:, 0] += counts_N.sum()
        for column, name in enumerate(JUDGED, start=1):
            bucket[:, column] += (getattr(judgement, name).cpu() * counts_N[:, None]).sum(0)
