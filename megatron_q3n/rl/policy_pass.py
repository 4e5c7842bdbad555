"""Policy forward pass: log-probs of packed samples, and the policy loss on them.

Both run through megatron-core's schedule, so they follow any parallel layout of the model. The MTP layers are skipped:
the policy gradient must not flow through them, and the loss of tokens that were not sampled is not part of it. The load
balancing loss is off by configuration (recipes/stage/rl.yaml).

Shapes: T tokens of a row, V this rank's vocabulary, L layers with experts, K experts per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_q3n.config.rl import RlConfig
from megatron_q3n.model.decode.protocols import DecodeModel
from megatron_q3n.model.moe.router import GlobalBatchRouter
from megatron_q3n.model.moe.routing_replay import RoutingReplay
from megatron_q3n.model.packed_params import PackedParams
from megatron_q3n.rl.policy_batch import PolicyBatch
from megatron_q3n.rl.policy_loss import clipped_surrogate, kl_to_reference, log_ratios, truncated_importance
from megatron_q3n.rl.vocab_parallel_logprobs import logprobs_and_entropy

# what `PolicyPass.sums` holds, and the names of the metrics under rl/
SUMS = (
    "tokens",
    "ratio",
    "clip_fraction",
    "kl_to_old",
    "kl_to_reference",
    "entropy",
    "importance_weight",
    "importance_clip_fraction",
)


@dataclass
class PolicyPass:
    """A forward pass for `training.step`: with `with_loss` the policy loss, otherwise log-probs and entropy only.

    `sums` [len(SUMS)] accumulates metrics over the response tokens of this rank's rows.
    """

    settings: RlConfig
    vocab_size: int
    with_loss: bool
    sums: Tensor = field(
        default_factory=lambda: torch.zeros(len(SUMS), dtype=torch.float64, device=torch.cuda.current_device())
    )

    def __call__(self, batches: Iterator[PolicyBatch], model: DecodeModel) -> tuple[Tensor, Any]:
        """Run one packed row. Returns: logits, and the loss function; see `training.step.ForwardStep`."""
        batch = next(batches).to(torch.cuda.current_device())
        bare = getattr(model, "module", model)
        set_replayed_routes(bare, batch.routes_TLK)
        with without_mtp(bare):
            packed = None if batch.packing is None else PackedParams.of(batch.packing)
            output = model(batch.tokens_BT, batch.position_ids_BT, None, packed_seq_params=packed)
        return output, partial(self._loss, batch, bare.pg_collection.tp)

    def _loss(self, batch: PolicyBatch, group: Any, logits_BTV: Tensor) -> tuple[Tensor, Tensor, dict]:
        logprobs_BT, entropy_BT = logprobs_and_entropy(
            logits_BTV,
            batch.labels_BT,
            group,
            temperature=self.settings.rollout.temperature,
            vocab_size=self.vocab_size,
        )
        weight_T = batch.loss_mask_BT[0]
        if self.with_loss:
            loss_T = self._token_losses(batch, logprobs_BT[0], entropy_BT[0])
            total = (torch.where(weight_T > 0, loss_T, 0.0) * weight_T).sum()
        else:
            total = logprobs_BT.new_zeros(())
        report = {"lm": torch.stack([total.detach(), weight_T.sum()])}
        if not self.with_loss:
            report |= {"logprobs": logprobs_BT[0].detach(), "entropy": entropy_BT[0].detach()}
        return total, weight_T.sum().to(torch.int), report

    def _token_losses(self, batch: PolicyBatch, logprobs_T: Tensor, entropy_T: Tensor) -> Tensor:
        """Return each token's loss [T], and add its metrics to `sums`."""
        assert batch.sample_BT is not None
        assert batch.advantage_BT is not None
        assert batch.rollout_BT is not None
        assert batch.reference_BT is not None
        rl, rules = self.settings, self.settings.rules
        sample_T = batch.sample_BT[0]
        # at prompts and padding a probability may be so small that a ratio overflows
        logprobs_T = torch.where(sample_T >= 0, logprobs_T, 0.0)
        # without old log-probs this is the rollout's only update, whose weights are still the old ones
        old_T = logprobs_T.detach() if batch.old_BT is None else batch.old_BT[0]
        ratio_T = log_ratios(logprobs_T, old_T, sample_T, rules.ratio)
        losses = clipped_surrogate(ratio_T, batch.advantage_BT[0], rules.clip_low, rules.clip_high)
        importance_T = truncated_importance(old_T, batch.rollout_BT[0], rl.importance_cap)
        loss_T = importance_T * losses.loss_T - rl.entropy_coefficient * entropy_T
        to_reference_T = torch.zeros_like(logprobs_T)
        if rl.kl_coefficient:
            to_reference_T = kl_to_reference(logprobs_T, batch.reference_BT[0])
            loss_T = loss_T + rl.kl_coefficient * to_reference_T
        # in the order of SUMS
        columns = (
            torch.ones_like(ratio_T),
            losses.ratio_T,
            losses.is_clipped_T,
            kl_to_reference(logprobs_T, old_T),
            to_reference_T,
            entropy_T,
            importance_T,
            importance_T >= (rl.importance_cap or torch.inf),
        )
        self.sums += torch.stack([column.detach().double()[sample_T >= 0].sum() for column in columns])
        return loss_T


@contextmanager
def without_mtp(model: DecodeModel) -> Iterator[None]:
    """Skip the multi-token prediction (MTP) layers in a forward pass."""
    had_mtp, model.mtp_process = model.mtp_process, False
    try:
        yield
    finally:
        model.mtp_process = had_mtp


def trunk_routers(model: DecodeModel) -> dict[int, GlobalBatchRouter]:
    """Return a model chunk's routers by their transformer layer (from 0), without those of MTP layers."""
    return {
        module.layer_number // 2 - 1: module
        for module in model.modules()
        if isinstance(module, GlobalBatchRouter) and not module.is_mtp_layer
    }


@contextmanager
def attach_routing_replays(models: list[Any], *, recording: bool) -> Iterator[dict[int, RoutingReplay]]:
    """Attach a RoutingReplay to every router except MTP's, by layer, and detach them afterwards."""
    routers = {layer: router for model in models for layer, router in trunk_routers(model).items()}
    replays = {layer: RoutingReplay() for layer in routers}
    for replay in replays.values():
        replay.is_recording = recording
    with models[0].config.pass_state.with_routing({router: replays[layer] for layer, router in routers.items()}):
        yield replays


def set_replayed_routes(model: DecodeModel, routes_TLK: Tensor | None) -> None:
    """Set the routes that the model's routers replay; with sequence parallelism those of this rank's tokens."""
    group, hooks = model.pg_collection.tp, model.config.pass_state.routing
    for layer, router in trunk_routers(model).items():
        replay = hooks.get(router)
        if replay is None:
            assert routes_TLK is None, "routes to replay, but no RoutingReplay is attached"
            continue
        target_TK = None if routes_TLK is None else routes_TLK[:, layer]
        if target_TK is not None and model.config.sequence_parallel:
            target_TK = target_TK.chunk(group.size())[group.rank()]
        replay.target_TK = target_TK
