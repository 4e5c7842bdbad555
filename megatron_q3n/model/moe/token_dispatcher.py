"""How tokens reach their experts when one process holds them all, and the MoE layer that knows it.

megatron-core's all-to-all dispatcher serves every layout; without expert parallelism there is nothing
to exchange, yet it copies the counts to the host and waits for them, once a layer, and sorts rows
that are sorted (7 ms of a step of 4 layers on an H100). Ours keeps all of it on the device, with shapes
that do not depend on the routing, which is also what lets a whole step become one CUDA graph.
"""

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from megatron_q3n.kernels import registry
from megatron_q3n.kernels.moe import permutation, shared_expert_gate
from megatron_q3n.kernels.moe.permutation import Routes, gather_rows, plan_routes, scatter_rows


class LocalDispatcher(MoETokenDispatcher):
    """megatron-core's six dispatcher calls where nothing leaves the process."""

    def __init__(self, config: Any, pg_collection: Any, experts: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.topk, self.experts = config.moe_router_topk, experts
        self.addend: Tensor | None = None

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Copy tokens to their experts' rows, or leave that to experts that do it themselves.

        Returns: rows [T·K,H] (or tokens [T,H]), and the rows' router gates [T·K].
        """
        self.hidden_shape = hidden_states.shape
        self.routes, gates = plan_routes(routing_map, probs, self.topk)
        self.hands_over_tokens = self.experts.takes_tokens
        tokens = hidden_states.flatten(0, -2)
        return tokens if self.hands_over_tokens else scatter_rows(tokens, self.routes), gates

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing to exchange."""
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor | Routes, Tensor]:
        """Hand over rows, rows per expert and gates (the rows are sorted already); or tokens, routes and gates."""
        if not self.hands_over_tokens:
            return hidden_states, self.routes.rows_per_expert_E, probs
        if self.addend is not None:
            self.experts.addend, self.addend = self.addend.flatten(0, -2), None
        return hidden_states, self.routes, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Nothing to undo."""
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Nothing to exchange."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Add up each token's rows, and the `addend` left for this call."""
        addend, self.addend = self.addend, None
        if not self.hands_over_tokens:
            flat = None if addend is None else addend.flatten(0, -2)
            return gather_rows(hidden_states, self.routes, flat).view(self.hidden_shape)
        made = hidden_states.view(self.hidden_shape)
        return made if addend is None else made + addend


class Qwen3NextMoELayer(MoELayer):
    """megatron-core's MoELayer, with the dispatcher above where it serves.

    `readers` is how many names of the tokens it wants: router, experts, and of the shared expert its input and gate;
    one where a part is recomputed or overlapped, which is megatron-core's to do.
    """

    def __init__(self, config: Any, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.token_dispatcher: MoETokenDispatcher
        alone = self.token_dispatcher.ep_size == 1 and self.token_dispatcher.tp_size == 1
        dropless = config.moe_expert_capacity_factor is None
        plain = config.moe_token_dispatcher_type != "flex" and not self.shared_expert_overlap
        if alone and dropless and plain and not config.moe_router_padding_for_quantization:
            groups = options["pg_collection"]
            self.token_dispatcher = LocalDispatcher(config, groups, self.experts)
        recomputes = self.moe_layer_recompute or self.shared_experts_recompute
        if recomputes or self.shared_expert_overlap or config.moe_latent_size:
            self.readers = 1
        else:
            self.readers = 2 + (2 if self.use_shared_expert else 0)

    def adds_stream(self, hidden: Tensor) -> bool:
        """Whether `forward` also adds the stream, in kernels that write the sum anyway."""
        alone = isinstance(self.token_dispatcher, LocalDispatcher) and self.use_shared_expert
        both = (permutation.OPERATION, shared_expert_gate.OPERATION)
        return alone and all(registry.is_fused(operation, hidden) for operation in both)

    def forward(
        self,
        hidden_states: Tensor | tuple[Tensor, ...],
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
        stream: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the experts.

        Shapes: hidden [T,B,H], or a tuple with a name of it for each of `readers`; stream likewise, only where
            `adds_stream`. Returns: (output [T,B,H], None): there is no bias.
        """
        if not isinstance(hidden_states, tuple):
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        for_router, for_experts, *for_shared = hidden_states
        shared = self.shared_experts(*for_shared, add=stream) if for_shared else None
        if stream is not None:
            assert isinstance(self.token_dispatcher, LocalDispatcher)
            self.token_dispatcher.addend, shared = shared, None
        ignored = None if padding_mask is None else padding_mask.transpose(0, 1).bool()
        probs, routing_map = self.route(for_router, ignored)
        tokens, probs = self.preprocess(for_experts, probs, routing_map)
        rows, probs = self.dispatch(tokens, probs)
        output, _ = self.routed_experts_compute(rows, probs)
        return self.postprocess(self.combine(output), shared), None
