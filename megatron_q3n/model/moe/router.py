"""The top-k router: unbiased at the start, balanced over the whole global batch, the same in every layout.

**Init.** Every row of the router gets the same norm, so that at step 0 no expert wins by length
alone (Qwen3-Next's description; σ-MoE, arXiv 2310.10837, section 4).

**Balance loss** (Demons in the Detail, arXiv 2501.11873): E · Σᵢ fᵢ Pᵢ with fᵢ the share of routed
slots and Pᵢ the mean router probability of expert i, both over the global batch, so that experts
may specialise within a sequence or micro-batch; 1.0 is perfect balance. fᵢ has no gradient. With
several micro-batches the true fᵢ is known only after the last one, when the gradients of the first
are long done. megatron-core uses the counts so far, which makes the loss depend on how the batch
was cut. Here fᵢ comes from the *previous* global batch (none yet: uniform, whose gradient is zero):
a delay of one step in a slow feedback loop, in exchange for a loss that is the same for every
layout and micro-batch size, and for one all-reduce per step instead of one per layer and
micro-batch. The reported value uses the present batch's f and P.

**Balance without a loss** (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2), instead of that loss or
beside it: a bias per expert is added to the logits where experts are chosen, and nowhere else, so no
gradient pulls against the language model's. After each global batch it moves by a fixed step, up for
experts with less than their share of its slots and down for those with more. There the scores are
sigmoids; here they are logits, which for softmax is a factor exp(bias) on each probability.
"""

from copy import copy
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_q3n.kernels.moe.router_linear import router_linear
from megatron_q3n.model.moe.routing_replay import RouteTape


class GlobalBatchRouter(TopKRouter):
    """megatron-core's TopKRouter with the init and balance loss above."""

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        normalized_init: bool = True,
        bias_update_rate: float | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        if normalized_init and config.perform_initialization:
            normalize_rows(self.weight, config.init_method_std)
        experts, device = config.num_moe_experts, torch.cuda.current_device()
        self.balances_globally = self.get_aux_loss_coeff("global_aux_loss") > 0
        zeros = lambda: torch.zeros(experts, dtype=torch.float32, device=device)
        self.register_buffer("expert_load", zeros() + 1 / experts)  # f of the previous global batch
        self.register_buffer("slots", zeros(), persistent=False)  # this batch so far, this rank
        self.register_buffer("probability", zeros(), persistent=False)
        self.global_tokens_per_expert = None  # megatron-core's running average is not used
        # taken over from TopKRouter.forward, which would draw a second time
        self.tape: RouteTape | None = None  # records and replays routes, for reinforcement learning
        self.forces_balance = config.moe_router_force_load_balancing
        self.config = copy(config)
        self.config.moe_router_force_load_balancing = False
        if is_mtp_layer and config.mtp_use_repeated_layer and config.moe_z_loss_coeff:
            # run once per depth, weighed once: upstream divides what it logs, after the gradient (router.py:686)
            self.config.moe_z_loss_coeff = config.moe_z_loss_coeff / config.mtp_num_layers
        self.bias_update_rate = bias_update_rate
        if bias_update_rate is not None:
            del self.expert_bias  # a plain None so far
            self.register_buffer("expert_bias", zeros())
            self.router_replay = BiasedChoice(self)
            self.config.moe_router_fusion = False  # the fused choice asks nobody

    def set_layer_number(self, layer_number: int) -> None:
        """Number the layer as megatron-core's log of auxiliary losses counts: one place per MTP depth,
        while MTP's stack counts its sublayers (router.py:592 would write behind the log's end)."""
        super().set_layer_number(1 if self.is_mtp_layer else layer_number)

    def gating(self, input: Tensor) -> Tensor:
        """Score the experts; under `moe_router_force_load_balancing`, for benchmarks, by chance.

        Not megatron-core's random logits: they switch the generator's state, which a CUDA graph cannot.
        The gradient goes through as if the scores were the router's own, as upstream's does.
        """
        logits = router_linear(input, self.weight) if self.config.moe_router_dtype == "fp32" else super().gating(input)
        if self.forces_balance:
            logits = logits + (torch.randn_like(logits) - logits).detach()
        return logits

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Shapes: logits [S,B,E] fp32.
        Returns: gates and routing map, [S·B,E].
        """
        probs, routing_map = super().routing(logits, padding_mask)
        if self.tape is not None:
            probs, routing_map = self.tape.run(self, logits, probs, routing_map)
        # under activation recompute only the pass that builds a graph counts
        if self.training and torch.is_grad_enabled():
            assert padding_mask is None, "balance over padded batches is not defined here"
            scores = torch.softmax(logits.reshape(-1, self.num_experts).float(), dim=-1)
            with torch.no_grad():
                self.slots += routing_map.sum(0)
                self.probability += scores.sum(0)
            if self.balances_globally:
                probs = self._attach_balance_loss(probs, scores)
        return probs, routing_map

    @torch.no_grad()
    def move_bias(self, load_E: Tensor) -> None:
        """Move every expert's bias one step towards an even load, given the global batch's.

        A frozen router saw nothing, and keeps its bias.
        """
        if self.bias_update_rate is not None:
            too_few = (1 / self.num_experts - load_E).sign() * load_E.any()
            self.expert_bias += self.bias_update_rate * too_few

    def _apply_global_aux_loss(self, probs: Tensor, *_: object, **__: object) -> Tensor:
        """Leave out megatron-core's version; `routing` attaches ours."""
        return probs

    def _attach_balance_loss(self, probs: Tensor, scores_TE: Tensor) -> Tensor:
        """Add coeff · E · Σ f·p, summed over this rank's tokens: finalize_model_grads divides by
        the global token count.
        """
        loss = self.num_experts * (scores_TE * self.expert_load).sum()
        if self.is_mtp_layer and self.config.mtp_use_repeated_layer:
            loss = loss / self.config.mtp_num_layers  # one layer, run once per depth
        return MoEAuxLossAutoScaler.apply(probs, loss * self.config.moe_aux_loss_coeff)


