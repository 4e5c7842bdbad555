"""Modules of a layer in plain torch: norms, gated attention, Gated DeltaNet, mixture of experts.

The docstring of `model.py` explains the purpose of each and should be read first. Every class is one module of the
published checkpoint, with its parameter names and row orders. Nothing is shared with the fast model: RoPE, the delta
rule and the rest are written out here, so that this stays an independent oracle.

Shape suffixes: B batch, T tokens of a sequence, H hidden; N heads, G key/value heads of attention, D its head
dimension; K key and W value dimension of a DeltaNet head, C convolution channels; X all tokens of the batch in one row,
E experts, S experts selected per token.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_q3n.config import ModelConfig


def precise(x: Tensor) -> Tensor:
    """Convert lower precisions to fp32; return fp64 unchanged."""
    return x if x.dtype == torch.float64 else x.float()


def rms_normalize(x: Tensor, epsilon: float) -> Tensor:
    """Scale the last dimension to mean square 1."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


def l2_normalize(x: Tensor) -> Tensor:
    """Scale the last dimension to length 1, with the epsilon where flash-linear-attention has it."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class ZeroCenteredRMSNorm(nn.Module):
    """Scale to mean square 1, then by 1 + weight."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        normalized = rms_normalize(precise(x), self.epsilon)
        return (normalized * (1 + precise(self.weight))).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """RMSNorm of the output of a DeltaNet head, gated with SiLU(z).

    This is the only norm whose published weight is the scale (init 1) and not its distance from 1.
    """

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x_BTNW: Tensor, z_BTNW: Tensor) -> Tensor:
        scaled_BTNW = precise(self.weight) * rms_normalize(precise(x_BTNW), self.epsilon)
        return (scaled_BTNW * F.silu(precise(z_BTNW))).to(x_BTNW.dtype)


def apply_rope(x_BTND: Tensor, rotary_dim: int, base: float) -> Tensor:
    """Rotate the first `rotary_dim` channels of each head by the token's position (partial RoPE).

    Channels i and i + rotary_dim/2 are a point in the plane, rotated by the angle position * base^(-2i/rotary_dim). The
    dot product of a query and a key depends on their distance only. The other channels carry no position.

    Reference: RoFormer (arXiv 2104.09864), eq. 34, paired as in GPT-NeoX.
    """
    rotated, rest = x_BTND[..., :rotary_dim], x_BTND[..., rotary_dim:]
    dtype, device = precise(x_BTND).dtype, x_BTND.device
    exponents = torch.arange(0, rotary_dim, 2, dtype=dtype, device=device) / rotary_dim
    positions_T = torch.arange(x_BTND.shape[1], dtype=dtype, device=device)
    angles_T1D = torch.outer(positions_T, base**-exponents).repeat(1, 2)[:, None]
    first, second = rotated.chunk(2, -1)
    rotated = rotated * angles_T1D.cos() + torch.cat((-second, first), -1) * angles_T1D.sin()
    return torch.cat((rotated.to(x_BTND.dtype), rest), -1)


def causal_attention(query_BTND: Tensor, key_BTGD: Tensor, value_BTGD: Tensor, window: int | None = None) -> Tensor:
    """Average the values of all tokens up to each one, weighted by softmax(q . k / sqrt(D)).

    With a window, only the last `window` of these tokens count, itself included. N/G neighboring query heads share a
    key/value head.

    Reference: Attention Is All You Need (arXiv 1706.03762), eq. 1.
    """
    num_heads, head_dim = query_BTND.shape[2:]
    queries_per_group = num_heads // key_BTGD.shape[2]
    key_BTND, value_BTND = (x.repeat_interleave(queries_per_group, 2) for x in (key_BTGD, value_BTGD))
    scores_BNTT = torch.einsum("bqnd,bknd->bnqk", query_BTND, key_BTND) / math.sqrt(head_dim)
    masked_TT = torch.ones_like(scores_BNTT[0, 0], dtype=torch.bool).triu(1)
    if window is not None:
        masked_TT |= torch.ones_like(masked_TT).tril(-window)
    weights_BNTT = precise(scores_BNTT).masked_fill(masked_TT, -math.inf).softmax(-1)
    return torch.einsum("bnqk,bknd->bqnd", weights_BNTT.to(query_BTND.dtype), value_BTND)


