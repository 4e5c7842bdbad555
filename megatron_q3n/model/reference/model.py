"""Reference implementation of the whole architecture in plain torch, for reading and as the oracle of tests.

A language model reads tokens 0..t and predicts the distribution of token t+1. Between the embedding and the output
head, Qwen3-Next stacks layers of two sublayers, each of which adds its output to the residual stream:

1. A *token mixer* moves information between positions. Softmax attention retrieves every earlier token exactly, but its
   cost grows with the square of the length. A *Gated DeltaNet* has one small matrix per head, an associative memory of
   key -> value pairs, and updates it once per token: the cost grows linearly with the length, but old entries decay.
   Three layers of four are Gated DeltaNet, the fourth is attention, so most layers are cheap and every fourth has exact
   access to all tokens.
2. A *mixture of experts* processes each token separately. Of many small networks (512 in the 80B model) a router
   selects a few (10) per token, and one shared expert processes all tokens: the model has many parameters while a token
   uses few of them.

Further parts, for training quality:
- *Zero-centered RMSNorm*: the scale is 1 + weight, so weight decay pulls it to 1 and keeps it bounded; it would pull a
  plain scale to 0.
- *QK-norm, partial RoPE*: queries and keys are normalized per head, which bounds the attention scores. RoPE rotates the
  first quarter of a head by position; the rest compares content only.
- *Output gate*: softmax weights sum to 1 even where nothing is relevant, and models learn to put them on the first
  token (attention sink). With a sigmoid gate after it, a head can output zero instead.
- *Balance loss*: without it, a router overuses a few experts. E * sum_i f_i P_i (f_i the share of routed slots of
  expert i, P_i its mean probability) is 1 when all are used equally and larger otherwise. Its gradient flows through P
  only, as f is a count. It is computed over the whole batch, so that experts may specialize within a text (arXiv
  2501.11873).
- *Multi-token prediction* (MTP): one more layer takes the final state of position t and the embedding of token t+1, and
  predicts token t+2. This is an additional training signal, and a cheap draft model for speculative decoding
  (DeepSeek-V3, arXiv 2412.19437).

There are no kernels, no parallelism, no cache, no packing of documents, and nothing of `config.megatron`. The modules
of a layer are in `layers.py`. Names and layouts are the published checkpoint's; `megatron_q3n/hf/` maps them to
megatron-core's. Norms, gates, router, softmax and loss run in fp32, or fp64 in a double model.

Shape suffixes: B batch, T tokens of a sequence, H hidden, V vocabulary, E experts.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_q3n.config import GATED_ATTENTION, GATED_DELTA_NET, SLIDING_ATTENTION, ModelConfig, UserError
from megatron_q3n.model.reference.layers import (
    GatedAttention,
    GatedDeltaNet,
    GatedRMSNorm,
    MixtureOfExperts,
    Routing,
    ZeroCenteredRMSNorm,
    precise,
)


class DecoderLayer(nn.Module):
    """Token mixer and mixture of experts, each with a norm at its input.

    mixer: G for Gated DeltaNet, * for gated attention, S for gated attention with a sliding window.
    """

    def __init__(self, config: ModelConfig, mixer: str) -> None:
        super().__init__()
        self.mixer = mixer
        self.input_layernorm = _norm(config)
        if mixer == GATED_DELTA_NET:
            self.linear_attn = GatedDeltaNet(config)
        else:
            window = config.attention_window_tokens if mixer == SLIDING_ATTENTION else None
            self.self_attn = GatedAttention(config, window)
        self.post_attention_layernorm = _norm(config)
        self.mlp = MixtureOfExperts(config)

    def forward(self, hidden_BTH: Tensor) -> tuple[Tensor, Routing]:
        mix = self.linear_attn if self.mixer == GATED_DELTA_NET else self.self_attn
        hidden_BTH = hidden_BTH + mix(self.input_layernorm(hidden_BTH))
        output_BTH, routing = self.mlp(self.post_attention_layernorm(hidden_BTH))
        return hidden_BTH + output_BTH, routing


class Trunk(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, mixer) for mixer in config.mixers)
        self.norm = _norm(config)

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, list[Routing]]:
        hidden_BTH = self.embed_tokens(tokens_BT)
        routings = []
        for layer in self.layers:
            hidden_BTH, routing = layer(hidden_BTH)
            routings.append(routing)
        return self.norm(hidden_BTH), routings


class TokenPredictor(nn.Module):
    """One depth of multi-token prediction: its input and its prediction are one token further than before.

    The hidden input is the trunk's state *after* the final norm (at deeper depths, the output of the previous depth,
    after `norm`), although `pre_fc_norm_hidden` normalizes it again. This is what megatron-core's HybridModel does and
    what the released weights expect: vLLM's qwen3_next_mtp gets the output of Qwen3NextModel, which ends in its norm,
    and llama.cpp (pull request 24025) and LightLLM (1402) measured higher acceptance with it. DeepSeek-V3 differs here,
    and the wrong choice is visible only in the acceptance rate. The embedding comes first in the input of `fc`.

    Reference: DeepSeek-V3 (arXiv 2412.19437), eq. 21 to 23.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_fc_norm_embedding = _norm(config)
        self.pre_fc_norm_hidden = _norm(config)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([DecoderLayer(config, GATED_ATTENTION)])
        self.norm = _norm(config)

    def forward(self, embedding_BTH: Tensor, hidden_BTH: Tensor) -> tuple[Tensor, Routing]:
        both = (self.pre_fc_norm_embedding(embedding_BTH), self.pre_fc_norm_hidden(hidden_BTH))
        hidden_BTH, routing = self.layers[0](self.fc(torch.cat(both, -1)))
        return self.norm(hidden_BTH), routing


