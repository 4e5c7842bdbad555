"""Patches of megatron-core 0.19.2: names in its modules that `build_model` replaces.

| name | replaced by | because |
|---|---|---|
| `hybrid_block.TENorm` | the backend's norm | HybridStack reads the class of `final_norm` from its module (line 215) |
| `hybrid_model.process_mtp_loss` | `model/mtp/loss.py` | its loss is normalized per rank and micro-batch |
| `hybrid_model.MultiTokenPredictionBlock` | `model/mtp/draft_chain.py` | drafts need logits, which the loss computes |

Nothing of the model is replaced at import. Methods of single objects are replaced where the objects are made: an
optimizer's `get_grad_norm` and `step_with_ready_grads` (training/guard.py, instruments/weights.py), its
`_set_main_param_and_optimizer_states` (training/optimizer.py), a buffer's `reset` (training/state.py).
 Without a GPU, `device/cpu_shim.py` also replaces CUDA calls and the functions of
megatron-core that name CUDA; `select_device` installs it, since process groups and seeds need it before there is a
model.
"""

from megatron.core.models.hybrid import hybrid_block, hybrid_model

from megatron_q3n.model.mtp.draft_chain import DraftingMTP
from megatron_q3n.model.mtp.loss import process_mtp_loss
from megatron_q3n.model.protocols import Norm


def patch_megatron(norm: type[Norm]) -> None:
    """Apply the patches; `norm` is the backend's class of norms. Repeated calls replace the same names."""
    hybrid_block.TENorm = norm
    hybrid_model.process_mtp_loss = process_mtp_loss
    hybrid_model.MultiTokenPredictionBlock = DraftingMTP