class GatedAttention(nn.Module):
    """Softmax attention with QK-norm, partial RoPE and a sigmoid output gate.

    The rows of q_proj are ordered head by head: its query, then its gate. Variants of the gate (Gated Attention, arXiv
    2505.06708) are: none, one number per head, one gate for all heads, SiLU, on the values instead; their rows are
    gate_proj, which no published model has.
    """

    def __init__(self, config: ModelConfig, window: int | None = None) -> None:
        super().__init__()
        self.config, self.window = config, window
        hidden, head_dim, epsilon = config.hidden_size, config.kv_channels, config.layernorm_epsilon
        query_dim = config.num_attention_heads * head_dim
        key_dim = config.num_query_groups * head_dim
        gate_dim = query_dim if config.gate_is_in_query_projection else 0
        self.q_proj = nn.Linear(hidden, query_dim + gate_dim, bias=False)
        self.k_proj = nn.Linear(hidden, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden, key_dim, bias=False)
        self.o_proj = nn.Linear(query_dim, hidden, bias=False)
        self.q_norm = ZeroCenteredRMSNorm(head_dim, epsilon)
        self.k_norm = ZeroCenteredRMSNorm(head_dim, epsilon)
        if config.gate_heads and not config.gate_is_in_query_projection:
            self.gate_proj = nn.Linear(hidden, config.gate_heads * config.gate_width, bias=False)

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        c = self.config
        query_and_gate = self.q_proj(hidden_BTH).unflatten(-1, (c.num_attention_heads, -1))
        query_BTND, *gate_BTND = query_and_gate.split(c.kv_channels, -1)
        key_BTGD = self.k_proj(hidden_BTH).unflatten(-1, (c.num_query_groups, -1))
        value_BTGD = self.v_proj(hidden_BTH).unflatten(-1, (c.num_query_groups, -1))
        gate = gate_BTND[0] if gate_BTND else self.other_gate(hidden_BTH)

        query_BTND = apply_rope(self.q_norm(query_BTND), c.rotary_dim, c.rotary_base)
        key_BTGD = apply_rope(self.k_norm(key_BTGD), c.rotary_dim, c.rotary_base)
        if c.attention_gate_position == "value":
            value_BTGD = self.apply_gate(value_BTGD, gate)
        output_BTND = causal_attention(query_BTND, key_BTGD, value_BTGD, self.window)
        if c.attention_gate_position == "output":
            output_BTND = self.apply_gate(output_BTND, gate)
        return self.o_proj(output_BTND.flatten(2))

    def other_gate(self, hidden_BTH: Tensor) -> Tensor | None:
        """Return the gate of gate_proj: N heads or 1 for all heads, D channels or 1 for all channels."""
        if not self.config.gate_heads:
            return None
        return self.gate_proj(hidden_BTH).unflatten(-1, (-1, self.config.gate_width))

    def apply_gate(self, heads: Tensor, gate: Tensor | None) -> Tensor:
        """Multiply each head by its activated gate."""
        if gate is None:
            return heads
        silu = self.config.attention_gate_activation == "silu"
        return heads * (F.silu(gate) if silu else torch.sigmoid(gate))


