"""Top-k router: rows of equal norm at initialization, balance over the global batch, independent of the layout.

**Initialization.** Every row of the router has the same norm, so that at step 0 no expert is preferred because of the
length of its row (Qwen3-Next's description; σ-MoE, arXiv 2310.10837, section 4).

**Global-batch balance loss** (Demons in the Detail, arXiv 2501.11873): E · Σᵢ fᵢ Pᵢ, where fᵢ is the share of routed
slots and Pᵢ the mean router probability of expert i, both over the global batch, so that experts may specialize within
a sequence or micro-batch; 1.0 is perfect balance. fᵢ has no gradient. With gradient accumulation the true fᵢ is known
only after the last micro-batch, when the gradients of the first ones are computed already. megatron-core uses the
counts so far, which makes the loss depend on how the batch is split. Here fᵢ comes from the *previous* global batch
(for the first one it is uniform, whose gradient is zero). This delays a slow feedback loop by one step. In exchange the
loss is the same for every layout and micro-batch size, and there is one all-reduce per step instead of one per layer
and micro-batch. The reported value uses f and P of the current batch.

**What counts.** All tokens but padding, with or without a loss of their own: M of the global batch. The balance losses
and the z-loss are means over M, whatever the number N of predictions in the language model's loss, so that their weight
relative to a mean over N does not depend on how many tokens a mask leaves. Padding is not a token: it changes neither
load, bias nor gradient, although it is routed.

**Loss-free balancing** (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2), instead of or in addition to
that loss: a bias per expert is added to the logits for the top-k selection only, so no gradient competes with the
language model's. After each global batch it moves by a fixed step, up for experts with less than their share of the
slots and down for those with more. In these papers the scores are sigmoids; here they are logits, so that for softmax
the bias is a factor exp(bias) on each probability.

Shapes: T tokens of a rank, E experts, K chosen experts per token, L MoE layers.
"""

from copy import copy

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, z_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_q3n.kernels.moe.router_linear import router_linear


