"""The shared expert: megatron-core's, with its gate in one kernel."""

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from megatron_q3n.kernels.row_gate import row_gate


class GatedSharedExpert(SharedExpertMLP):
    """SwiGLU expert for every token, times a gate of its own."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return sigmoid(hidden · w) · expert(hidden), shaped like hidden."""
        output, _ = MLP.forward(self, hidden_states)
        if self.gate_weight is None:
            return output
        return row_gate(output, hidden_states, self.gate_weight)
