"""Routing replay: the experts of every token, recorded in one forward pass and replayed in another.

A mixture of experts may select other experts for a token in training than in generation: rounding differs, and a top-k
is not continuous. The ratio of the two policies is then meaningless. Replay fixes the recorded experts; their gates
still come from the router's own scores, so the router is still trained.

Each router has its own RoutingReplay, which the caller of the passes sets and clears. There is no global state and no
required order of calls. megatron-core's RouterReplay (megatron/core/transformer/moe/router_replay.py) is a list over
the whole process that includes MTP's routers, and its fused router ignores it
(megatron/core/transformer/moe/moe_utils.py, fused branch); here the result of the fused router is replaced.

Reference: Stabilizing MoE RL by aligning training and inference routers, arXiv 2510.11370.
Shapes: T tokens of this router in one pass, E experts, K chosen experts per token.
"""

import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class RoutingReplay:
    """Recorded routes of one router.

    `target_TK` [T,K] int64, while set, replaces the router's selection; rows of -1 are not replaced. While
    `is_recording`, `selected` and `used` get one tensor [T,K] per pass: what the router selected, and what was used.
    """

    def __init__(self) -> None:
        self.target_TK: Tensor | None = None
        self.is_recording = False
        self.selected: list[Tensor] = []
        self.used: list[Tensor] = []

    @property
    def is_active(self) -> bool:
        """Whether it records or replays now."""
        return self.is_recording or self.target_TK is not None

    def run(self, router: TopKRouter, logits: Tensor, probs: Tensor, used_map: Tensor) -> tuple[Tensor, Tensor]:
        """Replay and record one pass, given the gates and the routing map [T,E] of the router's own selection.

        Returns: gates and routing map [T,E].
        """
        selected_TK = expert_indices(used_map, router.topk)
        used_TK = selected_TK
        if self.target_TK is not None:
            assert self.target_TK.shape == selected_TK.shape, (self.target_TK.shape, selected_TK.shape)
            used_TK = torch.where(self.target_TK < 0, selected_TK, self.target_TK)
            probs, used_map = topk_routing_with_score_function(
                logits.reshape(-1, used_map.shape[1]),
                router.topk,
                use_pre_softmax=router.config.moe_router_pre_softmax,
                scaling_factor=router.config.moe_router_topk_scaling_factor,
                score_function=router.score_function,
                precomputed_indices=used_TK,
            )
        if self.is_recording:
            self.selected.append(selected_TK)
            self.used.append(used_TK)
        return probs, used_map

    def pop_recorded(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return what was recorded since the last call: the routers' own selections, and the routes used."""
        recorded, self.selected, self.used = (self.selected, self.used), [], []
        return recorded


def expert_indices(routing_map_TE: Tensor, topk: int) -> Tensor:
    """Return the experts of each token in ascending order, [T,K] int64."""
    return routing_map_TE.nonzero()[:, 1].view(-1, topk)


def routes_differ(a_TK: Tensor, b_TK: Tensor) -> Tensor:
    """Return for each token whether two routes differ as sets. Shapes: [...,K]; returns bool [...]."""
    return (a_TK.sort(-1).values != b_TK.sort(-1).values).any(-1)
