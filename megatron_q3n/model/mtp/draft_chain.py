"""Draft chains: the multi-token prediction layer repeated over depths, in training exactly as in decoding.

Decoding drafts after the newest token (`model/decode/forward.py`); training drafts after every token t of a batch at
once, the *anchors*. Depth 1 gets the trunk's hidden state at t and the embedding of token t+1, and predicts token t+2.
Its keys and values, of every t, are all that deeper depths attend to of the text. Depth k gets its own output of depth
k-1 and the embedding of the token drafted there, at position t+k-1 (for RoPE too), and attends to

    depth-1 keys and values of positions ≤ t, and those of this anchor's own depths 2 … k.

So one attention serves all anchors of a depth: the keys of all depths are concatenated, and the mask is a causal
triangle followed by k-1 diagonals. The mask is materialized, k·T² bytes: 64 MiB for depth 4 at 4K tokens, 4 GiB at 32K.
In megatron-core's own multi-depth training, depth k attends to the keys of depth k-1 at *all* positions, of the text's
tokens, which do not exist when drafting.

Which tokens are fed (scheduled sampling, teacher forcing), and the losses: draft_losses.py.

Context parallelism: depth-1 keys and values are all-gathered, those of drafts stay with their anchors.

Shapes: S anchors of this rank, T tokens of the whole row, B rows, X hidden size, H heads, D head dim. With sequence
parallelism hidden states are sharded along S.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_q3n.model.attention.core import visible_keys
from megatron_q3n.model.packed_params import PackedParams, packing_of
from megatron_q3n.model.protocols import AttentionSublayer, MTPLayer
from megatron_q3n.model.rope import RopeAngles
from megatron_q3n.packing import Packing


class DraftingMTP(MultiTokenPredictionBlock):
    """megatron-core's MTP block with the same parameters; outside stock training it defers its layers to the loss.

    Drafts depend on logits, which exist only in the loss. So `forward` returns the trunk's states unchanged and stores
    a `DraftChain` in the PassState, which `process_mtp_loss` runs.
    """

    # the model's, set after it is built; it has no parameters
    rotary: RotaryEmbedding

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        embedding: Callable[..., Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """Run the layers as megatron-core does, or store a chain for the loss."""
        pass_state = self.config.pass_state
        if pass_state.mtp.settings.method == "stock" and self.training:
            return super().forward(
                input_ids=input_ids,
                position_ids=position_ids,
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                packed_seq_params=packed_seq_params,
                embedding=embedding,
                **options,
            )
        assert embedding is not None, "HybridModel passes its embedding"
        packing = packing_of(packed_seq_params)
        pass_state.draft_chain = DraftChain(
            self.layers[0], self.rotary, embedding, input_ids, position_ids, packing, self.cp_group
        )
        return hidden_states


class DraftChain:
    """Drafts of one micro-batch at every anchor, depth after depth."""

    def __init__(
        self,
        layer: MTPLayer,
        rotary: RotaryEmbedding,
        embedding: Callable[..., Tensor],
        tokens_BS: Tensor,
        positions_BS: Tensor,
        packing: Packing | None,
        cp_group: ProcessGroup,
    ) -> None:
        self.tokens_BS, self.positions_BS = tokens_BS, positions_BS
        self._layer, self._rotary, self._embedding = layer, rotary, embedding
        self._packing, self._cp_group = packing, cp_group
        # keys and values of the depths so far, alternating
        self._past_keys_values: list[Tensor] = []

    def advance(self, hidden_SBX: Tensor, next_tokens_BS: Tensor) -> Tensor:
        """Run the next depth at every anchor.

        Shapes: hidden [S,B,X], the trunk's at depth 1, then the previous depth's; next tokens [B,S], the token after
            each anchor's current position.
        Returns: hidden [S,B,X], whose logits predict the token after the next.
        """
        config = self._layer.config
        embedded = self._embedding(input_ids=next_tokens_BS, position_ids=self.positions_BS)
        if config.mtp_detach_heads:
            embedded = embedded.detach()
        # activation checkpointing (recompute)
        if config.recompute_granularity == "full" and torch.is_grad_enabled():
            inputs = (hidden_SBX, embedded, *self._past_keys_values)
            out, key, value = tensor_parallel.checkpoint(self._run, False, *inputs)
        else:
            out, key, value = self._run(hidden_SBX, embedded, *self._past_keys_values)
        self._past_keys_values += [key, value]
        return out

    def _run(self, hidden: Tensor, embedded: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        config = self._layer.config
        with get_fp8_context(config) if config.fp8 else nullcontext():
            hidden = self._layer._concat_embeddings(hidden, embedded)
            mixer, experts = self._layer.mtp_model_layer.layers
            hidden, key, value = self._run_attention(mixer, hidden, past)
            packed = None if self._packing is None else PackedParams.of(self._packing)
            hidden = experts(hidden_states=hidden, attention_mask=None, packed_seq_params=packed)[0]
        return self._layer._postprocess(hidden), key, value

    def _run_attention(
        self, layer: AttentionSublayer, hidden: Tensor, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the attention sublayer. Returns: hidden; this depth's keys [·,B,Hkv,D] and values."""
        mixer, normed = layer.self_attention, layer.input_layernorm(hidden)
        residual = hidden.float() if layer.config.fp32_residual_connection else hidden
        is_gated = mixer.config.attention_output_gate
        query, key, value, *gate = mixer.get_query_key_value_tensors(normed, output_gate=is_gated)
        heads = [query.shape[2], key.shape[2]]
        positions = self.positions_BS.transpose(0, 1) + len(past) // 2
        rope = RopeAngles.at(positions, self._rotary, query.dtype)
        query, key = rope.apply(torch.cat([query, key], 2)).split(heads, 2)
        if not past and self._cp_group.size() > 1:
            key, value = (
                gather_from_sequence_parallel_region(x.contiguous(), group=self._cp_group) for x in (key, value)
            )
        scale = mixer.config.softmax_scale or mixer.hidden_size_per_attention_head**-0.5
        mask = self._mask(query.shape[0], len(past) // 2, query.device)
        keys, values = torch.cat([*past[::2], key]), torch.cat([*past[1::2], value])
        repeats_kv = not mixer.config.plan.gated_attention.masked_gqa
        attend = partial(_attend, mask=mask, scale=scale, repeats_kv=repeats_kv)
        if mixer.checkpoint_core_attention and torch.is_grad_enabled():
            core = tensor_parallel.checkpoint(attend, False, query, keys, values)
        else:
            core = attend(query, keys, values)
        if is_gated:
            core = mixer._apply_output_gate(core, gate[0])
        mixed = mixer.linear_proj(core)[0]
        return (layer.self_attn_bda(self._layer.training, False)((mixed, None), residual, 0.0), key, value)

    def _mask(self, num_local: int, num_draft_depths: int, device: torch.device) -> Tensor | None:
        """Return which keys each anchor attends to, [S, T + num_draft_depths·S]: the prefix, then its own drafts."""
        prefix = visible_keys(self._packing, num_local, self._cp_group, device)
        if not num_draft_depths:
            return prefix
        if prefix is None:
            prefix = torch.ones(num_local, num_local, dtype=torch.bool, device=device).tril()
        diagonal = torch.eye(num_local, dtype=torch.bool, device=device)
        return torch.cat([prefix, diagonal.repeat(1, num_draft_depths)], 1)


def _attend(
    query_SBHD: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, repeats_kv: bool
) -> Tensor:
    """Return softmax attention [S,B,H·D]; keys and values [·,B,Hkv,D] have fewer heads than queries."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query_SBHD, key, value))
    # torch's fused kernels support a mask or grouped heads, not both
    if repeats_kv and mask is not None:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.permute(2, 0, 1, 3).flatten(2)
