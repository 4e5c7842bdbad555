"""Routed experts with stacked weights: one [experts, out, in] tensor per linear, for grouped GEMMs.

There is one parameter per linear instead of one per expert. With 512 experts and 48 layers, the optimizer, DDP buckets
and checkpoints iterate over 96 tensors instead of 49,152.

Shapes: T tokens, R permuted rows (one per token and chosen expert), H hidden size, E local experts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_q3n.kernels.moe import fp8_experts
from megatron_q3n.kernels.moe.grouped_linear import clear_if_not_accumulated, grouped_linear
from megatron_q3n.kernels.moe.permutation import Routes
from megatron_q3n.kernels.moe.swiglu import swiglu
from megatron_q3n.model.sharding import stacked_experts


class StackedExperts(MegatronModule):
    """SwiGLU experts over tokens sorted by expert, for the `experts` slot of megatron-core's MoELayer."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.ep_group, self.etp_group = pg_collection.ep, pg_collection.expt_tp
        self.edp_rank = pg_collection.expt_dp.rank()
        ffn = config.moe_ffn_hidden_size // self.etp_group.size()
        hidden = config.hidden_size
        self.linear_fc1 = _Stack(num_local_experts, 2 * ffn, hidden, config, config.init_method, 1)
        self.linear_fc2 = _Stack(num_local_experts, hidden, ffn, config, config.output_layer_init_method, 2)
        selective = config.recompute_granularity == "selective"
        self.recompute_activation = selective and "moe_act" in config.recompute_modules

    def forward(self, rows_TH: Tensor, counts_or_routes: Tensor | Routes, gates_R: Tensor) -> tuple[Tensor, None]:
        """Run each expert on its rows and multiply the result by the router's gate.

        Shapes: rows [R,H] sorted by local expert, with counts [E]; or, with `fp8_experts` in the plan, tokens [T,H]
        with
            their routes, to whose results `PassState.residual`, if set, is added. gates [R].
        Returns: (output shaped like the rows or tokens, None): there is no bias.
        """
        if self.config.plan.moe.fp8_experts and rows_TH.shape[0] > 0:
            routes = counts_or_routes if isinstance(counts_or_routes, Routes) else None
            # of permuted rows the dispatcher adds it
            residual = None if routes is None else self.config.pass_state.take_residual()
            flat = None if residual is None else residual.flatten(0, -2)
            counts = counts_or_routes.rows_per_expert_E if isinstance(counts_or_routes, Routes) else counts_or_routes
            weights = self.linear_fc1.weight, self.linear_fc2.weight
            return fp8_experts.fp8_experts(rows_TH, gates_R, *weights, routes, counts, flat), None
        assert isinstance(counts_or_routes, Tensor)
        return self._run_rows(rows_TH, counts_or_routes, gates_R), None

    def _run_rows(self, rows_TH: Tensor, rows_per_expert_E: Tensor, gates_R: Tensor) -> Tensor:
        if rows_TH.shape[0] == 0:
            # No token is routed to this rank's experts. Their weights stay in the graph, because DDP waits for the
            # gradients of all parameters.
            for stack in (self.linear_fc1, self.linear_fc2):
                clear_if_not_accumulated(stack.weight)
            zero = self.linear_fc1.weight.sum() * 0 + self.linear_fc2.weight.sum() * 0
            return rows_TH + zero.to(rows_TH.dtype)
        plan = self.config.plan.moe
        gemm = partial(grouped_linear, rows_per_expert_E=rows_per_expert_E, backend=plan.grouped_gemm_backend)
        activate = partial(swiglu, fused=bool(plan.swiglu))
        gate_up = gemm(rows_TH, self.linear_fc1.weight)
        if self.recompute_activation and self.training:
            activation = tensor_parallel.CheckpointWithoutOutput()
            hidden = activation.checkpoint(activate, gate_up, gates_R)
            out = gemm(hidden, self.linear_fc2.weight)
            activation.discard_output_and_register_recompute(out)
            return out
        return gemm(activate(gate_up, gates_R), self.linear_fc2.weight)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Describe both stacks as slices of the global [experts, out, in] tensors."""
        assert not sharded_offsets
        return {
            f"{prefix}{name}.weight": stacked_experts(
                f"{prefix}{name}.weight", stack.weight, self.ep_group, self.etp_group, self.edp_rank, cut=cut
            )
            for name, stack, cut in (
                ("linear_fc1", self.linear_fc1, "gated_outputs"),
                ("linear_fc2", self.linear_fc2, "inputs"),
            )
        }

    def backward_dw(self) -> None:
        """Do nothing: weight gradients are computed together with the input gradients."""


class _Stack(nn.Module):
    """Weights of one linear for all local experts, [experts, out, in], with megatron-core's parallelism attributes."""

    def __init__(
        self,
        num_experts: int,
        outputs: int,
        inputs: int,
        config: TransformerConfig,
        init_method: Callable[[Tensor], object],
        partition_dim: int,
    ) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(num_experts, outputs, inputs, dtype=config.params_dtype, device=device))
        # Gradients are reduced over the expert data-parallel group, and a separate optimizer updates the weights. This
        # holds for every layout, though only some shard experts differently from dense weights: an optimizer state of
        # two parts does not load into an optimizer of one (megatron/core/optimizer/optimizer.py:1579), and a checkpoint
        # must load into any layout.
        self.weight.allreduce = False  # type: ignore[attr-defined]
        tensor_parallel.set_tensor_model_parallel_attributes(self.weight, True, partition_dim, 1)
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                init_method(self.weight)
