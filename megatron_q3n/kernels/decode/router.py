"""Decode router: top-k experts and their gates for a few tokens, in one kernel launch.

The RMSNorm before the MoE layer and the router GEMM are part of that launch where the router weight is small.

Of equal scores the lower expert index ranks higher. torch.topk does not specify which of them it selects, nor the
order of the selected ones; here the order is descending. -0 ranks below 0. The rank of NaN is unspecified, but topk
different experts are returned in any case.

Reference: megatron-core's topk_routing_with_score_function, without expert groups.
Shapes: T tokens, X width, E experts, K selected experts per token.
"""

from torch import Tensor

from megatron_q3n.kernels.decode.gemm import decode_gemm, decode_gemm_reference
from megatron_q3n.kernels.decode.operands import GemmInput, RMSNormWeights, RouterConfig
from megatron_q3n.kernels.moe.router_linear import router_linear

# largest weight that one program reads in about the time of a separate GEMM launch; estimated, not measured
_MAX_FUSED_WEIGHTS = 2**16


def decode_route(x_TX: Tensor, weight_EX: Tensor, config: RouterConfig, fused: bool = False) -> tuple[Tensor, Tensor]:
    """Compute router scores and select the top-k experts; `fused` runs the Triton kernel instead of the reference.

    Returns: gates fp32 and experts int64 [T,K], the highest score first.
    """
    if not fused:
        return route_reference(router_linear(x_TX, weight_EX), config)
    from megatron_q3n.kernels.decode import router_triton as kernel  # late: Triton

    if weight_EX.numel() <= _MAX_FUSED_WEIGHTS:
        return kernel.decode_route(x_TX.contiguous(), weight_EX, config)
    return kernel.decode_topk(router_linear(x_TX, weight_EX), config)


def decode_norm_route(
    x_TX: Tensor, norm: RMSNormWeights, weight_EX: Tensor, config: RouterConfig, fused: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply RMSNorm, compute router scores and select the top-k experts.

    `fused` runs the fused kernels of both operations, else neither.
    Returns: the normed tokens [T,X], which are the experts' input; gates fp32 and experts int64 [T,K].
    """
    tokens = GemmInput(x_TX, norm)
    if not fused:
        output = decode_gemm_reference(tokens, weight_EX, None, None, None, returns_normed=True, fp32_output=True)
        assert output.normed_RX is not None
        return output.normed_RX, *route_reference(output.out_RN, config)
    from megatron_q3n.kernels.decode import router_triton as kernel  # late: Triton

    if weight_EX.numel() <= _MAX_FUSED_WEIGHTS:
        return kernel.decode_norm_route(x_TX.contiguous(), norm, weight_EX, config)
    output = decode_gemm(tokens, weight_EX, returns_normed=True, fp32_output=True, fused=True)
    assert output.normed_RX is not None
    return output.normed_RX, *kernel.decode_topk(output.out_RN, config)


def route_reference(logits_TE: Tensor, config: RouterConfig) -> tuple[Tensor, Tensor]:
    """Select experts by torch operations; returns as `decode_route`, in torch.topk's order."""
    scores = logits_TE
    if config.score_function == "sigmoid":
        scores = logits_TE.sigmoid()
    elif config.use_pre_softmax:
        scores = logits_TE.softmax(-1)
    biased = scores if config.bias_E is None else scores + config.bias_E
    experts_TK = biased.topk(config.topk, dim=1).indices
    gates_TK = scores.gather(1, experts_TK)
    if config.score_function == "sigmoid":
        if config.topk > 1:
            gates_TK = gates_TK / (gates_TK.sum(-1, keepdim=True) + 1e-20)
    elif not config.use_pre_softmax:
        gates_TK = gates_TK.softmax(-1)
    return gates_TK * (config.scaling_factor or 1.0), experts_TK