class GlobalBatchRouter(TopKRouter):
    """megatron-core's TopKRouter with the initialization, the balance loss and the bias described above.

    `PassState.routing` may hold a hook for this router, which records routes or replaces them
    (model/moe/routing_replay.py).
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        normalized_init: bool = True,
        bias_update_rate: float | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        if normalized_init and config.perform_initialization:
            normalize_rows(self.weight, config.init_method_std)
        self.balances_globally = self.get_aux_loss_coeff("global_aux_loss") > 0
        self._register_load_buffers()
        # Applied in `gating`; TopKRouter.forward would draw random logits a second time.
        self.forces_balance = config.moe_router_force_load_balancing
        self._random_logits: dict[torch.Size, Tensor] = {}
        self.config = copy(config)
        self.config.moe_router_force_load_balancing = False
        if is_mtp_layer and config.mtp_use_repeated_layer and config.moe_z_loss_coeff:
            # The layer runs once per depth and its z-loss counts once. megatron-core divides only the logged value,
            # after the gradient (megatron/core/transformer/moe/router.py:686).
            self.config.moe_z_loss_coeff = config.moe_z_loss_coeff / config.mtp_num_layers
        self.bias_update_rate = bias_update_rate
        if bias_update_rate is not None:
            # so far a plain attribute, None
            del self.expert_bias
            self.register_buffer("expert_bias", self._zeros())
            self.router_replay = BiasedTopK(self)
            # the fused top-k does not call `router_replay`
            self.config.moe_router_fusion = False

    def _zeros(self) -> Tensor:
        return torch.zeros(self.config.num_moe_experts, dtype=torch.float32, device=torch.cuda.current_device())

    def _register_load_buffers(self) -> None:
        """Register f of the previous global batch, and this rank's sums over the current one."""
        self.register_buffer("expert_load", self._zeros() + 1 / self.config.num_moe_experts)
        self.register_buffer("slots", self._zeros(), persistent=False)
        self.register_buffer("probability", self._zeros(), persistent=False)
        # megatron-core's running average is not used
        self.global_tokens_per_expert = None

    def set_layer_number(self, layer_number: int) -> None:
        """Set the layer's index in megatron-core's log of auxiliary losses, which has one entry per MTP depth.

        MTP's stack counts its sublayers instead, and megatron/core/transformer/moe/router.py:592 would write past the
        end of the log.
        """
        super().set_layer_number(1 if self.is_mtp_layer else layer_number)

    def gating(self, input: Tensor) -> Tensor:
        """Return the logits [S,B,E]; random ones with `moe_router_force_load_balancing`, for benchmarks.

        They are drawn once for a shape: activation checkpointing must route the same tokens again, and megatron-core's
        switch the generator's state, which cannot be captured in a CUDA graph. The gradient is that of the router's own
        logits, as in megatron-core.
        """
        logits = router_linear(input, self.weight) if self.config.moe_router_dtype == "fp32" else super().gating(input)
        if self.forces_balance:
            if logits.shape not in self._random_logits:
                self._random_logits[logits.shape] = torch.randn_like(logits)
            logits = logits + (self._random_logits[logits.shape] - logits).detach()
        return logits

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Select the top-k experts, count the load, and attach the balance loss.

        Shapes: logits [S,B,E] fp32; padding_mask bool [S,B], True for padding, which does not count.
        Returns: gates and routing map, [S·B,E].
        """
        probs, routing_map = super().routing(logits, padding_mask)
        hook = self.config.pass_state.routing.get(self)
        if hook is not None:
            probs, routing_map = hook.run(self, logits, probs, routing_map)
        # with activation checkpointing (recompute), only the pass that builds a graph counts
        if self.training and torch.is_grad_enabled():
            scores, counted_map = torch.softmax(logits.reshape(-1, self.num_experts).float(), dim=-1), routing_map
            if padding_mask is not None:
                is_token_T1 = ~padding_mask.reshape(-1, 1)
                scores, counted_map = scores * is_token_T1, routing_map & is_token_T1
            with torch.no_grad():
                self.slots += counted_map.sum(0)
                self.probability += scores.sum(0)
            if self.balances_globally:
                probs = self._attach_balance_loss(probs, scores, self.expert_load)
        return probs, routing_map

    def reset_counts(self) -> None:
        """Forget the current global batch's counts."""
        self.slots.zero_()
        self.probability.zero_()

    @torch.no_grad()
    def move_bias(self, load_E: Tensor) -> None:
        """Move every expert's bias one step towards an even load, given the load of the global batch.

        A frozen router has counted no slots (a load of zeros), and its bias does not change.
        """
        if self.bias_update_rate is not None:
            direction_E = (1 / self.num_experts - load_E).sign() * load_E.any()
            self.expert_bias += self.bias_update_rate * direction_E

    def _apply_global_aux_loss(self, probs: Tensor, *_: object, **__: object) -> Tensor:
        """Return probs without megatron-core's loss; `routing` attaches ours."""
        return probs

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """Attach the balance loss of the micro-batch, whose f is that of its own tokens.

        With padding, megatron-core 0.19.2 weighs it by the number of tokens times the number of ranks: the reduction in
        `get_tokens_per_expert_and_token_count` is in place, and its local count is the global one.
        """
        if not with_padding_mask or self.get_aux_loss_coeff("aux_loss") == 0:
            return super()._apply_aux_loss(probs, scores_for_aux_loss, routing_map, with_padding_mask)
        slots_E = routing_map.sum(0).float()
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(slots_E, group=self.tp_cp_group)
        return self._attach_balance_loss(probs, scores_for_aux_loss, slots_E / slots_E.sum().clamp(min=1))

    def _attach_balance_loss(self, probs: Tensor, scores_TE: Tensor, load_E: Tensor) -> Tensor:
        """Attach coeff · E · Σ f·p, summed over this rank's tokens (padding has p = 0)."""
        loss = self.num_experts * (scores_TE * load_E).sum()
        if self.is_mtp_layer and self.config.mtp_use_repeated_layer:
            # one layer, which runs once per depth
            loss = loss / self.config.mtp_num_layers
        return self._attach(probs, loss * self.config.moe_aux_loss_coeff)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attach coeff · Σ (log Σ exp logits)² over this rank's tokens. Shapes: logits [T,E], padding_mask [T]."""
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not (self.training and torch.is_grad_enabled()):
            return logits
        num_tokens = logits.shape[0] if padding_mask is None else (~padding_mask).sum()
        return self._attach(logits, z_loss_func(logits, coefficient, padding_mask) * num_tokens)

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: ProcessGroup,
        needs_dp_avg: bool = True,
        valid_token_count: int | Tensor | None = None,
    ) -> Tensor:
        """Attach megatron-core's `aux_loss` or `seq_aux_loss` of rows without padding; its log of them is not kept."""
        assert isinstance(valid_token_count, int), "megatron-core's losses are not used with padding"
        if self.is_mtp_layer and self.config.mtp_use_repeated_layer:
            # one layer, which runs once per depth
            aux_loss = aux_loss / self.config.mtp_num_layers
        return self._attach(activation, aux_loss * valid_token_count * self.tp_cp_group.size())

    def _attach(self, activation: Tensor, loss: Tensor) -> Tensor:
        """Attach a sum over this rank's tokens, which becomes a mean over the M tokens of the global batch.

        The sum is pre-scaled by 1/N as the loss is (TrainState.loss_scale), and here by N / M.
        finalize_model_grads gets None and does not divide.
        """
        scale = self.config.pass_state.balance_scale
        return MoEAuxLossAutoScaler.apply(activation, loss if scale is None else loss * scale)


