"""The multi-token prediction layer repeated over depths, in training exactly as it drafts.

What decoding does for the newest token (`model/decode/forward.py`), this does for every token t of a batch at once,
the *anchors*. Depth 1 reads the trunk's state at t beside the embedding of token t+1 and predicts
token t+2: its keys and values, of every t, are all that deeper drafts will ever see of the text.
Depth k reads its own output of depth k-1 beside the embedding of the token it drafted there, stands
at position t+k-1 (RoPE too), and sees

    depth-1 keys and values of positions ≤ t, and those of this anchor's own depths 2 … k.

So one attention serves all anchors of a depth: the keys of the depths stand one behind the other,
and the mask is a triangle followed by k-1 diagonals. It is made in memory, k·T² bytes: 64 MiB for
depth 4 at 4K tokens, 4 GiB at 32K. megatron-core's own multi-step training gives
depth k the keys of depth k-1 at *all* positions, of true tokens: something drafting never has.

Which tokens are fed, and the losses: draft_losses.py.

Context parallelism: depth-1 keys and values are gathered, those of drafts stay with their anchors.

Shapes: S anchors of this rank, T tokens of the whole row, B rows, X hidden size, H heads, D head dim.
With sequence parallelism hidden states are a rank's share of S.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock
from torch import Tensor

from megatron_q3n.model.attention.core import visible_keys
from megatron_q3n.model.decode.attention import Rotary


class DraftingMTP(MultiTokenPredictionBlock):
    """megatron-core's block, same weights and names; except in stock training it leaves a chain to run with the loss.

    Drafts depend on logits, which only the loss makes; so `forward` hands the trunk's states on
    unchanged, and `process_mtp_loss` finds `config.mtp_losses.chain`, which costs nothing until run.
    """

    rotary: Any  # the model's RotaryEmbedding, set once built: it has no parameters

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: Any = None,
        embedding: Any = None,
        **options: Any,
    ) -> Tensor:
        """Run the layers as megatron-core does, or leave a chain for the loss."""
        ledger = self.config.mtp_losses
        if ledger.settings.method == "stock" and self.training:
            return super().forward(
                input_ids=input_ids,
                position_ids=position_ids,
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                packed_seq_params=packed_seq_params,
                embedding=embedding,
                **options,
            )
        cu_seqlens = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q
        ledger.chain = DraftChain(
            self.layers[0], self.rotary, embedding, input_ids, position_ids, cu_seqlens, self.cp_group
        )
        return hidden_states


class DraftChain:
    """One micro-batch's drafts at every anchor, depth after depth."""

    def __init__(
        self,
        layer: Any,
        rotary: Any,
        embedding: Any,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        cu_seqlens: Tensor | None,
        cp_group: Any,
    ) -> None:
        self.tokens_BS, self.positions_BS = tokens_BS, positions_BS
        self._layer, self._rotary, self._embedding = layer, rotary, embedding
        self._cu_seqlens, self._cp_group = cu_seqlens, cp_group
        self._seen: list[Tensor] = []  # keys and values by turns, of each depth so far

    def advance(self, hidden_SBX: Tensor, next_tokens_BS: Tensor) -> Tensor:
        """Take every anchor one depth further.

        Shapes: hidden [S,B,X], the trunk's at first, then the last depth's; next tokens [B,S], the
            token after each anchor's present position.
        Returns: hidden [S,B,X], whose logits are for the token after the next.
        """
        config = self._layer.config
        embedded = self._embedding(input_ids=next_tokens_BS, position_ids=self.positions_BS)
        if config.mtp_detach_heads:
            embedded = embedded.detach()
        if config.recompute_granularity == "full" and torch.is_grad_enabled():
            inputs = (hidden_SBX, embedded, *self._seen)
            out, key, value = tensor_parallel.checkpoint(self._run, False, *inputs)
        else:
            out, key, value = self._run(hidden_SBX, embedded, *self._seen)
        self._seen += [key, value]
        return out

    def _run(self, hidden: Tensor, embedded: Tensor, *seen: Tensor) -> tuple[Tensor, ...]:
        config = self._layer.config
        with get_fp8_context(config) if config.fp8 else nullcontext():
            hidden = self._layer._concat_embeddings(hidden, embedded)
            mixer, experts = self._layer.mtp_model_layer.layers
            hidden, key, value = self._mix(mixer, hidden, seen)
            hidden = experts(hidden_states=hidden, attention_mask=None)[0]
        return self._layer._postprocess(hidden), key, value

    def _mix(self, layer: Any, hidden: Tensor, seen: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Run the attention sublayer. Returns: hidden; this depth's keys [·,B,Hkv,D] and values."""
        mixer, normed = layer.self_attention, layer.input_layernorm(hidden)
        residual = hidden.float() if layer.config.fp32_residual_connection else hidden
        gated = mixer.config.attention_output_gate
        query, key, value, *gate = mixer.get_query_key_value_tensors(normed, output_gate=gated)
        heads = [query.shape[2], key.shape[2]]
        positions = self.positions_BS.transpose(0, 1) + len(seen) // 2
        rotary = Rotary.at(positions, self._rotary, query.dtype)
        query, key = rotary.turn(torch.cat([query, key], 2)).split(heads, 2)
        if not seen and self._cp_group.size() > 1:
            key, value = (
                gather_from_sequence_parallel_region(x.contiguous(), group=self._cp_group) for x in (key, value)
            )
        scale = mixer.config.softmax_scale or mixer.hidden_size_per_attention_head**-0.5
        mask = self._mask(query.shape[0], len(seen) // 2, query.device)
        keys, values = torch.cat([*seen[::2], key]), torch.cat([*seen[1::2], value])
        attend = partial(_attend, mask=mask, scale=scale)
        if mixer.checkpoint_core_attention and torch.is_grad_enabled():
            core = tensor_parallel.checkpoint(attend, False, query, keys, values)
        else:
            core = attend(query, keys, values)
        if gated:
            core = mixer._apply_output_gate(core, gate[0])
        mixed = mixer.linear_proj(core)[0]
        return (layer.self_attn_bda(self._layer.training, False)((mixed, None), residual, 0.0), key, value)

    def _mask(self, local: int, num_own: int, device: torch.device) -> Tensor | None:
        """Return what each anchor sees, [S, T + num_own·S]: the prefix, then its own drafts."""
        prefix = visible_keys(self._cu_seqlens, local, self._cp_group, device)
        if not num_own:
            return prefix
        if prefix is None:
            prefix = torch.ones(local, local, dtype=torch.bool, device=device).tril()
        own = torch.eye(local, dtype=torch.bool, device=device)
        return torch.cat([prefix, own.repeat(1, num_own)], 1)


def _attend(query_SBHD: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return softmax attention [S, B, H·D]; keys and values [·,B,Hkv,D], fewer heads than queries."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query_SBHD, key, value))
    if q.is_cuda and mask is not None:  # torch's fused kernels take a mask or grouped heads, not both
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.permute(2, 0, 1, 3).flatten(2)
