"""MoE token dispatchers without host synchronization: for one process, and between expert-parallel ranks.

megatron-core's all-to-all dispatcher works for every layout, and copies the token counts to the host once per layer,
which waits for them. Without expert parallelism there is nothing to exchange, and it sorts rows that are sorted already
(7 ms of a step of 4 layers on an H100). `LocalDispatcher` keeps everything on the device, with shapes that do not
depend on the routing, so that a whole step can be captured as one CUDA graph. `ExchangeDispatcher` does the same
between expert-parallel ranks that share memory (kernels/moe/expert_exchange.py).
"""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from megatron_q3n.kernels.moe.expert_exchange import Dispatched
from megatron_q3n.kernels.moe.permutation import Routes, gather_rows, plan_routes, scatter_rows
from megatron_q3n.model.moe.experts import StackedExperts


class LocalDispatcher(MoETokenDispatcher):
    """MoE dispatcher without expert parallelism: megatron-core's six dispatcher calls, with no host synchronization.

    The permuted tokens are rows sorted by expert. `PassState.residual` [T,B,H], if set, is added to the output.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, experts: StackedExperts
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.topk, self.experts = config.moe_router_topk, experts

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Permute tokens to their experts' rows, unless the experts permute them themselves.

        Returns: rows [T·K,H] (or tokens [T,H]), and the rows' router gates [T·K].
        """
        self.hidden_shape = hidden_states.shape
        fused = bool(self.config.plan.moe.permutation)
        self.routes, gates = plan_routes(routing_map, probs, self.topk, fused=fused)
        self.passes_tokens = bool(self.config.plan.moe.fp8_experts)
        tokens = hidden_states.flatten(0, -2)
        return tokens if self.passes_tokens else scatter_rows(tokens, self.routes, fused=fused), gates

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the arguments: there is nothing to exchange between ranks."""
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor | Routes, Tensor]:
        """Return what the experts take: sorted rows, rows per expert and gates; or tokens, routes and gates."""
        if not self.passes_tokens:
            return hidden_states, self.routes.rows_per_expert_E, probs
        return hidden_states, self.routes, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Return the argument: there is nothing to undo."""
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Return the argument: there is nothing to exchange between ranks."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum each token's rows, and the residual; experts that take tokens have done both. Returns: [T,B,H]."""
        if self.passes_tokens:
            return hidden_states.view(self.hidden_shape)
        residual = self.config.pass_state.take_residual()
        flat = None if residual is None else residual.flatten(0, -2)
        fused = bool(self.config.plan.moe.permutation)
        return gather_rows(hidden_states, self.routes, flat, fused=fused).view(self.hidden_shape)


class ExchangeDispatcher(MoETokenDispatcher):
    """MoE dispatcher between expert-parallel ranks: megatron-core's six dispatcher calls over the model's exchange.

    For passes in which every rank brings equally many tokens. `PassState.residual` [T,B,H], if set, is added to the
    output.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.dispatched: Dispatched | None = None

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens [T,H] and gates [T,E]."""
        self.hidden_shape, self.routing_map = hidden_states.shape, routing_map
        tokens_TH = hidden_states.flatten(0, -2)
        # a rank with another number would read its peers' rows at wrong places, without an error
        expected = self.config.pass_state.tokens_per_rank
        assert tokens_TH.shape[0] == expected, f"{tokens_TH.shape[0]} tokens on this rank, and {expected} on every rank"
        return tokens_TH, probs

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Bring the tokens to their experts' ranks. Returns: rows [C,H] and their gates [C]."""
        self.dispatched = self.config.pass_state.expert_exchange.dispatch(hidden_states, self.routing_map, probs)
        return self.dispatched.rows, self.dispatched.gates

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return sorted rows, rows per expert and gates."""
        assert self.dispatched is not None
        return hidden_states, self.dispatched.counts, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Return the argument: rows are summed per token by `token_combine`."""
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Sum each token's rows over the ranks, and the residual. Returns: [T,H]."""
        dispatched, self.dispatched = self.dispatched, None
        residual = self.config.pass_state.take_residual()
        flat = None if residual is None else residual.flatten(0, -2)
        return self.config.pass_state.expert_exchange.combine(hidden_states, dispatched, flat)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Return the tokens in their shape [T,B,H]."""
        return hidden_states.view(self.hidden_shape)
