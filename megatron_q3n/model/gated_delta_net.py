"""Gated DeltaNet as a megatron-core token mixer (Gated Delta Networks, arXiv 2412.06464; Qwen3-Next's dimensions).

hidden -> [q | k | v | z] and [β | α] -> causal conv + SiLU over q|k|v -> L2-norm of q and k -> gated delta rule
       -> RMSNorm(o) · SiLU(z) -> out_proj

Ours rather than megatron-core's GatedDeltaNet because that one has no packing without Triton, no
state in or out, A_log in bf16, q and k repeated in memory, and β/α inside the projection that FP8
quantises. What is fixed here, and checkpoints depend on: the parameter names and shapes below.

| parameter | shape | kept in |
|---|---|---|
| in_proj.weight | [2·Hk·K + 2·Hv·V, H] rows q, k, v, z | the compute format, FP8 allowed |
| beta_alpha_proj.weight | [2·Hv, H] rows β, α | bf16/fp32, never FP8: 64 columns that decide what is remembered |
| conv1d.weight | [2·Hk·K + Hv·V, 1, taps] channels q, k, v | the compute format |
| A_log, dt_bias | [Hv] | fp32 always: bf16 here makes training and inference disagree |
| out_norm.weight | [V], zero-centered | fp32 always |
| out_proj.weight | [H, Hv·V] | the compute format, FP8 allowed |

Tensor parallel: whole heads per rank. Context parallel, by `parallel.linear_context_parallel`:
all_to_all trades sequence for heads around the mixer (TP × CP must divide the key heads);
state_passing keeps heads and sequence where they are and passes states along (TP must).

B batch, T tokens, Hk key heads, Hv value heads, K/V head dims, D documents.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.gated_delta_net.common import _build_head_perm_for_split_sections, get_parameter_local_cp
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from megatron_q3n.kernels.gated_delta import backend as delta_rule_backend
from megatron_q3n.kernels.gated_delta.causal_conv import next_conv_state
from megatron_q3n.kernels.gated_delta.mixer import DeltaHeads, DeltaWeights, delta_mixer, delta_rule_inputs
from megatron_q3n.kernels.norms import gated_rms_norm
from megatron_q3n.model.context_parallel import (
    heads_for_sequence,
    inputs_before_chunks,
    local_segments,
    sequence_for_heads,
    states_before_chunks,
)
from megatron_q3n.model.norms import ZeroCenteredRMSNorm
from megatron_q3n.model.sharding import shard_by_section, sharded_parameters


@dataclass
class GatedDeltaNetSubmodules:
    """The linear classes of a backend."""

    in_proj: ModuleSpec | type
    beta_alpha_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


@dataclass
class GatedDeltaNetState:
    """What a sequence carries from one call to the next: constant in its length.

    Shapes: conv [D, channels, taps-1], the last raw inputs; delta [D,Hv,K,V] fp32; channels and heads of this rank.
    """

    conv: Tensor
    delta: Tensor


class GatedDeltaNet(MegatronModule):
    """The mixer. `forward` is what megatron-core calls; `mix` also takes and returns state.

    It has two `readers` of its input: the large projection and β's and α's.
    """

    readers = 2

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int,
        pg_collection: Any,
        chunk_size: int = 64,
        time_step_init: tuple[float, float] | None = None,
        recompute: bool = False,
        passes_state: bool = False,
        name: str | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self.layer_number, self.chunk_size, self.recompute = layer_number, chunk_size, recompute
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        tp, cp = self.tp_group.size(), self.cp_group.size()
        self.passes_state = passes_state and cp > 1
        # `heard(rule)` sees what a forward pass puts into the rule, and its states
        self.tape: Any = None
        self.key_head_dim = config.linear_key_head_dim
        self.value_head_dim = config.linear_value_head_dim
        self.taps = config.linear_conv_kernel_dim
        key_dim = config.linear_num_key_heads * self.key_head_dim
        value_dim = config.linear_num_value_heads * self.value_head_dim
        self.value_heads = config.linear_num_value_heads // tp
        self.key_dim, self.value_dim = key_dim // tp, value_dim // tp
        self.qkvz_sections = (self.key_dim, self.key_dim, self.value_dim, self.value_dim)
        spread = tp if passes_state else tp * cp
        assert config.linear_num_key_heads % spread == 0, "the configuration refuses this"

        def linear(spec: ModuleSpec | type, inputs: int, outputs: int, part: str, **options: Any) -> nn.Module:
            return build_module(
                spec,
                inputs,
                outputs,
                config=config,
                bias=False,
                is_expert=False,
                tp_group=self.tp_group,
                name=f"{name}.{part}" if name else None,
                **options,
            )

        column = {"init_method": config.init_method, "gather_output": False, "skip_bias_add": False}
        hidden = config.hidden_size
        self.in_proj = linear(
            submodules.in_proj, hidden, 2 * key_dim + 2 * value_dim, "in_proj", **column, tp_comm_buffer_name="gdn_in"
        )
        self.beta_alpha_proj = linear(
            submodules.beta_alpha_proj, hidden, 2 * config.linear_num_value_heads, "beta_alpha_proj", **column
        )
        self._make_vectors(config, time_step_init)
        # published as 1 + weight: in bf16 the difference would lose bits
        self.out_norm = ZeroCenteredRMSNorm(config, self.value_head_dim, config.layernorm_epsilon, dtype=torch.float32)
        self.out_proj = linear(
            submodules.out_proj,
            value_dim,
            hidden,
            "out_proj",
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="gdn_out",
        )

    def _make_vectors(self, config: TransformerConfig, time_step_init: tuple[float, float] | None) -> None:
        """Make and initialise the convolution, A_log and dt_bias, inside the tensor-parallel RNG."""
        device = torch.cuda.current_device()
        channels = 2 * self.key_dim + self.value_dim
        self.conv1d = _ConvWeight(channels, self.taps, config.params_dtype, device)
        self.A_log = nn.Parameter(torch.empty(self.value_heads, dtype=torch.float32, device=device))
        self.dt_bias = nn.Parameter(torch.ones(self.value_heads, dtype=torch.float32, device=device))
        for parameter in (self.conv1d.weight, self.A_log, self.dt_bias):
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(), torch.no_grad():
                bound = self.taps**-0.5  # torch's default for a depthwise convolution with this fan-in
                self.conv1d.weight.uniform_(-bound, bound)
                # A ~ U(0, 16) as the released model's code; away from 0, whose log is -inf
                self.A_log.uniform_(1e-4, 16).log_()
                if time_step_init is not None:
                    shortest, longest = time_step_init
                    step_H = self.dt_bias.uniform_(math.log(shortest), math.log(longest)).exp_()
                    step_H.add_(torch.log(-torch.expm1(-step_H)))  # softplus(dt_bias) is the step

    def forward(
        self,
        hidden_states: Tensor | tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """Mix tokens from a zero state.

        Shapes: hidden [T / (TP·CP) , B, H] in (sequence parallel, zigzag context parallel) order, or a pair of names
            for it, one for each reader; the same out.
        Returns: (output, None): there is no bias.
        """
        assert inference_context is None, "decode goes through `mix`, which carries state"
        cu_seqlens = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q
        return self.mix(hidden_states, cu_seqlens=cu_seqlens)[0], None

    def mix(
        self,
        hidden_SBH: Tensor | tuple[Tensor, Tensor],
        state: GatedDeltaNetState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, GatedDeltaNetState | None]:
        """Mix tokens, continuing from `state` (one row per sequence or packed document) where given.

        Returns: the output, shaped like the input, and the new state if asked for.
        """
        large, small = hidden_SBH if isinstance(hidden_SBH, tuple) else (hidden_SBH, hidden_SBH)
        qkvz, _ = self.in_proj(large)
        beta_alpha, _ = self.beta_alpha_proj(small)
        if self.recompute and self.training:
            assert state is None
            assert not return_state
            core = tensor_parallel.checkpoint(
                lambda x, ba: self._core(x, ba, None, cu_seqlens, False)[0], False, qkvz, beta_alpha
            )
            new_state = None
        else:
            core, new_state = self._core(qkvz, beta_alpha, state, cu_seqlens, return_state)
        output, _ = self.out_proj(core)
        return output, new_state

    def _core(
        self,
        qkvz_TBX: Tensor,
        beta_alpha_TBX: Tensor,
        state: GatedDeltaNetState | None,
        cu_seqlens: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, GatedDeltaNetState | None]:
        """Everything between the projections, however the sequence is spread over ranks."""
        if state is not None or return_state:
            assert self.cp_group.size() == 1
            return self._mix_from_state(qkvz_TBX, beta_alpha_TBX, state, cu_seqlens, return_state)
        if self.cp_group.size() == 1:
            return self._mix_rows(qkvz_TBX, beta_alpha_TBX, cu_seqlens), None
        if self.passes_state:
            return self._mix_chunks(qkvz_TBX, beta_alpha_TBX, cu_seqlens), None
        return self._mix_heads(qkvz_TBX, beta_alpha_TBX, cu_seqlens), None

    def _mix_rows(self, qkvz_TBX: Tensor, beta_alpha_TBX: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Mix rows that are whole, from zero states. Returns [T,B,Hv·V] gated and normed."""
        rule = partial(delta_rule_backend.gated_delta_rule, chunk_size=self.chunk_size, output_final_state=False)
        return delta_mixer(
            qkvz_TBX, beta_alpha_TBX, self._local_weights(), self._heads(), self._heard(rule), cu_seqlens
        )

    def _mix_from_state(
        self,
        qkvz_TBX: Tensor,
        beta_alpha_TBX: Tensor,
        state: GatedDeltaNetState | None,
        cu_seqlens: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, GatedDeltaNetState | None]:
        """Continue `state` (zero where None) and hand on the new one if asked."""
        conv_state, delta_state = (None, None) if state is None else (state.conv, state.delta)
        qkv, z, inputs = delta_rule_inputs(
            qkvz_TBX.transpose(0, 1),
            beta_alpha_TBX.transpose(0, 1),
            self._local_weights(),
            self._heads(),
            conv_state,
            cu_seqlens,
        )
        output, delta = delta_rule_backend.gated_delta_rule(
            *inputs, initial_state_DHKV=delta_state, cu_seqlens=cu_seqlens, chunk_size=self.chunk_size
        )
        gated = gated_rms_norm(output, z, self.out_norm.weight, self.config.layernorm_epsilon)
        new_state = None
        if return_state:
            conv = next_conv_state(qkv, self.taps, initial_state_DCK=conv_state, cu_seqlens=cu_seqlens)
            assert delta is not None
            new_state = GatedDeltaNetState(conv, delta)
        return gated.flatten(2).transpose(0, 1).contiguous(), new_state

    def _mix_heads(self, qkvz_SBX: Tensor, beta_alpha_SBX: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Context parallelism by heads: all-to-all to whole rows of a share of the heads, and back."""
        rows = []
        for x, sections in ((qkvz_SBX, self.qkvz_sections), (beta_alpha_SBX, (self.value_heads,) * 2)):
            order = _build_head_perm_for_split_sections(sections, self.cp_group.size(), torch.cuda.current_device())
            rows.append(heads_for_sequence(x.index_select(-1, order), cu_seqlens, self.cp_group))
        gated = self._mix_rows(rows[0], rows[1], cu_seqlens)
        return sequence_for_heads(gated, cu_seqlens, self.cp_group)

    def _mix_chunks(self, qkvz_SBX: Tensor, beta_alpha_SBX: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Context parallelism along the sequence: every rank keeps its chunks and all its heads.

        What enters a chunk, the convolution's last inputs and the delta state, is worked out from
        what the ranks tell each other about theirs (model/context_parallel.py).
        """
        local, rows = qkvz_SBX.shape[:2]
        bounds = local_segments(cu_seqlens, rows, local, self.cp_group.size()).to(qkvz_SBX.device)
        qkvz, beta_alpha = (x.transpose(0, 1).reshape(1, rows * local, -1) for x in (qkvz_SBX, beta_alpha_SBX))
        qkv = qkvz[..., : sum(self.qkvz_sections[:3])]
        halo = inputs_before_chunks(qkv, self.taps, bounds, self.cp_group)
        _, z, inputs = delta_rule_inputs(qkvz, beta_alpha, self._local_weights(), self._heads(), halo, bounds)
        rule = partial(delta_rule_backend.gated_delta_rule, cu_seqlens=bounds, chunk_size=self.chunk_size)
        states = states_before_chunks(rule, inputs, self.cp_group)
        output, _ = self._heard(rule)(*inputs, initial_state_DHKV=states)
        gated = gated_rms_norm(output, z, self.out_norm.weight, self.config.layernorm_epsilon)
        return gated.flatten(2).view(rows, local, -1).transpose(0, 1).contiguous()

    def _heard(self, rule: delta_rule_backend.Rule) -> delta_rule_backend.Rule:
        return rule if self.tape is None else self.tape.heard(rule)

    def _heads(self) -> DeltaHeads:
        """The heads at hand: a share of them after an all-to-all."""
        share = 1 if self.passes_state else self.cp_group.size()
        return DeltaHeads(
            key_heads=self.key_dim // self.key_head_dim // share,
            value_heads=self.value_heads // share,
            key_dim=self.key_head_dim,
            value_dim=self.value_head_dim,
            eps=self.config.layernorm_epsilon,
        )

    def _local_weights(self) -> DeltaWeights:
        """The vectors of the heads at hand."""
        conv, a_log, dt_bias = self.conv1d.weight, self.A_log, self.dt_bias
        if self.cp_group.size() > 1 and not self.passes_state:
            sections = list(self.qkvz_sections[:3])
            conv = get_parameter_local_cp(conv, 0, self.cp_group, split_sections=sections)
            a_log, dt_bias = (get_parameter_local_cp(p, 0, self.cp_group) for p in (a_log, dt_bias))
        return DeltaWeights(conv.squeeze(1), a_log, dt_bias, self.out_norm.weight)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None, **_: object
    ) -> dict[str, Any]:
        """Describe the parameters to dist_checkpointing: q, k, v, z (and β, α) as sections of their
        own, so that a checkpoint can be cut anew for another tensor-parallel size."""
        sharded = sharded_parameters(
            self, prefix, sharded_offsets, metadata, self.tp_group, {"A_log": 0, "dt_bias": 0, "conv1d.weight": 0}
        )
        names = ["query", "key", "value", "z"]
        shard_by_section(sharded, f"{prefix}in_proj.weight", self.qkvz_sections, names)
        shard_by_section(sharded, f"{prefix}beta_alpha_proj.weight", (self.value_heads,) * 2, ["beta", "alpha"])
        shard_by_section(sharded, f"{prefix}conv1d.weight", self.qkvz_sections[:3], names[:3])
        return sharded


class _ConvWeight(nn.Module):
    """Holds the depthwise convolution's weight under its published name, `conv1d.weight`."""

    def __init__(self, channels: int, taps: int, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps, dtype=dtype, device=device))
