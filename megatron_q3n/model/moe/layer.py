"""MoE layer: megatron-core's MoELayer, with the dispatchers of model/moe/token_dispatcher.py where the plan has them.

Its input comes as one alias per consumer (model/sublayers.py), and it can add the residual stream in the epilogue of
its last kernels.
"""

from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from megatron_q3n.model.moe.token_dispatcher import ExchangeDispatcher, LocalDispatcher


class Qwen3NextMoELayer(MoELayer):
    """megatron-core's MoELayer, with LocalDispatcher where one process holds all experts, else ExchangeDispatcher.

    ExchangeDispatcher serves passes with equally many tokens on every rank; the others have megatron-core's dispatcher.

    Its input may come as aliases: for the router, the routed experts, and the input and the gate of the shared expert.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.token_dispatcher: MoETokenDispatcher
        self.dispatcher_of_any_tokens = self.token_dispatcher
        self.dispatcher_of_equal_tokens = self.token_dispatcher
        if config.plan.moe.local_dispatcher:
            assert self.token_dispatcher.ep_size == self.token_dispatcher.tp_size == 1, (
                "the plan and the groups disagree"
            )
            self.token_dispatcher = LocalDispatcher(config, options["pg_collection"], self.experts)
            self.dispatcher_of_any_tokens = self.dispatcher_of_equal_tokens = self.token_dispatcher
        elif config.plan.moe.expert_exchange:
            self.dispatcher_of_equal_tokens = ExchangeDispatcher(config, options["pg_collection"])

    def forward(
        self,
        hidden_states: Tensor | tuple[Tensor, ...],
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the experts.

        Shapes: hidden [T,B,H], or a tuple of aliases of it; residual [T,B,H], only with the plan's `fused_residual`.
        Returns: (output [T,B,H], None): there is no bias.
        """
        equal = self.config.pass_state.tokens_per_rank is not None
        self.token_dispatcher = self.dispatcher_of_equal_tokens if equal else self.dispatcher_of_any_tokens
        if not isinstance(hidden_states, tuple):
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        for_router, for_experts, *for_shared = hidden_states
        shared = self.shared_experts(*for_shared, add=residual) if for_shared else None
        # megatron-core's dispatchers add no residual; `postprocess` adds it with the shared expert's output
        if residual is not None and isinstance(self.token_dispatcher, LocalDispatcher | ExchangeDispatcher):
            self.config.pass_state.residual, shared = shared, None
        ignored = None if padding_mask is None else padding_mask.transpose(0, 1).bool()
        probs, routing_map = self.route(for_router, ignored)
        tokens, probs = self.preprocess(for_experts, probs, routing_map)
        rows, probs = self.dispatch(tokens, probs)
        output, _ = self.routed_experts_compute(rows, probs)
        return self.postprocess(self.combine(output), shared), None
