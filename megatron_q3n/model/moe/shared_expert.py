"""The shared expert: megatron-core's, with its activation and its gate in one kernel each."""

import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from megatron_q3n.kernels import registry
from megatron_q3n.kernels.moe import swiglu
from megatron_q3n.kernels.moe.shared_expert_gate import row_gate


class GatedSharedExpert(SharedExpertMLP):
    """SwiGLU expert for every token, times a gate of its own."""

    def forward(self, hidden_states: Tensor, for_gate: Tensor | None = None, add: Tensor | None = None) -> Tensor:
        """Return sigmoid(hidden · w) · expert(hidden), plus `add` where given, shaped like hidden.

        `for_gate` is hidden under another name, whose gradient comes from the gate alone.
        """
        output = self._expert(hidden_states)
        if self.gate_weight is None:
            return output if add is None else output + add
        for_gate = hidden_states if for_gate is None else for_gate
        return row_gate(output, for_gate, self.gate_weight, add)

    def _expert(self, hidden: Tensor) -> Tensor:
        config = self.config
        plain = config.gated_linear_unit and config.activation_func is F.silu
        plain &= config.activation_func_clamp_value is None and config.glu_linear_offset == 0.0
        plain &= not (config.add_bias_linear or config.use_te_activation_func)
        if not (plain and registry.is_fused(swiglu.OPERATION, hidden)):
            return MLP.forward(self, hidden)[0]
        gate_up, _ = self.linear_fc1(hidden)
        rows = gate_up.flatten(0, -2)
        made = swiglu.weighted_swiglu(rows, None).view(*gate_up.shape[:-1], -1)
        return self.linear_fc2(made)[0]
