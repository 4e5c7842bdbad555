"""Gated DeltaNet as a megatron-core token mixer (Gated Delta Networks, arXiv 2412.06464; Qwen3-Next's dimensions).

    q|k|v|z = in_proj(x),  β|α = beta_alpha_proj(x)
    q, k, v = SiLU(causal_conv1d(q|k|v)),  q, k = l2_norm(q), l2_norm(k)
    β = sigmoid(β),  g = -exp(A_log) · softplus(α + dt_bias)
    o = gated_delta_rule(q, k, v, g, β)
    y = out_proj(RMSNorm(o) · SiLU(z))

megatron-core's GatedDeltaNet has no packing without Triton, no state in or out, A_log in bf16, q and k repeated in
memory, and β and α inside the projection that FP8 quantizes. Checkpoints depend on these parameter names and shapes:

| parameter | shape | dtype |
|---|---|---|
| in_proj.weight | [2·Hk·K + 2·Hv·V, H] rows q, k, v, z | compute dtype, FP8 allowed |
| beta_alpha_proj.weight | [2·Hv, H] rows β, α | bf16/fp32, never FP8: 64 columns that control the memory |
| conv1d.weight | [2·Hk·K + Hv·V, 1, conv kernel size] channels q, k, v | compute dtype |
| A_log, dt_bias | [Hv] | always fp32: in bf16, training and inference would disagree |
| out_norm.weight | [V], zero-centered | always fp32 |
| out_proj.weight | [H, Hv·V] | compute dtype, FP8 allowed |

Tensor parallelism: whole heads per rank. Context parallelism, by `parallel.linear_context_parallel`: with all_to_all,
ranks exchange sequence for heads around the mixer (TP × CP must divide the key heads); with state_passing, every rank
keeps its part of the sequence and all its heads, and receives the state before its part (TP must divide them).

Shapes: B batch, T tokens of a whole row, S tokens of a rank, X = 2·Hk·K + 2·Hv·V channels, Hk key heads, Hv value
heads, K/V head dims, D documents.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net.common import _build_head_perm_for_split_sections, get_parameter_local_cp
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from megatron_q3n.config.execution_plan import GatedDeltaNetPlan
from megatron_q3n.kernels.gated_delta.backend import Rule, fused_gated_delta_rule
from megatron_q3n.kernels.gated_delta.causal_conv import next_conv_state
from megatron_q3n.kernels.gated_delta.delta_rule import chunk_gated_delta_rule
from megatron_q3n.kernels.gated_delta.mixer import delta_mixer, delta_rule_inputs
from megatron_q3n.kernels.gated_delta.operands import DeltaHeads, DeltaWeights
from megatron_q3n.kernels.norms import gated_rms_norm
from megatron_q3n.model.context_parallel import (
    chunks_of_rank,
    heads_for_sequence,
    inputs_before_chunks,
    sequence_for_heads,
    states_before_chunks,
)
from megatron_q3n.model.norms import ZeroCenteredRMSNorm
from megatron_q3n.model.packed_params import packing_of
from megatron_q3n.model.protocols import Linear
from megatron_q3n.model.sharding import shard_by_section, sharded_parameters
from megatron_q3n.packing import Packing


@dataclass
class GatedDeltaNetSubmodules:
    """Linear classes of a backend."""

    in_proj: ModuleSpec | type
    beta_alpha_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


@dataclass
class GatedDeltaNetState:
    """State of sequences between two calls; its size does not depend on their length.

    Shapes, channels and heads of this rank: conv [D, channels, conv kernel size - 1], the last inputs of the
        convolution; delta [D,Hv,K,V] fp32.
    """

    conv: Tensor
    delta: Tensor


class GatedDeltaNet(MegatronModule):
    """Gated DeltaNet mixer. megatron-core calls `forward`; `mix` also takes and returns state.

    Its input has two consumers, `in_proj` and `beta_alpha_proj`. `tp_heads` are the heads of this tensor-parallel rank;
    `heads` are those the rule runs on here, a share of them with context parallelism by all-to-all. Its delta rule may
    be observed (`PassState.delta_rule_probes`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        chunk_size: int = 64,
        time_step_init: tuple[float, float] | None = None,
        name: str | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self.layer_number, self.chunk_size = layer_number, chunk_size
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.passes_state = self.plan.context_parallel == "state_passing"
        self.conv_kernel_size = config.linear_conv_kernel_dim
        tp, cp = self.tp_group.size(), self.cp_group.size()
        num_shares = tp if self.passes_state else tp * cp
        assert config.linear_num_key_heads % num_shares == 0, "the configuration refuses this"
        self.tp_heads, self.heads = DeltaHeads.of(config, tp), DeltaHeads.of(config, num_shares)
        # the order of these lines is the order of random numbers and of parameters
        self._build_input_projections(submodules, name)
        self._build_conv_and_decay(time_step_init)
        # the weight is published as 1 + weight; in bf16 the difference would lose bits
        self.out_norm = ZeroCenteredRMSNorm(
            config, config.linear_value_head_dim, config.layernorm_epsilon, dtype=torch.float32
        )
        self._build_output_projection(submodules, name)

    @property
    def plan(self) -> GatedDeltaNetPlan:
        """The plan's part for this kind of mixer."""
        return self.config.plan.gated_delta_net

    def _build_input_projections(self, submodules: GatedDeltaNetSubmodules, name: str | None) -> None:
        config, hidden = self.config, self.config.hidden_size
        column = {"init_method": config.init_method, "gather_output": False, "skip_bias_add": False}
        num_channels = sum(DeltaHeads.of(config, 1).sections)
        self.in_proj = self._build_linear(
            submodules.in_proj, hidden, num_channels, name, "in_proj", **column, tp_comm_buffer_name="gdn_in"
        )
        num_gates = 2 * config.linear_num_value_heads
        self.beta_alpha_proj = self._build_linear(
            submodules.beta_alpha_proj, hidden, num_gates, name, "beta_alpha_proj", **column
        )

    def _build_output_projection(self, submodules: GatedDeltaNetSubmodules, name: str | None) -> None:
        config = self.config
        self.out_proj = self._build_linear(
            submodules.out_proj,
            DeltaHeads.of(config, 1).sections[-1],
            config.hidden_size,
            name,
            "out_proj",
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="gdn_out",
        )

    def _build_linear(
        self, spec: ModuleSpec | type, inputs: int, outputs: int, name: str | None, part: str, **options: Any
    ) -> Linear:
        return build_module(
            spec,
            inputs,
            outputs,
            config=self.config,
            bias=False,
            is_expert=False,
            tp_group=self.tp_group,
            name=f"{name}.{part}" if name else None,
            **options,
        )

    def _build_conv_and_decay(self, time_step_init: tuple[float, float] | None) -> None:
        """Create and initialize the convolution, A_log and dt_bias, with the tensor-parallel random generator."""
        config, device = self.config, torch.cuda.current_device()
        num_channels, num_heads = sum(self.tp_heads.sections[:3]), self.tp_heads.value_heads
        self.conv1d = _ConvWeight(num_channels, self.conv_kernel_size, config.params_dtype, device)
        self.A_log = nn.Parameter(torch.empty(num_heads, dtype=torch.float32, device=device))
        self.dt_bias = nn.Parameter(torch.ones(num_heads, dtype=torch.float32, device=device))
        for parameter in (self.conv1d.weight, self.A_log, self.dt_bias):
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(), torch.no_grad():
                # torch's default for a depthwise convolution with this fan-in
                bound = self.conv_kernel_size**-0.5
                self.conv1d.weight.uniform_(-bound, bound)
                # A ~ U(0, 16) as in the released model's code; away from 0, whose log is -inf
                self.A_log.uniform_(1e-4, 16).log_()
                if time_step_init is not None:
                    shortest, longest = time_step_init
                    step_H = self.dt_bias.uniform_(math.log(shortest), math.log(longest)).exp_()
                    # inverse of softplus, so that softplus(dt_bias) is the step
                    step_H.add_(torch.log(-torch.expm1(-step_H)))

    def forward(
        self,
        hidden_states: Tensor | tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        inference_context: None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """Mix tokens from a zero state.

        Shapes: hidden [T / (TP·CP),B,H] in (sequence parallel, zigzag context parallel) order, or a pair of aliases of
            it, one per consumer; the output likewise.
        Returns: (output, None): there is no bias.
        """
        assert inference_context is None, "decoding calls `mix`, which carries state"
        packing = packing_of(packed_seq_params)
        return self.mix(hidden_states, packing=packing)[0], None

    def mix(
        self,
        hidden_SBH: Tensor | tuple[Tensor, Tensor],
        state: GatedDeltaNetState | None = None,
        packing: Packing | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, GatedDeltaNetState | None]:
        """Mix tokens, continuing from `state` (one row per sequence or packed document) if given.

        Returns: the output, shaped like the input, and the new state if requested.
        """
        for_qkvz, for_gates = hidden_SBH if isinstance(hidden_SBH, tuple) else (hidden_SBH, hidden_SBH)
        qkvz, _ = self.in_proj(for_qkvz)
        beta_alpha, _ = self.beta_alpha_proj(for_gates)
        new_state = None
        if self.plan.checkpoints_activations and self.training:
            assert state is None
            assert not return_state
            # activation checkpointing of everything between the projections
            core = partial(self._mix_from_zero, packing=packing)
            gated = tensor_parallel.checkpoint(core, False, qkvz, beta_alpha)
        elif state is not None or return_state:
            gated, new_state = self._mix_from_state(qkvz, beta_alpha, state, packing, return_state)
        else:
            gated = self._mix_from_zero(qkvz, beta_alpha, packing)
        output, _ = self.out_proj(gated)
        return output, new_state

    def _mix_from_state(
        self,
        qkvz_TBX: Tensor,
        beta_alpha_TBX: Tensor,
        state: GatedDeltaNetState | None,
        packing: Packing | None,
        return_state: bool,
    ) -> tuple[Tensor, GatedDeltaNetState | None]:
        """Run the mixer between its projections from `state`, zero if None: prefill, one whole row per sequence.

        Returns: [T,B,Hv·V] normalized and gated, and the new state if requested.
        """
        assert self.cp_group.size() == 1
        conv_state, delta_state = (None, None) if state is None else (state.conv, state.delta)
        qkvz, beta_alpha, weights = qkvz_TBX.transpose(0, 1), beta_alpha_TBX.transpose(0, 1), self.delta_weights()
        qkv, z, (q, k, v, g, beta) = delta_rule_inputs(qkvz, beta_alpha, weights, self.heads, conv_state, packing)
        o, delta = self._rule()(q, k, v, g, beta, initial_state_DHKV=delta_state, packing=packing)
        gated = gated_rms_norm(o, z, weights.norm_V, self.heads.eps).flatten(2).transpose(0, 1).contiguous()
        if not return_state:
            return gated, None
        conv = next_conv_state(qkv, self.conv_kernel_size, initial_state_DCK=conv_state, packing=packing)
        assert delta is not None
        return gated, GatedDeltaNetState(conv, delta)

    def _mix_from_zero(self, qkvz_SBX: Tensor, beta_alpha_SBX: Tensor, packing: Packing | None) -> Tensor:
        """Run the mixer between its projections from zero states, for any context parallelism."""
        if self.plan.context_parallel == "none":
            return self._mix_whole_rows(qkvz_SBX, beta_alpha_SBX, packing)
        if self.passes_state:
            return self._mix_chunks(qkvz_SBX, beta_alpha_SBX, packing)
        return self._mix_by_all_to_all(qkvz_SBX, beta_alpha_SBX, packing)

    def _mix_whole_rows(self, qkvz_TBX: Tensor, beta_alpha_TBX: Tensor, packing: Packing | None) -> Tensor:
        """Mix whole rows: the steps of `_mix_from_state`, fused where the kernel is qualified. Returns: [T,B,Hv·V]."""
        rule = self._observed(partial(self._rule(), output_final_state=False))
        return delta_mixer(
            qkvz_TBX, beta_alpha_TBX, self.delta_weights(), self.heads, rule, packing, fused=bool(self.plan.fused_mixer)
        )

    def _mix_by_all_to_all(self, qkvz_SBX: Tensor, beta_alpha_SBX: Tensor, packing: Packing | None) -> Tensor:
        """Context parallelism over heads: all-to-all to whole rows of a share of the heads, and back."""
        gates = (self.tp_heads.value_heads,) * 2
        rows = []
        for x, sections in ((qkvz_SBX, tuple(self.tp_heads.sections)), (beta_alpha_SBX, gates)):
            order = _build_head_perm_for_split_sections(sections, self.cp_group.size(), torch.cuda.current_device())
            rows.append(heads_for_sequence(x.index_select(-1, order), packing, self.cp_group))
        gated = self._mix_whole_rows(rows[0], rows[1], packing)
        return sequence_for_heads(gated, packing, self.cp_group)

    def _mix_chunks(self, qkvz_SBX: Tensor, beta_alpha_SBX: Tensor, packing: Packing | None) -> Tensor:
        """Context parallelism over the sequence: every rank keeps its chunks and all its heads.

        The convolution's last inputs and the delta state before each chunk are computed from what the ranks exchange
        about their chunks (model/context_parallel.py).
        """
        local, rows = qkvz_SBX.shape[:2]
        chunks = chunks_of_rank(packing, rows, local, self.cp_group.size(), qkvz_SBX.device)
        qkvz, beta_alpha = (x.transpose(0, 1).reshape(1, rows * local, -1) for x in (qkvz_SBX, beta_alpha_SBX))
        qkv, weights = qkvz[..., : sum(self.heads.sections[:3])], self.delta_weights()
        halo = inputs_before_chunks(qkv, self.conv_kernel_size, chunks, self.cp_group)
        _, z, (q, k, v, g, beta) = delta_rule_inputs(qkvz, beta_alpha, weights, self.heads, halo, chunks)
        rule = partial(self._rule(), packing=chunks)
        states = states_before_chunks(rule, [q, k, v, g, beta], self.cp_group)
        o, _ = self._observed(rule)(q, k, v, g, beta, initial_state_DHKV=states)
        gated = gated_rms_norm(o, z, weights.norm_V, self.heads.eps)
        return gated.flatten(2).view(rows, local, -1).transpose(0, 1).contiguous()

    def _rule(self) -> Rule:
        """Return the plan's delta rule."""
        rule = fused_gated_delta_rule if self.plan.delta_rule else chunk_gated_delta_rule
        return partial(rule, chunk_size=self.chunk_size)

    def _observed(self, rule: Rule) -> Rule:
        """Return the rule, wrapped by its probe where there is one."""
        return self.config.pass_state.observed(rule, self)

    def delta_weights(self) -> DeltaWeights:
        """Return the convolution, A_log, dt_bias and output norm of `heads`."""
        conv, a_log, dt_bias = self.conv1d.weight, self.A_log, self.dt_bias
        if self.plan.context_parallel == "all_to_all":
            sections = self.tp_heads.sections[:3]
            conv = get_parameter_local_cp(conv, 0, self.cp_group, split_sections=sections)
            a_log, dt_bias = (get_parameter_local_cp(p, 0, self.cp_group) for p in (a_log, dt_bias))
        return DeltaWeights(conv.squeeze(1), a_log, dt_bias, self.out_norm.weight)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None, **_: object
    ) -> dict[str, Any]:
        """Describe the parameters to dist_checkpointing.

        q, k, v, z (and β, α) are separate sections, so that a checkpoint can be resharded to another tensor-parallel
        size.
        """
        sharded = sharded_parameters(
            self, prefix, sharded_offsets, metadata, self.tp_group, {"A_log": 0, "dt_bias": 0, "conv1d.weight": 0}
        )
        sections, names = self.tp_heads.sections, ["query", "key", "value", "z"]
        gates = (self.tp_heads.value_heads,) * 2
        shard_by_section(sharded, f"{prefix}in_proj.weight", sections, names)
        shard_by_section(sharded, f"{prefix}beta_alpha_proj.weight", gates, ["beta", "alpha"])
        shard_by_section(sharded, f"{prefix}conv1d.weight", sections[:3], names[:3])
        return sharded


class _ConvWeight(nn.Module):
    """Depthwise convolution's weight under its published name, `conv1d.weight`."""

    def __init__(self, num_channels: int, kernel_size: int, dtype: torch.dtype, device: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels, 1, kernel_size, dtype=dtype, device=device))
