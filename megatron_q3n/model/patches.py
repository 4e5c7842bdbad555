"""Patches of megatron-core 0.19.2: names in its modules that `build_model` replaces.

| name | replaced by | because |
|---|---|---|
| `hybrid_block.TENorm` | the backend's norm | HybridStack reads the class of `final_norm` from its module (line 215) |
| `hybrid_model.process_mtp_loss` | `model/mtp/loss.py` | its loss is normalized per rank and micro-batch |
| `hybrid_model.MultiTokenPredictionBlock` | `model/mtp/draft_chain.py` | drafts need logits, which the loss computes |
| `multi_token_prediction.roll_tensor` | `model/context_parallel.py` | with CP it copies from the host |
| `random._get_all_rng_states` | no operation | for activation checkpointing it copies to the host |
| `random._set_all_rng_states` | no operation | it copies from the host |

What copies from the host cannot be captured in a CUDA graph. RNG states are left alone only where a model draws no
random numbers.

Nothing of the model is replaced at import. Methods of single objects are replaced where the objects are made: an
optimizer's `get_grad_norm` and `step_with_ready_grads` (training/guard.py, instruments/weights.py), its
`_set_main_param_and_optimizer_states` (training/optimizer.py), a buffer's `reset` (training/state.py).
Without a GPU, `device/cpu_shim.py` also replaces CUDA calls and the functions of
megatron-core that name CUDA; `select_device` installs it, since process groups and seeds need it before there is a
model.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from megatron.core.models.hybrid import hybrid_block, hybrid_model
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import random
from megatron.core.transformer import multi_token_prediction
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_q3n.model.context_parallel import shift_left
from megatron_q3n.model.mtp.draft_chain import DraftingMTP
from megatron_q3n.model.mtp.loss import process_mtp_loss
from megatron_q3n.model.protocols import Norm

_GET_RNG_STATES, _SET_RNG_STATES = random._get_all_rng_states, random._set_all_rng_states


# one entry for each model built in this process that draws random numbers
_models_that_draw: list[type[Norm]] = []


def patch_megatron(norm: type[Norm], *, keeps_rng: bool) -> None:
    """Apply the patches; repeated calls replace the same names.

    `norm` is the backend's class of norms; `keeps_rng` tells whether activation checkpointing saves RNG states, which
    it does as soon as one model of the process draws random numbers.
    """
    if keeps_rng:
        _models_that_draw.append(norm)
    keeps_rng = bool(_models_that_draw)
    hybrid_block.TENorm = norm
    hybrid_model.process_mtp_loss = process_mtp_loss
    hybrid_model.MultiTokenPredictionBlock = DraftingMTP
    multi_token_prediction.roll_tensor = _roll_tensor
    random._get_all_rng_states = _GET_RNG_STATES if keeps_rng else lambda: (None, None, None)
    random._set_all_rng_states = _SET_RNG_STATES if keeps_rng else lambda *_: None


def _roll_tensor(
    tensor: Tensor | None,
    shifts: int = -1,
    dims: int = -1,
    cp_group: ProcessGroup | None = None,
    packed_seq_params: PackedSeqParams | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the tensor shifted by one token and its sum, as megatron-core's function of this name."""
    if tensor is None:
        return None, None
    assert shifts == -1, "MTP shifts by one token"
    assert cp_group is not None, "MTP has its group"
    shifted = shift_left(tensor, dims, packed_seq_params, cp_group)
    return shifted, shifted.sum()


@contextmanager
def without_rng_forks() -> Iterator[None]:
    """Leave the RNG states of tensor-parallel ranks alone inside the context.

    megatron-core's embedding switches them around its dropout although that is 0, and a CUDA graph cannot capture it.
    Only for passes that draw no random numbers.
    """
    fork = random.CudaRNGStatesTracker.fork
    random.CudaRNGStatesTracker.fork = lambda *_, **__: nullcontext()
    try:
        yield
    finally:
        random.CudaRNGStatesTracker.fork = fork
