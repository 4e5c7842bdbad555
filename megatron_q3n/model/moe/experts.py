"""Routed experts with stacked weights: one [experts, out, in] tensor per linear, as a grouped
matrix product wants them.

One parameter per linear instead of one per expert: with 512 experts × 48 layers that is 96 tensors
instead of 49,152 for the optimizer, DDP buckets and checkpoints to walk through.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_q3n.kernels import registry
from megatron_q3n.kernels.moe import fp8_experts
from megatron_q3n.kernels.moe.grouped_linear import grouped_linear, settle
from megatron_q3n.kernels.moe.permutation import Routes
from megatron_q3n.kernels.moe.swiglu import weighted_swiglu
from megatron_q3n.model.sharding import stacked_experts


class StackedExperts(MegatronModule):
    """SwiGLU experts over tokens sorted by expert; fits megatron-core's `experts` slot of an MoELayer."""

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, *, pg_collection: Any, name: str | None = None
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
        self.addend: Tensor | None = None

    @property
    def takes_tokens(self) -> bool:
        """Whether `forward` wants tokens and routes instead of sorted rows: in FP8, which sorts while it quantises."""
        return bool(self.config.fp8) and registry.lacking((fp8_experts.OPERATION,)) == []

    def forward(self, rows_TH: Tensor, where: Tensor | Routes, gates_R: Tensor) -> tuple[Tensor, None]:
        """Run each expert on its rows and weigh the result by the router's gate.

        Shapes: rows [R,H] sorted by local expert, with counts [local experts]; or, where `takes_tokens`, tokens
            [T,H] with their routes, to whose results the `addend` [T,H] left for this call is added. gates [R].
        Returns: (shaped like the rows or tokens, None): there is no bias.
        """
        addend, self.addend = self.addend, None
        if self.takes_tokens and rows_TH.shape[0] > 0:
            routes = where if isinstance(where, Routes) else None
            counts = where.rows_per_expert_E if isinstance(where, Routes) else where
            given = self.linear_fc1.weight, self.linear_fc2.weight, routes, counts, addend
            return fp8_experts.fp8_experts(rows_TH, gates_R, *given), None
        assert isinstance(where, Tensor)
        assert addend is None
        return self._run_rows(rows_TH, where, gates_R), None

    def _run_rows(self, rows_TH: Tensor, rows_per_expert_E: Tensor, gates_R: Tensor) -> Tensor:
        if rows_TH.shape[0] == 0:  # nobody chose this rank's experts; keep the graph, so that DDP hears from us
            for stack in (self.linear_fc1, self.linear_fc2):
                settle(stack.weight)
            touched = self.linear_fc1.weight.sum() * 0 + self.linear_fc2.weight.sum() * 0
            return rows_TH + touched.to(rows_TH.dtype)
        gate_up = grouped_linear(rows_TH, self.linear_fc1.weight, rows_per_expert_E)
        if self.recompute_activation and self.training:
            activation = tensor_parallel.CheckpointWithoutOutput()
            hidden = activation.checkpoint(weighted_swiglu, gate_up, gates_R)
            out = grouped_linear(hidden, self.linear_fc2.weight, rows_per_expert_E)
            activation.discard_output_and_register_recompute(out)
            return out
        hidden = weighted_swiglu(gate_up, gates_R)
        return grouped_linear(hidden, self.linear_fc2.weight, rows_per_expert_E)

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
        """Do nothing: weight gradients are computed with the input gradients."""


class _Stack(nn.Module):
    """One linear's weights for all local experts, [experts, out, in], marked for megatron-core's gradient reduction."""

    def __init__(
        self, experts: int, outputs: int, inputs: int, config: TransformerConfig, init_method: Any, partition_dim: int
    ) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs, dtype=config.params_dtype, device=device))
        # Reduced over the expert data parallel group, by an optimizer of their own. Always, though only
        # some layouts cut experts unlike dense weights: an optimizer state of two parts does not load
        # into an optimizer of one (optimizer.py:1579), and a checkpoint must load into any layout.
        self.weight.allreduce = False  # type: ignore[attr-defined]
        tensor_parallel.set_tensor_model_parallel_attributes(self.weight, True, partition_dim, 1)
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                init_method(self.weight)