class BiasedTopK:
    """Top-k selection by logits plus the router's bias, in megatron-core's `router_replay` slot.

    megatron-core's own bias is for sigmoid scores only (megatron/core/transformer/transformer_config.py:2284).
    """

    def __init__(self, router: GlobalBatchRouter) -> None:
        self._router = router

    def get_replay_topk(self, scores: Tensor, topk: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Return the chosen experts' logits [T,K], without the bias, and their indices [T,K]."""
        chosen_TK = (scores.detach() + self._router.expert_bias).topk(topk, dim=1).indices
        return scores.gather(1, chosen_TK), chosen_TK


def normalize_rows(weight: nn.Parameter, std: float) -> None:
    """Scale every row to the norm that N(0, std²) rows have on average: std · sqrt(columns)."""
    with torch.no_grad():
        rows = weight.float()
        rows = rows / rows.norm(dim=1, keepdim=True) * (std * rows.shape[1] ** 0.5)
        weight.copy_(rows)


def routers_of(chunks: list[nn.Module]) -> dict[str, GlobalBatchRouter]:
    """Return every router of these model chunks by chunk index and module name, in build order.

    The chunk index is part of the key because each virtual pipeline stage counts its layers from 0.
    """
    return {
        f"{index}.{name}": module
        for index, chunk in enumerate(chunks)
        for name, module in chunk.named_modules()
        if isinstance(module, GlobalBatchRouter)
    }


@torch.no_grad()
def finish_balance(routers: list[GlobalBatchRouter], tokens_group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Reduce the counts of a global batch over every rank with tokens; set them as f for the next batch.

    Also moves the routers' biases and resets the counts.

    Returns: load f [L,E] and balance loss [L] of each layer over the global batch.
    """
    counts = torch.stack([torch.stack([r.slots, r.probability]) for r in routers])
    if tokens_group.size() > 1:
        torch.distributed.all_reduce(counts, group=tokens_group)
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    load_LE, probability_LE = shares[:, 0], shares[:, 1]
    for router, load in zip(routers, load_LE):
        router.expert_load.copy_(load)
        router.move_bias(load)
        router.reset_counts()
    return load_LE, load_LE.shape[-1] * (load_LE * probability_LE).sum(-1)