def gated_delta_rule(
    query_BTNK: Tensor, key_BTNK: Tensor, value_BTNW: Tensor, log_decay_BTN: Tensor, beta_BTN: Tensor
) -> Tensor:
    """Run the gated delta rule, token by token, from an empty state.

        S_t = S_{t-1} alpha_t (I - beta_t k_t k_t^T) + beta_t v_t k_t^T
        o_t = S_t q_t

    The state S is an associative memory, and S k is the value stored for key k. Expanded, every token does three
    steps: decay the memory (S <- alpha S, with alpha = exp(log_decay) in (0, 1)); retrieve the value of its key (S k);
    and move it towards the token's value by a fraction beta in (0, 1) (S <- S + beta (v - S k) k^T). The last step is
    one gradient step of size beta on |S k - v|^2 / 2: the "delta rule" of Widrow and Hoff. The code has S transposed,
    [K, W].

    Shapes: keys of length 1 and queries of length 1/sqrt(K), repeated to one per value head.
    Returns: o_BTNW.

    Reference: Gated Delta Networks (arXiv 2412.06464), section 3.1, the gated delta rule.
    """
    batch, num_tokens, num_heads, key_dim = key_BTNK.shape
    state_BNKW = key_BTNK.new_zeros(batch, num_heads, key_dim, value_BTNW.shape[-1])
    outputs_BNW = []
    for t in range(num_tokens):
        key_BNK, query_BNK = key_BTNK[:, t], query_BTNK[:, t]
        state_BNKW = state_BNKW * log_decay_BTN[:, t, :, None, None].exp()
        stored_BNW = torch.einsum("bnk,bnkw->bnw", key_BNK, state_BNKW)
        update_BNW = beta_BTN[:, t, :, None] * (value_BTNW[:, t] - stored_BNW)
        state_BNKW = state_BNKW + torch.einsum("bnk,bnw->bnkw", key_BNK, update_BNW)
        outputs_BNW.append(torch.einsum("bnk,bnkw->bnw", query_BNK, state_BNKW))
    return torch.stack(outputs_BNW, 1)


class GatedDeltaNet(nn.Module):
    """Linear attention by the gated delta rule: a short convolution before, a gated norm after.

    The rows of in_proj_qkvz are ordered key head by key head: its q, its k, then v and then z of its value heads. Those
    of in_proj_ba likewise, b (for beta) and then a (for alpha).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden, channels = config.hidden_size, config.conv_dim
        num_values = config.linear_num_value_heads
        self.in_proj_qkvz = nn.Linear(hidden, channels + config.value_dim, bias=False)
        self.in_proj_ba = nn.Linear(hidden, 2 * num_values, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, config.linear_conv_kernel_dim, groups=channels, bias=False)
        self.A_log = nn.Parameter(torch.zeros(num_values))
        self.dt_bias = nn.Parameter(torch.ones(num_values))
        self.norm = GatedRMSNorm(config.linear_value_head_dim, config.layernorm_epsilon)
        self.out_proj = nn.Linear(config.value_dim, hidden, bias=False)

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        c = self.config
        query_BTC, key_BTC, value_BTC, z_BTC, b_BTN, a_BTN = self.project(hidden_BTH)
        mixed_BTC = self.short_convolution(torch.cat((query_BTC, key_BTC, value_BTC), -1))
        query_BTC, key_BTC, value_BTC = mixed_BTC.split((c.key_dim, c.key_dim, c.value_dim), -1)
        beta_BTN = torch.sigmoid(precise(b_BTN))
        step_BTN = F.softplus(precise(a_BTN) + precise(self.dt_bias))
        log_decay_BTN = -precise(self.A_log).exp() * step_BTN
        output_BTNW = gated_delta_rule(
            self.key_heads(query_BTC) / math.sqrt(c.linear_key_head_dim),
            self.key_heads(key_BTC),
            self.value_heads(precise(value_BTC)),
            log_decay_BTN,
            beta_BTN,
        ).to(hidden_BTH.dtype)
        return self.out_proj(self.norm(output_BTNW, self.value_heads(z_BTC)).flatten(2))

    def project(self, hidden_BTH: Tensor) -> list[Tensor]:
        """Return q, k, v, z, b and a, each with its heads concatenated."""
        c = self.config
        num_keys, key_width = c.linear_num_key_heads, c.linear_key_head_dim
        # of all value heads of one key head
        value_width = c.value_dim // num_keys
        qkvz = self.in_proj_qkvz(hidden_BTH).unflatten(-1, (num_keys, -1))
        ba = self.in_proj_ba(hidden_BTH).unflatten(-1, (num_keys, -1))
        parts = qkvz.split((key_width, key_width, value_width, value_width), -1) + ba.chunk(2, -1)
        return [part.flatten(2) for part in parts]

    def short_convolution(self, x_BTC: Tensor) -> Tensor:
        """Convolve every channel with its last few tokens, so that keys can represent short phrases.

        y_t = SiLU(sum_j w_j x_{t-j}), j from 0 to the kernel size minus one.
        """
        num_earlier = self.config.linear_conv_kernel_dim - 1
        x_BCT = F.pad(x_BTC.transpose(1, 2), (num_earlier, 0))
        return F.silu(self.conv1d(x_BCT)).transpose(1, 2)

    def key_heads(self, x_BTC: Tensor) -> Tensor:
        """Split into heads, normalized to length 1 and repeated for the value heads of each."""
        c = self.config
        heads = precise(x_BTC).unflatten(-1, (c.linear_num_key_heads, -1))
        values_per_key = c.linear_num_value_heads // c.linear_num_key_heads
        return l2_normalize(heads).repeat_interleave(values_per_key, 2)

    def value_heads(self, x_BTC: Tensor) -> Tensor:
        """Split into value heads."""
        return x_BTC.unflatten(-1, (self.config.linear_num_value_heads, -1))


class SwiGLU(nn.Module):
    """One expert: down(SiLU(gate x) * up x). Reference: GLU Variants (arXiv 2002.05202), eq. 6."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass
class Routing:
    """Probabilities, load and losses of one router for one batch.

    probs_BTE: softmax over all experts. load_E: share of the routed slots per expert; sums to 1. balance_loss:
    E * sum_i load_i * mean_prob_i, 1 when balanced. z_loss: mean square of log sum exp of the logits.
    """

    probs_BTE: Tensor
    load_E: Tensor
    balance_loss: Tensor
    z_loss: Tensor


class MixtureOfExperts(nn.Module):
    """Sum of each token's top-k experts, weighted by the router, and of the shared expert, weighted by its gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.topk = config.moe_router_topk
        hidden, num_experts = config.hidden_size, config.num_moe_experts
        self.gate = nn.Linear(hidden, num_experts, bias=False)
        self.register_buffer("expert_bias_E", torch.zeros(num_experts), persistent=False)
        self.experts = nn.ModuleList(SwiGLU(hidden, config.moe_ffn_hidden_size) for _ in range(num_experts))
        self.shared_expert = SwiGLU(hidden, config.moe_shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)

    def forward(self, hidden_BTH: Tensor) -> tuple[Tensor, Routing]:
        hidden_XH = hidden_BTH.flatten(0, 1)
        logits_XE = F.linear(precise(hidden_XH), precise(self.gate.weight))
        # The bias of loss-free balancing (arXiv 2408.15664) is used in the selection only.
        selected_XS = (logits_XE + self.expert_bias_E).topk(self.topk, -1).indices
        top_logits_XS = logits_XE.gather(-1, selected_XS)
        # Softmax over the selected logits is softmax over all, renormalized to sum to 1.
        weights_XS = top_logits_XS.softmax(-1).to(hidden_XH.dtype)

        sum_XH = torch.sigmoid(self.shared_expert_gate(hidden_XH)) * self.shared_expert(hidden_XH)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(selected_XS == number)
            outputs = weights_XS[token, slot, None] * expert(hidden_XH[token])
            sum_XH = sum_XH.index_add(0, token, outputs)
        return sum_XH.view_as(hidden_BTH), routing(logits_XE, selected_XS, hidden_BTH.shape[0])


def routing(logits_XE: Tensor, selected_XS: Tensor, batch: int) -> Routing:
    """Compute load, balance loss and z-loss of a router over the whole batch.

    Reference: Switch Transformer (arXiv 2101.03961), eq. 4 to 6, with the share of slots for f; for
    the z-loss ST-MoE (arXiv 2202.08906), eq. 5.
    """
    num_experts = logits_XE.shape[-1]
    probs_XE = logits_XE.softmax(-1)
    count_E = torch.bincount(selected_XS.flatten(), minlength=num_experts)
    load_E = count_E.to(probs_XE.dtype) / selected_XS.numel()
    balance_loss = num_experts * (load_E * probs_XE.mean(0)).sum()
    z_loss = logits_XE.logsumexp(-1).square().mean()
    return Routing(probs_XE.unflatten(0, (batch, -1)), load_E, balance_loss, z_loss)
