"""The whole architecture in plain torch, to be read, and the oracle the fast model is tested by.

A language model reads tokens 0..t and gives the odds of token t+1. Between the embedding and the
output head, Qwen3-Next stacks layers of two halves, each adding its answer to the hidden state:

1. A *token mixer* carries information between positions. Softmax attention looks every earlier
   token up again: exact, but its cost grows with the square of the length. A *Gated DeltaNet* keeps
   one small matrix per head, a notebook of key -> value entries, and edits it once per token: the
   cost grows with the length only, but old notes fade. Three layers of four keep notebooks, the
   fourth attends: cheap reading, and now and then a full look back.
2. A *mixture of experts* works on each token alone. Of many small networks (512 in the 80B model) a
   router picks a few (10) per token, and one shared expert serves all: the model may know a lot
   while a token pays for little of it.

Around these, what makes it train well:
- *Zero-centered RMSNorm*: the scale is 1 + weight, so weight decay pulls it to 1 and keeps it
  bounded; a plain scale it would pull to 0.
- *QK-norm, partial RoPE*: queries and keys are normalised per head, which bounds the attention
  scores. Positions enter by turning the first quarter of a head; the rest compares content alone.
- *Output gate*: softmax hands out weights that sum to 1 even where nothing is relevant, and models
  learn to dump them on the first token. A sigmoid gate after it lets a head say nothing instead.
- *Balance loss*: left alone, a router overuses a few experts. E * sum_i f_i P_i (f_i the share of
  routed slots expert i received, P_i its mean probability) is 1 when all are used alike and more
  when not. Its gradient flows through P only, as f is a count. Taken over the whole batch, a single
  text may still have its favourites (arXiv 2501.11873).
- *Multi-token prediction*: one more layer takes the final state of position t and the embedding of
  token t+1, and predicts token t+2. The trunk learns to look ahead, and inference gets a cheap
  drafter for speculative decoding (DeepSeek-V3, arXiv 2412.19437).

What is not here is speed: no kernels, no parallelism, no cache; and no packing of documents,
nothing of `config.megatron`. `layers.py` has the parts of a layer. Names
and layouts are the published checkpoint's; `megatron_q3n/hf.py` maps them to megatron-core's.
Norms, gates, router, softmax and loss run in fp32, or fp64 in a double model.

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
    """A token mixer and a mixture of experts, each reading a normalised copy of the hidden state.

    mixer: G for Gated DeltaNet, * for gated attention, S for gated attention to a sliding window.
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
        answer_BTH, routing = self.mlp(self.post_attention_layernorm(hidden_BTH))
        return hidden_BTH + answer_BTH, routing


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
    """Multi-token prediction, one depth: see one token further, predict one token further.

    Its hidden input is the trunk's state *after* the final norm (at deeper depths, the output of
    the depth before, after `norm`), although `pre_fc_norm_hidden` normalises it once more. That is
    what megatron-core's HybridModel feeds, and what the released weights expect: vLLM's
    qwen3_next_mtp is given the output of Qwen3NextModel, which ends in its norm, and llama.cpp
    (pull request 24025) and LightLLM (1402) measured higher acceptance with it. DeepSeek-V3 differs
    here, and the wrong choice shows nowhere but in the acceptance rate. `fc` takes the embedding
    first. Reference: DeepSeek-V3 (arXiv 2412.19437), eq. 21 to 23.
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
    """Everything a test may want to compare. Losses are None without labels.

    Per-router lists hold one entry per MoE layer, then one per depth of multi-token prediction.
    """

    logits_BTV: Tensor
    loss: Tensor | None  # what training minimises
    lm_loss: Tensor | None
    mtp_losses: list[Tensor]
    mtp_logits: list[Tensor]
    balance_loss: list[Tensor]  # each 1.0 when balanced
    router_probs: list[Tensor]  # [B, T, E]
    router_loads: list[Tensor]  # [E]


class ReferenceModel(nn.Module):
    """Qwen3-Next, every dimension from the configuration. Call `init_weights` or load a state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        _check_covered(config)
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Published models have one depth, `mtp`. More depths of our own have no published name.
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

        Labels are the tokens one to the right of `tokens_BT`. The loss is that of the next token,
        plus `mtp_loss_scaling_factor` times the mean of the depths' losses, plus
        `moe_aux_loss_coeff` and `moe_z_loss_coeff` times the sums of the routers' losses (left out of
        `loss`, not of `balance_loss`, if not `with_balance`). Every cross-entropy is a mean over the tokens its
        own mask leaves; the balance is counted over all tokens.
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

        Tokens move left by one per depth, positions stay. What moves in at the end is token 0: the
        last k positions of depth k predict nothing real, and `mtp_losses` masks them.
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
        """Return the cross-entropy per depth, against labels and mask moved left with the tokens."""
        losses = []
        for logits_BTV in mtp_logits:
            labels_BT, loss_mask_BT = shift_left(labels_BT), shift_left(loss_mask_BT)
            losses.append(masked_cross_entropy(logits_BTV, labels_BT, loss_mask_BT))
        return losses

    def router_losses(self, routings: list[Routing], mtp_routings: list[Routing]) -> Tensor:
        """Sum balance and z-losses over layers; one layer applied at every depth counts once."""
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
        """Draw all weights from one seed, and return the model.

        Matrices are normal with `init_method_std`, norms start at scale 1, the convolution at
        torch's own default. A DeltaNet head forgets at a rate A drawn from U(0.01, 16), times a step of
        softplus(1), or one drawn from `linear_time_step_init`.
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
                    step_H.add_(torch.log(-torch.expm1(-step_H)))  # softplus(dt_bias) is the step
        if self.config.moe_router_normalized_init:
            for module in self.modules():
                if isinstance(module, MixtureOfExperts):
                    normalise_rows(module.gate.weight, std)
        return self


def shift_left(x_BT: Tensor) -> Tensor:
    """Move every sequence one token to the left and put a zero at its end."""
    return F.pad(x_BT[:, 1:], (0, 1))


def masked_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Average -log p(label) over the tokens whose mask is 1; 0 if there is none. In nats."""
    losses_BT = F.cross_entropy(precise(logits_BTV).transpose(1, 2), labels_BT, reduction="none")
    return (losses_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1)


def normalise_rows(weight_EH: Tensor, std: float) -> None:
    """Give every router row the length std * sqrt(H) it has on average, keeping its direction.

    With rows of unlike length, the experts with longer ones win more tokens from the first step.
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
