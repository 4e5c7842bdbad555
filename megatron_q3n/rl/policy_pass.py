"""The trainer's passes over samples: their probabilities as they are, and the policy loss.

Both run through megatron-core's schedule, so they follow whatever layout the model has. The MTP layers sit
out (the policy gradient must not come through them, and the loss of a prediction nobody drew is no part of
it); the balance loss is off by configuration (recipes/stage/rl.yaml).

Shapes: T tokens of a row, L layers with experts, K experts per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_q3n.config.rl import RlConfig
from megatron_q3n.model.moe.router import GlobalBatchRouter
from megatron_q3n.model.moe.routing_replay import RouteTape
from megatron_q3n.rl.policy_batch import PolicyBatch
from megatron_q3n.rl.policy_loss import clipped_surrogate, kl_to_reference, log_ratios, truncated_importance
from megatron_q3n.rl.vocab_parallel_logprobs import log_probabilities
from megatron_q3n.training.loss import packed_params

SUMS = ("tokens", "ratio", "clipped", "kl_to_old", "kl_to_reference", "entropy", "importance", "capped")


@dataclass
class PolicyPass:
    """A forward pass for `training.step`. With `learns` the policy loss, else nothing but probabilities.

    `sums` [len(SUMS)] gathers telemetry over the counted tokens of this rank's rows.
    """

    settings: RlConfig
    vocab_size: int
    learns: bool
    sums: Tensor = field(
        default_factory=lambda: torch.zeros(len(SUMS), dtype=torch.float64, device=torch.cuda.current_device())
    )

    def __call__(self, batches: Iterator[PolicyBatch], model: Any) -> tuple[Tensor, Any]:
        """Run one row; see `training.step.ForwardStep`."""
        batch = next(batches).to(torch.cuda.current_device())
        bare = getattr(model, "module", model)
        give_routes(bare, batch.routes_TLK)
        with without_mtp(bare):
            output = model(batch.tokens_BT, batch.position_ids_BT, None, packed_seq_params=packed_params(batch))
        return output, partial(self._loss, batch, bare.pg_collection.tp)

    def _loss(self, batch: PolicyBatch, group: Any, logits_BTV: Tensor) -> tuple[Tensor, Tensor, dict]:
        logprobs_BT, entropy_BT = log_probabilities(
            logits_BTV,
            batch.labels_BT,
            group,
            temperature=self.settings.rollout.temperature,
            vocab_size=self.vocab_size,
        )
        weight_T = batch.loss_mask_BT[0]
        if self.learns:
            loss_T = self._token_losses(batch, logprobs_BT[0], entropy_BT[0])
            total = (torch.where(weight_T > 0, loss_T, 0.0) * weight_T).sum()
        else:
            total = logprobs_BT.new_zeros(())
        report = {"lm": torch.stack([total.detach(), weight_T.sum()])}
        if not self.learns:
            report |= {"logprobs": logprobs_BT[0].detach(), "entropy": entropy_BT[0].detach()}
        return total, weight_T.sum().to(torch.int), report

    def _token_losses(self, batch: PolicyBatch, logprobs_T: Tensor, entropy_T: Tensor) -> Tensor:
        """Return each token's loss, and add up what telemetry wants."""
        assert batch.sample_BT is not None
        assert batch.advantage_BT is not None
        assert batch.rollout_BT is not None
        assert batch.reference_BT is not None
        rl, rules = self.settings, self.settings.rules
        sample_T = batch.sample_BT[0]
        # prompts and padding: their probabilities may be so small that a ratio overflows
        logprobs_T = torch.where(sample_T >= 0, logprobs_T, 0.0)
        # nobody was asked before the rollout's only update: these weights are still the old ones
        old_T = logprobs_T.detach() if batch.old_BT is None else batch.old_BT[0]
        ratio_T = log_ratios(logprobs_T, old_T, sample_T, rules.ratio)
        losses = clipped_surrogate(ratio_T, batch.advantage_BT[0], rules.clip_low, rules.clip_high)
        importance_T = truncated_importance(old_T, batch.rollout_BT[0], rl.importance_cap)
        loss_T = importance_T * losses.loss_T - rl.entropy_coefficient * entropy_T
        to_reference_T = torch.zeros_like(logprobs_T)
        if rl.kl_coefficient:
            to_reference_T = kl_to_reference(logprobs_T, batch.reference_BT[0])
            loss_T = loss_T + rl.kl_coefficient * to_reference_T
        capped_T = importance_T >= (rl.importance_cap or torch.inf)
        columns = (
            torch.ones_like(ratio_T),
            losses.ratio_T,
            losses.is_clipped_T,
            kl_to_reference(logprobs_T, old_T),
            to_reference_T,
            entropy_T,
            importance_T,
            capped_T,
        )
        seen = torch.stack([column.detach().double()[sample_T >= 0].sum() for column in columns])
        self.sums += seen
        return loss_T


@contextmanager
def without_mtp(model: Any) -> Iterator[None]:
    """Leave the multi-token prediction layers out of a forward pass."""
    had_mtp, model.mtp_process = model.mtp_process, False
    try:
        yield
    finally:
        model.mtp_process = had_mtp


def trunk_routers(model: Any) -> dict[int, GlobalBatchRouter]:
    """Return a model chunk's routers by the number of their layer as the paper counts, from 0; not MTP's."""
    return {
        module.layer_number // 2 - 1: module
        for module in model.modules()
        if isinstance(module, GlobalBatchRouter) and not module.is_mtp_layer
    }


@contextmanager
def taped(models: list[Any], *, recording: bool) -> Iterator[dict[int, RouteTape]]:
    """Put a tape on every router of the trunk, by layer, and take it off afterwards."""
    routers = {n: router for model in models for n, router in trunk_routers(model).items()}
    tapes = {number: RouteTape() for number in routers}
    for number, router in routers.items():
        router.tape = tapes[number]
        tapes[number].is_recording = recording
    try:
        yield tapes
    finally:
        for router in routers.values():
            router.tape = None


def give_routes(model: Any, routes_TLK: Tensor | None) -> None:
    """Hand a row's routes to the tapes on the model's routers; a sequence-parallel rank's own tokens only."""
    group = model.pg_collection.tp
    for number, router in trunk_routers(model).items():
        if router.tape is None:
            assert routes_TLK is None, "routes to replay, and no tape"
            continue
        given = None if routes_TLK is None else routes_TLK[:, number]
        if given is not None and model.config.sequence_parallel:
            given = given.chunk(group.size())[group.rank()]
        router.tape.given_TK = given