@dataclass
class ReferenceOutput:
    """Logits, losses and router statistics of a forward pass, for comparison in tests.

    `loss` is what training minimizes; without labels, losses are None or empty. Lists per router have one entry per MoE
    layer, then one per depth of multi-token prediction: balance losses, 1.0 when balanced; probabilities [B,T,E]; loads
    [E].
    """

    logits_BTV: Tensor
    loss: Tensor | None
    lm_loss: Tensor | None
    mtp_losses: list[Tensor]
    mtp_logits: list[Tensor]
    balance_loss: list[Tensor]
    router_probs: list[Tensor]
    router_loads: list[Tensor]


class ReferenceModel(nn.Module):
    """Qwen3-Next, every dimension from the configuration. Call `init_weights` or load a state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        _check_covered(config)
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Published models have one depth, `mtp`. Further depths have no published name.
        self.mtp = TokenPredictor(config) if config.mtp_num_layers else None
        separate = 0 if config.mtp_use_repeated_layer else config.mtp_num_layers - 1
        self.mtp_deeper = nn.ModuleList(TokenPredictor(config) for _ in range(separate))

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        loss_mask_BT: Tensor | None = None,
        with_balance: bool = True,
    ) -> ReferenceOutput:
        """Predict, and with labels also compute the loss.

        Labels are the tokens one to the right of `tokens_BT`. The loss is that of the next token, plus
        `mtp_loss_scaling_factor` times the mean of the depths' losses, plus `moe_aux_loss_coeff` and `moe_z_loss_coeff`
        times the sums of the routers' losses (without `with_balance` they are omitted from `loss`, but not from
        `balance_loss`). Every cross-entropy is a mean over the tokens of its own mask; the balance is over all tokens.
        """
        hidden_BTH, routings = self.model(tokens_BT)
        logits_BTV = self.lm_head(hidden_BTH)
        mtp_logits, mtp_routings = self.predict_further(tokens_BT, hidden_BTH)
        loss, lm_loss, mtp_losses = None, None, []
        if labels_BT is not None:
            if loss_mask_BT is None:
                loss_mask_BT = torch.ones_like(labels_BT)
            lm_loss = masked_cross_entropy(logits_BTV, labels_BT, loss_mask_BT)
            mtp_losses = self.mtp_losses(mtp_logits, labels_BT, loss_mask_BT)
            loss = lm_loss
            if mtp_losses:
                loss = loss + self.config.mtp_loss_scaling_factor * torch.stack(mtp_losses).mean()
            if with_balance:
                loss = loss + self.router_losses(routings, mtp_routings)
        routings = routings + mtp_routings
        return ReferenceOutput(
            logits_BTV,
            loss,
            lm_loss,
            mtp_losses,
            mtp_logits,
            balance_loss=[routing.balance_loss for routing in routings],
            router_probs=[routing.probs_BTE for routing in routings],
            router_loads=[routing.load_E for routing in routings],
        )

    def predict_further(self, tokens_BT: Tensor, hidden_BTH: Tensor) -> tuple[list[Tensor], list[Routing]]:
        """Return per depth k = 1, 2, … the logits of token t+1+k at position t, and the routing.

        Tokens shift left by one per depth; positions do not change. Token 0 fills the end: the last k positions of
        depth k have no target, and `mtp_losses` masks them.
        """
        logits, routings = [], []
        for depth in range(self.config.mtp_num_layers):
            tokens_BT = shift_left(tokens_BT)
            embedding_BTH = self.model.embed_tokens(tokens_BT)
            hidden_BTH, routing = self._predictor(depth)(embedding_BTH, hidden_BTH)
            logits.append(self.lm_head(hidden_BTH))
            routings.append(routing)
        return logits, routings

    def mtp_losses(self, mtp_logits: list[Tensor], labels_BT: Tensor, loss_mask_BT: Tensor) -> list[Tensor]:
        """Return the cross-entropy per depth, with labels and mask shifted left like the tokens."""
        losses = []
        for logits_BTV in mtp_logits:
            labels_BT, loss_mask_BT = shift_left(labels_BT), shift_left(loss_mask_BT)
            losses.append(masked_cross_entropy(logits_BTV, labels_BT, loss_mask_BT))
        return losses

    def router_losses(self, routings: list[Routing], mtp_routings: list[Routing]) -> Tensor:
        """Sum balance and z-losses over layers; a layer repeated at every depth counts once."""
        c = self.config
        applications = len(mtp_routings) if c.mtp_use_repeated_layer else 1

        def weighed(routing: Routing) -> Tensor:
            return c.moe_aux_loss_coeff * routing.balance_loss + c.moe_z_loss_coeff * routing.z_loss

        trunk = sum(map(weighed, routings))
        return trunk + sum(map(weighed, mtp_routings)) / applications

    def _predictor(self, depth: int) -> nn.Module:
        assert self.mtp is not None
        first = depth == 0 or self.config.mtp_use_repeated_layer
        return self.mtp if first else self.mtp_deeper[depth - 1]

    @torch.no_grad()
    def init_weights(self, seed: int) -> "ReferenceModel":
        """Initialize all weights from one seed, and return the model.

        Matrices are normal with `init_method_std`, norms have scale 1, the convolution has torch's default. The decay
        rate of a DeltaNet head is A from U(0.01, 16), times a step of softplus(1), or a step from
        `linear_time_step_init`.
        """
        generator = torch.Generator().manual_seed(seed)
        std = self.config.init_method_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0, std, generator=generator)
            elif isinstance(module, nn.Conv1d):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
            elif isinstance(module, ZeroCenteredRMSNorm):
                module.weight.zero_()
            elif isinstance(module, GatedRMSNorm):
                module.weight.fill_(1)
            elif isinstance(module, GatedDeltaNet):
                module.A_log.uniform_(0.01, 16, generator=generator).log_()
                module.dt_bias.fill_(1)
                if self.config.linear_time_step_init is not None:
                    log_range = [math.log(step) for step in self.config.linear_time_step_init]
                    step_H = module.dt_bias.uniform_(*log_range, generator=generator).exp_()
                    # inverse of softplus, so that softplus(dt_bias) is the step
                    step_H.add_(torch.log(-torch.expm1(-step_H)))
        if self.config.moe_router_normalized_init:
            for module in self.modules():
                if isinstance(module, MixtureOfExperts):
                    normalize_rows(module.gate.weight, std)
        return self


def shift_left(x_BT: Tensor) -> Tensor:
    """Shift every sequence one token to the left, with a zero at its end."""
    return F.pad(x_BT[:, 1:], (0, 1))


def masked_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Average -log p(label) over the tokens whose mask is 1; 0 if there is none. In nats."""
    losses_BT = F.cross_entropy(precise(logits_BTV).transpose(1, 2), labels_BT, reduction="none")
    return (losses_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1)


def normalize_rows(weight_EH: Tensor, std: float) -> None:
    """Scale every router row to its average length std * sqrt(H), keeping its direction.

    With rows of different lengths, the experts with longer ones get more tokens from the first step.

    Reference: sigma-MoE (Csordás et al. 2023, arXiv 2310.10837), on initialization.
    """
    length = std * math.sqrt(weight_EH.shape[1])
    weight_EH.mul_(length / weight_EH.norm(dim=1, keepdim=True))


def _norm(config: ModelConfig) -> ZeroCenteredRMSNorm:
    return ZeroCenteredRMSNorm(config.hidden_size, config.layernorm_epsilon)


def _check_covered(config: ModelConfig) -> None:
    if config.moe_router_load_balancing_type == "seq_aux_loss":
        raise UserError(
            "model.moe_router_load_balancing_type=seq_aux_loss: the reference model balances over "
            "the batch only; compare with global_aux_loss or aux_loss."
        )
