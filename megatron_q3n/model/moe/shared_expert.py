"""Shared expert: megatron-core's, with its activation and its gate in one kernel each."""

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from megatron_q3n.kernels.moe.shared_expert_gate import shared_expert_gate
from megatron_q3n.kernels.moe.swiglu import swiglu


class GatedSharedExpert(SharedExpertMLP):
    """SwiGLU expert applied to every token, times a sigmoid gate per token."""

    def forward(self, hidden_states: Tensor, for_gate: Tensor | None = None, add: Tensor | None = None) -> Tensor:
        """Return sigmoid(hidden · w) · expert(hidden), plus `add` if given, shaped like hidden.

        `for_gate` is an alias of hidden whose gradient is the gate's alone.
        """
        output = self._expert(hidden_states)
        if self.gate_weight is None:
            return output if add is None else output + add
        for_gate = hidden_states if for_gate is None else for_gate
        fused = bool(self.config.plan.moe.shared_expert_gate)
        return shared_expert_gate(output, for_gate, self.gate_weight, add, fused=fused)

    def _expert(self, hidden: Tensor) -> Tensor:
        if not self.config.plan.moe.shared_expert_swiglu:
            return MLP.forward(self, hidden)[0]
        gate_up, _ = self.linear_fc1(hidden)
        activated = swiglu(gate_up.flatten(0, -2), None, fused=True).view(*gate_up.shape[:-1], -1)
        return self.linear_fc2(activated)[0]
