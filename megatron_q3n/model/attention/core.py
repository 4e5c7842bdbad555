"""Core attention for the torch backend: causal softmax attention with grouped key/value heads,
packing, context parallelism and sliding windows.

Everything around it (projections, QK-norm, partial RoPE, the sigmoid output gate of arXiv
2505.06708) is megatron-core's SelfAttention. megatron-core's own torch core, DotProductAttention,
refuses both packing and context parallelism.

Under context parallelism keys and values are gathered; queries stay where they are.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from megatron_q3n.model.context_parallel import zigzag_indices


class TorchCausalAttention(nn.Module):
    """softmax(q kᵀ · scale, causal) v, as megatron-core's `core_attention` slot wants it."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: object,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal
        assert attention_type == "self"
        assert config.attention_dropout == 0.0, "the architecture has no attention dropout"
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp
        self.window_tokens = window_tokens(config)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Shapes: query [T,B,h,d], key and value [T,B,kv,d]; packed: [T,h,d] and [T,kv,d]. The mask
            argument is unused: the mask is causal, within documents when packed, within the layer's window.
        Returns: [T,B,h·d]; packed: [T,h·d].
        """
        assert attention_bias is None
        cu_seqlens = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q
        if cu_seqlens is not None:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        mask = visible_keys(cu_seqlens, query.shape[0], self.cp_group, query.device, self.window_tokens)
        if self.cp_group.size() > 1:
            key = gather_from_sequence_parallel_region(key, group=self.cp_group)
            value = gather_from_sequence_parallel_region(value, group=self.cp_group)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        out = out.permute(2, 0, 1, 3).flatten(2)
        return out if cu_seqlens is None else out.squeeze(1)


def window_tokens(config: TransformerConfig) -> int | None:
    """Return how many tokens a layer of this configuration sees, the present one included; None for all."""
    return None if config.window_size is None else config.window_size[0] + 1


def visible_keys(
    cu_seqlens: Tensor | None, local: int, group: Any, device: torch.device, window: int | None = None
) -> Tensor | None:
    """Return which keys, gathered over context-parallel ranks, each local query may see; None for plain causal
    attention.

    Shapes: bool [S, T], S = T / ranks.
    """
    size, rank = group.size(), group.rank()
    if size == 1 and cu_seqlens is None and window is None:
        return None
    held = zigzag_indices(cu_seqlens, size * local, size) if size > 1 else torch.arange(local)[None]
    held = held.to(device)
    seen, asking = held.flatten(), held[rank]
    mask = seen[None, :] <= asking[:, None]
    if window is not None:
        mask &= seen[None, :] > asking[:, None] - window
    if cu_seqlens is not None:
        ends = cu_seqlens[1:].long().to(device)
        document = torch.bucketize(torch.arange(size * local, device=device), ends, right=True)
        mask &= document[seen][None, :] == document[asking][:, None]
    return mask
