"""Core attention for the torch backend: causal, with grouped queries, packing, context parallelism, sliding windows.

Everything around it (projections, QK-norm, partial RoPE, the sigmoid output gate of arXiv 2505.06708) is
megatron-core's SelfAttention. Its own torch core, DotProductAttention, refuses both packing and context parallelism.

With context parallelism, keys and values are all-gathered and queries stay on their ranks.

Shapes: T tokens of a whole row, S tokens of a rank, B rows, h query heads, kv key/value heads, d head dim.
"""

import math

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_q3n.model.context_parallel import zigzag_indices
from megatron_q3n.model.packed_params import packing_of
from megatron_q3n.packing import Packing


class TorchCausalAttention(nn.Module):
    """softmax(q kᵀ · scale, causal) v, for megatron-core's `core_attention` slot."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        pg_collection: ProcessGroupCollection,
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
        """Attend causally, within documents when packed, and within the layer's window; `attention_mask` is unused.

        Shapes: query [S,B,h,d], key and value [S,B,kv,d]; packed: [S,h,d] and [S,kv,d].
        Returns: [S,B,h·d]; packed: [S,h·d].
        """
        assert attention_bias is None
        packing = packing_of(packed_seq_params)
        if packing is not None:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        mask = visible_keys(packing, query.shape[0], self.cp_group, query.device, self.window_tokens)
        if self.cp_group.size() > 1:
            key = gather_from_sequence_parallel_region(key, group=self.cp_group)
            value = gather_from_sequence_parallel_region(value, group=self.cp_group)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        out = out.permute(2, 0, 1, 3).flatten(2)
        return out if packing is None else out.squeeze(1)


def window_tokens(config: TransformerConfig) -> int | None:
    """Return the size of a layer's sliding window in tokens, the current one included; None without a window."""
    return None if config.window_size is None else config.window_size[0] + 1


def visible_keys(
    packing: Packing | None, local: int, group: ProcessGroup, device: torch.device, window: int | None = None
) -> Tensor | None:
    """Return the attention mask of `local` queries over the keys gathered from context-parallel ranks.

    Returns: bool [S,T], true where a query attends to a key, S = T / ranks; None for plain causal attention.
    """
    size, rank = group.size(), group.rank()
    if size == 1 and packing is None and window is None:
        return None
    if size > 1:
        by_rank = zigzag_indices(packing, size * local, size, device)
    else:
        by_rank = torch.arange(local, device=device)[None]
    keys_T, queries_S = by_rank.flatten(), by_rank[rank]
    mask = keys_T[None, :] <= queries_S[:, None]
    if window is not None:
        mask &= keys_T[None, :] > queries_S[:, None] - window
    if packing is not None:
        document = packing.document_T
        mask &= document[keys_T][None, :] == document[queries_S][:, None]
    return mask
