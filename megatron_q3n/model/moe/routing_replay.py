"""Which experts every token went to: recorded in one pass, replayed in another.

A sparse model may choose other experts for a token when it trains than when it generated it: rounding
differs, and a top-k is not continuous. The ratio of the two policies then says nothing. Replay takes the
recorded experts as given; the router still weighs them by its own scores, so it learns.

One tape belongs to one router, and is filled and emptied by whoever runs the passes: nothing global, and
no order of calls to keep. megatron-core's own (moe/router_replay.py) is a list over the whole process, MTP's
routers included, and is ignored by its fused router (moe_utils.py, fused branch); here the fused choice is
overruled.

Reference: Stabilizing MoE RL by aligning training and inference routers, arXiv 2510.11370.
Shapes: T tokens this router sees in one pass, E experts, K chosen.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from torch import Tensor


class RouteTape:
    """Routes of one router. `given` [T,K] int64 is replayed while it is set; rows of -1 are free."""

    def __init__(self) -> None:
        self.given_TK: Tensor | None = None
        self.is_recording = False
        self.own: list[Tensor] = []  # what the router would choose, a tensor [T,K] per recorded pass
        self.used: list[Tensor] = []  # what was used

    def run(self, router: Any, logits: Tensor, probs: Tensor, used_map: Tensor) -> tuple[Tensor, Tensor]:
        """Replay and record one pass, given the router's own choice.

        Returns: gates and routing map [T,E].
        """
        own_TK = chosen(used_map, router.topk)
        used_TK = own_TK
        if self.given_TK is not None:
            assert self.given_TK.shape == own_TK.shape, (self.given_TK.shape, own_TK.shape)
            used_TK = torch.where(self.given_TK < 0, own_TK, self.given_TK)
            probs, used_map = topk_routing_with_score_function(
                logits.reshape(-1, used_map.shape[1]),
                router.topk,
                use_pre_softmax=router.config.moe_router_pre_softmax,
                scaling_factor=router.config.moe_router_topk_scaling_factor,
                score_function=router.score_function,
                precomputed_indices=used_TK,
            )
        if self.is_recording:
            self.own.append(own_TK)
            self.used.append(used_TK)
        return probs, used_map

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return what was recorded since the last call: the router's own choices, and those used."""
        recorded, self.own, self.used = (self.own, self.used), [], []
        return recorded


def chosen(routing_map_TE: Tensor, topk: int) -> Tensor:
    """Return the experts of each token in ascending order, [T,K] int64."""
    return routing_map_TE.nonzero()[:, 1].view(-1, topk)


def differing(a_TK: Tensor, b_TK: Tensor) -> Tensor:
    """Say for each token whether two routes differ as sets. Shapes: [...,K]; returns bool [...]."""
    return (a_TK.sort(-1).values != b_TK.sort(-1).values).any(-1)
