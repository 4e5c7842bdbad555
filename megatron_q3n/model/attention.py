"""Core attention for the torch backend: causal softmax attention with grouped key/value heads,
packing and context parallelism.

Everything around it (projections, QK-norm, partial RoPE, the sigmoid output gate of arXiv
2505.06708) is megatron-core's
SelfAttention. megatron-core's own torch core, DotProductAttention, refuses both packing and context parallelism.

Context parallelism keeps megatron-core's zigzag order: rank r of n holds chunks r and 2n-1-r of 2n,
so that every rank has the same work under the causal mask. Keys and values are gathered; queries
stay.
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
        argument is unused: the
            mask is causal, within documents when packed.
        Returns: [T,B,h·d]; packed: [T,h·d].
        """
        assert attention_bias is None
        packed = packed_seq_params is not None
        if packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        mask = None
        if self.cp_group.size() > 1:
            assert not packed, "packing under context parallelism is refused by the configuration"
            key = gather_from_sequence_parallel_region(key, group=self.cp_group)
            value = gather_from_sequence_parallel_region(value, group=self.cp_group)
            mask = self._zigzag_mask(query.shape[0], query.device)
        elif packed_seq_params is not None:
            mask = _document_mask(packed_seq_params.cu_seqlens_q, query.shape[0])
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        out = out.permute(2, 0, 1, 3).flatten(2)
        return out.squeeze(1) if packed else out

    def _zigzag_mask(self, local: int, device: torch.device) -> Tensor:
        """Which gathered keys each local query may see, [local, n·local], both in zigzag order."""
        size, rank = self.cp_group.size(), self.cp_group.rank()
        chunks = torch.arange(size * local, device=device).view(2 * size, -1)
        position_of = [torch.cat([chunks[r], chunks[2 * size - 1 - r]]) for r in range(size)]
        return torch.cat(position_of)[None, :] <= position_of[rank][:, None]


def _document_mask(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Causal within each document, [T,T]."""
    index = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.bucketize(index, cu_seqlens[1:].long(), right=True)
    return (document[:, None] == document[None, :]) & (index[None, :] <= index[:, None])
