"""One forward pass and its loss, as megatron-core's pipeline schedules want them.

Losses are sums over unmasked tokens here; finalize_model_grads divides every gradient by the global
batch's token count. So a mean is a mean over tokens, whatever the micro-batches, ranks and masks.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_q3n.data.batch import Batch
from megatron_q3n.model.context_parallel import slice_for_rank


def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    """Run one micro-batch.

    Returns: per-token losses [B,T] (hidden states on earlier pipeline stages), and the function that sums them.
    """
    batch = next(batches).to(torch.cuda.current_device())
    packing = packed_params(batch)
    tensors = {
        "tokens": batch.tokens_BT,
        "labels": batch.labels_BT,
        "loss_mask": batch.loss_mask_BT,
        "position_ids": batch.position_ids_BT,
    }
    tensors = slice_for_rank(tensors, batch.cu_seqlens, model.module.pg_collection.cp)
    output = model(
        tensors["tokens"],
        tensors["position_ids"],
        None,
        labels=tensors["labels"],
        loss_mask=tensors["loss_mask"],
        packed_seq_params=packing,
    )
    return output, partial(sum_losses, tensors["loss_mask"])


def sum_losses(loss_mask_BT: Tensor, losses_BT: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the losses of unmasked tokens.

    Returns: the sum, the token count (int), and both as a report [2].
    """
    mask = loss_mask_BT.reshape(-1).float()
    total = (losses_BT.float().reshape(-1) * mask).sum()
    count = mask.sum()
    return total, count.to(torch.int), {"lm": torch.stack([total.detach(), count])}


def packed_params(batch: Batch) -> PackedSeqParams | None:
    """Return megatron-core's description of the documents in a packed batch."""
    if batch.cu_seqlens is None:
        return None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )


def reduce_losses(reports: list[dict[str, Tensor]], parallel: Any) -> tuple[float, float]:
    """Add up the micro-batches' reports over all ranks.

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
