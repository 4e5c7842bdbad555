"""Which experts a few tokens go to, and their gates: one launch, with norm and router's product where that is small.

Of equal scores the lower expert's counts as higher. torch.topk leaves open which of them it takes, and
in which order it returns what it took; here it is descending. -0 is below 0; where NaN stands is left
open, but as many different experts are named as ever.

Shapes: T tokens, X width, E experts, K chosen of each token.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_q3n.kernels import registry
from megatron_q3n.kernels.decode.gemm import RowNorm, Rows, composed_few_rows, few_rows
from megatron_q3n.kernels.moe.router_linear import router_linear

OPERATION = "router's choice for a few tokens"
MOST_EXPERTS, MOST_CHOSEN = 512, 16
# weights that a single program reads about as fast as a product of its own is launched; by reckoning, not measured
_MOST_WEIGHTS = 2**16


@dataclass(frozen=True)
class Choice:
    """How a router chooses, in megatron-core's terms; the bias [E] is added where experts are chosen, nowhere else."""

    topk: int
    score_function: str = "softmax"
    use_pre_softmax: bool = False
    scaling_factor: float | None = None
    bias_E: Tensor | None = None


def fits(choice: Choice, num_experts: int) -> bool:
    """Whether the fused kernel knows this choice."""
    known = choice.score_function in ("softmax", "sigmoid")
    return known and num_experts <= MOST_EXPERTS and choice.topk <= min(MOST_CHOSEN, num_experts)


def route_few(x_TX: Tensor, weight_EX: Tensor, choice: Choice, fused: bool | None = None) -> tuple[Tensor, Tensor]:
    """Score the experts and choose; `fused` forces the choice that `choices` makes otherwise.

    Returns: gates fp32 and experts int64 [T,K], the highest score first.
    """
    if not (registry.is_fused(OPERATION, x_TX, fused) and fits(choice, len(weight_EX))):
        return composed_choice(router_linear(x_TX, weight_EX), choice)
    from megatron_q3n.kernels.decode import router_triton as kernel  # late: Triton

    if weight_EX.numel() <= _MOST_WEIGHTS:
        return kernel.route_few(x_TX.contiguous(), weight_EX, choice)
    return kernel.choose_few(router_linear(x_TX, weight_EX), choice)


def norm_and_route_few(
    x_TX: Tensor, norm: RowNorm, weight_EX: Tensor, choice: Choice, fused: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm tokens, score the experts and choose, with the fused kernels of both operations or without any.

    Returns: the normed tokens [T,X], which the experts read; gates fp32 and experts int64 [T,K].
    """
    rows = Rows(x_TX, norm)
    if not fused:
        made = composed_few_rows(rows, weight_EX, None, None, None, keeps=True, wide=True)
        assert made.normed_RX is not None
        return made.normed_RX, *composed_choice(made.out_RN, choice)
    from megatron_q3n.kernels.decode import router_triton as kernel  # late: Triton

    assert fits(choice, len(weight_EX))
    if weight_EX.numel() <= _MOST_WEIGHTS:
        return kernel.norm_and_route_few(x_TX.contiguous(), norm, weight_EX, choice)
    made = few_rows(rows, weight_EX, keeps=True, wide=True, fused=True)
    assert made.normed_RX is not None
    return made.normed_RX, *kernel.choose_few(made.out_RN, choice)


def composed_choice(logits_TE: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Choose by torch operations: what megatron-core's topk_routing_with_score_function does without groups."""
    scores = logits_TE
    if choice.score_function == "sigmoid":
        scores = logits_TE.sigmoid()
    elif choice.use_pre_softmax:
        scores = logits_TE.softmax(-1)
    ranked = scores if choice.bias_E is None else scores + choice.bias_E
    experts_TK = ranked.topk(choice.topk, dim=1).indices
    gates_TK = scores.gather(1, experts_TK)
    if choice.score_function == "sigmoid":
        if choice.topk > 1:
            gates_TK = gates_TK / (gates_TK.sum(-1, keepdim=True) + 1e-20)
    elif not choice.use_pre_softmax:
        gates_TK = gates_TK.softmax(-1)
    return gates_TK * (choice.scaling_factor or 1.0), experts_TK
