"""Forward step and loss of a micro-batch, for megatron-core's pipeline schedules; normalization of losses.

**Normalization.** The training loss is the mean over the N unmasked tokens of the global batch, however they are spread
over micro-batches, ranks and masks.

1. The loss of a micro-batch is a *sum* over its unmasked tokens (`sum_losses`). With `calculate_per_token_loss`,
   megatron-core divides it by nothing, neither tokens nor micro-batches nor data-parallel ranks.
2. Before the passes, `train_step` counts N over all micro-batches and data-parallel ranks and writes 1/N to
   `TrainState.loss_scale`. megatron-core multiplies the loss by it where the backward pass begins (`grad_scale_func`),
   and the gradients of the auxiliary losses (MTP, load balancing) by the same factor. So the loss is pre-scaled by
   1/num_tokens, and gradients that are summed over micro-batches and ranks are those of the mean.
3. `finalize_model_grads` gets None for the number of tokens (`training/state.py`) and divides nothing; it only reduces.
   That saves a pass over the fp32 gradients, 8 bytes of memory traffic per parameter.
4. MTP depth k predicts M_k <= N unmasked tokens. Its summed loss is weighted by N / M_k (`MTPLosses.set_ratios`), so
   that with the factor 1/N a mean over its own tokens remains.

Reported losses are the same sums, reduced over all ranks and divided by the same counts (`reduce_losses`).

Shapes: B sequences, T tokens.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_q3n.data.batch import Batch
from megatron_q3n.model.context_parallel import slice_for_rank
from megatron_q3n.model.packed_params import PackedParams


def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    """Run the forward pass of one micro-batch.

    Returns: per-token losses [B, T] (hidden states on earlier pipeline stages), and the function that sums them.
    """
    batch = next(batches).to(torch.cuda.current_device())
    packed = None if batch.packing is None else PackedParams.of(batch.packing)
    tensors = {
        "tokens": batch.tokens_BT,
        "labels": batch.labels_BT,
        "loss_mask": batch.loss_mask_BT,
        "position_ids": batch.position_ids_BT,
    }
    tensors = slice_for_rank(tensors, batch.packing, model.module.pg_collection.cp)
    output = model(
        tensors["tokens"],
        tensors["position_ids"],
        None,
        labels=tensors["labels"],
        loss_mask=tensors["loss_mask"],
        packed_seq_params=packed,
    )
    return output, partial(sum_losses, tensors["loss_mask"])


def sum_losses(loss_mask_BT: Tensor, losses_BT: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the losses over unmasked tokens.

    Returns: the sum in nats, the number of tokens (int), and both as a report [2].
    """
    mask = loss_mask_BT.reshape(-1).float()
    total = (losses_BT.float().reshape(-1) * mask).sum()
    count = mask.sum()
    return total, count.to(torch.int), {"lm": torch.stack([total.detach(), count])}


def reduce_losses(reports: list[dict[str, Tensor]], parallel: Any) -> tuple[float, float]:
    """Sum the micro-batches' reports over all ranks. A collective call.

    Returns: the summed loss in nats and the number of tokens, the same on every rank.
    """
    device = torch.cuda.current_device()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    if parallel.is_last_stage and reports:
        totals = torch.stack([report["lm"] for report in reports]).double().sum(0)
    if parallel.world_size > 1:
        groups = parallel.groups
        torch.distributed.all_reduce(totals, group=groups.dp_cp)
        if groups.pp.size() > 1:
            last = torch.distributed.get_process_group_ranks(groups.pp)[-1]
            torch.distributed.broadcast(totals, src=last, group=groups.pp)
    return totals[0].item(), totals[1].item()
