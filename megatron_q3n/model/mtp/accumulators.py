"""MTPLosses: schedule, loss weights and accumulated statistics of the multi-token prediction depths of one model.

One object per model, stored in `PassState.mtp`; the training step sets it and reads the totals.
"""

import torch
from torch import Tensor

from megatron_q3n.config.mtp import MtpConfig


class MTPLosses:
    """Schedule, loss weights and accumulated statistics of the MTP depths of one model.

    `ratios` [depths] are N / M_k of the global batch, or None to use each micro-batch's own; `totals` [depths, 2]
    accumulates (summed loss, tokens) of this rank; `own_draft_probability` [1] is the scheduled-sampling probability
    that an anchor is fed its own drafts, `step` [1] the training step. These tensors keep their addresses, because a
    training step captured as a CUDA graph reads and writes them. `acceptance_counts` [acceptance depth, 3] accumulates
    (verified drafts, greedily accepted ones, Σ min(p, q)) of validation.
    """

    def __init__(self, depths: int, settings: MtpConfig | None = None, total_steps: int = 1) -> None:
        device = torch.cuda.current_device()
        self.settings, self._total_steps = settings or MtpConfig(), total_steps
        weights = self.settings.depth_weights or [1.0] * depths
        self._weights = [weight / sum(weights) for weight in weights]
        self.scaling_factor = 1.0
        self.ratios: Tensor | None = None
        self.totals = torch.zeros(depths, 2, dtype=torch.float64, device=device)
        self.own_draft_probability = torch.full((1,), self.settings.scheduled_sampling_start, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        depth = self.settings.acceptance_depth
        self.acceptance_counts = torch.zeros(depth, 3, dtype=torch.float64, device=device)

    @property
    def measures_acceptance(self) -> bool:
        """Whether validation drafts and measures acceptance."""
        return self.settings.acceptance_depth > 0

    @property
    def is_teacher_forcing_only(self) -> bool:
        """Whether training feeds the text's tokens only, at every step."""
        return self.settings.scheduled_sampling_start == self.settings.scheduled_sampling_end == 0

    def set_ratios(self, ratios: Tensor) -> None:
        """Set N / M_k of each depth for the next step."""
        if self.ratios is None:
            self.ratios = torch.empty(len(ratios), device=self.totals.device)
        self.ratios.copy_(ratios)

    def set_step(self, step: int) -> None:
        """Set the training step and its scheduled-sampling probability, linear from start to end."""
        progress = step / max(1, self._total_steps - 1)
        start, end = self.settings.scheduled_sampling_start, self.settings.scheduled_sampling_end
        self.own_draft_probability.fill_(start + (end - start) * min(1.0, progress))
        self.step.fill_(step)

    def scale(self, depth: int, num_tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the weight of a depth's summed loss relative to the language-model loss."""
        ratio = num_tokens / mask.sum().clamp(min=1)
        if self.ratios is not None:
            ratio = self.ratios[depth]
        return self._weights[depth] * self.scaling_factor * ratio

    @torch.no_grad()
    def add(self, depth: int, losses: Tensor, mask: Tensor) -> None:
        """Accumulate a micro-batch's losses."""
        self.totals[depth] += torch.stack([losses.sum(), mask.sum()]).double()

    def add_acceptance(self, depth: int, verified: Tensor, agrees: Tensor, overlaps: Tensor) -> None:
        """Accumulate a micro-batch's drafts."""
        counts = [verified.sum(), (verified * agrees).sum(), (verified * overlaps).sum()]
        self.acceptance_counts[depth] += torch.stack(counts).double()

    def pop_acceptance(self) -> Tensor:
        """Return the acceptance counts and reset them."""
        counts = self.acceptance_counts.clone()
        self.acceptance_counts.zero_()
        return counts

    def pop_totals(self) -> Tensor:
        """Return the loss totals and reset them."""
        totals = self.totals.clone()
        self.totals.zero_()
        return totals