class BiasedChoice:
    """Choose experts by logits plus the router's bias, in the place that megatron-core keeps for replayed choices.

    Its own bias is for sigmoid scores only (transformer_config.py:2284).
    """

    def __init__(self, router: GlobalBatchRouter) -> None:
        self._router = router

    def get_replay_topk(self, scores: Tensor, topk: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Return the chosen experts' own logits [T,K], without the bias, and the experts."""
        chosen_TK = (scores.detach() + self._router.expert_bias).topk(topk, dim=1).indices
        return scores.gather(1, chosen_TK), chosen_TK


def normalize_rows(weight: nn.Parameter, std: float) -> None:
    """Give every row the norm that N(0, std²) rows have on average: std · sqrt(columns)."""
    with torch.no_grad():
        rows = weight.float()
        rows = rows / rows.norm(dim=1, keepdim=True) * (std * rows.shape[1] ** 0.5)
        weight.copy_(rows)


def routers_of(chunks: list[nn.Module]) -> dict[str, GlobalBatchRouter]:
    """Return every router of these model chunks by chunk and module name, in build order.

    The chunk belongs to the name: each virtual pipeline stage counts its layers from 0.
    """
    return {
        f"{index}.{name}": module
        for index, chunk in enumerate(chunks)
        for name, module in chunk.named_modules()
        if isinstance(module, GlobalBatchRouter)
    }


@torch.no_grad()
def finish_balance(routers: list[GlobalBatchRouter], tokens_group: Any) -> tuple[Tensor, Tensor]:
    """Close a global batch: share its counts over every rank that saw tokens, and hand them to the next batch.

    Returns: each layer's load f [L,E] and balance loss [L] over the whole batch.
    """
    counts = torch.stack([torch.stack([r.slots, r.probability]) for r in routers])
    if tokens_group.size() > 1:
        torch.distributed.all_reduce(counts, group=tokens_group)
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    load_LE, probability_LE = shares[:, 0], shares[:, 1]
    for router, load in zip(routers, load_LE):
        router.expert_load.copy_(load)
        router.move_bias(load)
        router.slots.zero_()
        router.probability.zero_()
    return load_LE, load_LE.shape[-1] * (load_LE * probability_LE).sum(-1)
