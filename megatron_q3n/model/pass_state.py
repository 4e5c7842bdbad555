"""PassState: values passed between modules within one forward pass, beside megatron-core's call signatures.

One object per model: `config.pass_state` of its `Qwen3NextTransformerConfig`, which every module has as `self.config`.
There is no other such channel: no module sets attributes of another module or of the TransformerConfig.

| field | from | to |
|---|---|---|
| `mtp` | `build_model`, the training step | MTP block and MTP loss: accumulated losses and the schedule of drafts |
| `balance_scale` | the training step | routers: N / M of the global batch (model/moe/router.py) |
| `draft_chain` | MTP block | MTP loss of the same pass: drafts need logits, which only the loss computes |
| `rope_angles` | `GatedAttention.forward` | the QKV projection that it calls, which applies RoPE in its epilogue |
| `residual` | MoE layer | dispatcher or experts of the same layer, which add it in their epilogue |
| `expert_exchange` | `build_model` | dispatchers: the exchange between expert-parallel ranks, with its buffers |
| `tokens_per_rank` | the training step | MoE layers: how many tokens every rank brings in this pass |
| `routing` | reinforcement learning, instruments | routers: recorded routes to replay, or a probe |
| `delta_rule_probes` | reinforcement learning, instruments | Gated DeltaNet: a wrapper around its delta rule |

`draft_chain`, `rope_angles` and `residual` are taken once (`take_…`). Under activation checkpointing they are set and
taken again inside the repeated forward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_q3n.kernels.gated_delta.backend import Rule
from megatron_q3n.kernels.moe.expert_exchange import ExpertExchange
from megatron_q3n.model.mtp.accumulators import MTPLosses
from megatron_q3n.model.mtp.draft_chain import DraftChain


class RoutingHook(Protocol):
    """Hook after a router's top-k: `moe.routing_replay.RoutingReplay`, or a probe of the instruments."""

    def run(self, router: nn.Module, logits: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """Return gates and routing map [T,E] in place of the router's own."""

    @property
    def is_active(self) -> bool:
        """Whether it records or replays now."""


class DeltaRuleProbe(Protocol):
    """Wrapper around the delta rule of one Gated DeltaNet."""

    def wrap(self, rule: Rule) -> Rule:
        """Return the rule, observed."""


@dataclass(eq=False)
class PassState:
    """See the module's docstring."""

    mtp: MTPLosses | None = None
    balance_scale: Tensor | None = None
    draft_chain: DraftChain | None = None
    rope_angles: Tensor | None = None
    residual: Tensor | None = None
    expert_exchange: ExpertExchange | None = None
    tokens_per_rank: int | None = None
    routing: dict[nn.Module, RoutingHook] = field(default_factory=dict)
    delta_rule_probes: dict[nn.Module, DeltaRuleProbe] = field(default_factory=dict)

    def __deepcopy__(self, _: object) -> "PassState":
        """Return the object itself: megatron-core deep-copies configurations."""
        return self

    def set_balance_scale(self, scale: Tensor) -> None:
        """Set N / M of the next step, in place: a step captured as a CUDA graph reads it."""
        if self.balance_scale is None:
            self.balance_scale = torch.empty((), device=scale.device)
        self.balance_scale.copy_(scale)

    def take_rope_angles(self) -> Tensor | None:
        """Return the RoPE angles of this call and clear the field."""
        angles, self.rope_angles = self.rope_angles, None
        return angles

    def take_residual(self) -> Tensor | None:
        """Return the residual of this call and clear the field."""
        residual, self.residual = self.residual, None
        return residual

    def take_draft_chain(self) -> DraftChain | None:
        """Return the draft chain of this pass and clear the field."""
        chain, self.draft_chain = self.draft_chain, None
        return chain

    @contextmanager
    def with_equal_tokens(self, tokens: int) -> Iterator[None]:
        """Tell the MoE layers that every rank brings this many tokens in the passes of this block."""
        before, self.tokens_per_rank = self.tokens_per_rank, tokens
        try:
            yield
        finally:
            self.tokens_per_rank = before

    @property
    def is_observed(self) -> bool:
        """Whether routers or delta rules are recorded, replayed or probed."""
        return bool(self.routing or self.delta_rule_probes)

    def observed(self, rule: Rule, mixer: nn.Module) -> Rule:
        """Return the delta rule of a mixer, wrapped by its probe where there is one."""
        probe = self.delta_rule_probes.get(mixer)
        return rule if probe is None else probe.wrap(rule)

    @contextmanager
    def probing(self, probes: dict[nn.Module, DeltaRuleProbe]) -> Iterator[None]:
        """Attach probes to delta rules for the duration of a block, then restore the previous ones."""
        before, self.delta_rule_probes = self.delta_rule_probes, {**self.delta_rule_probes, **probes}
        try:
            yield
        finally:
            self.delta_rule_probes = before

    @contextmanager
    def with_routing(self, hooks: dict[nn.Module, RoutingHook]) -> Iterator[None]:
        """Attach hooks to routers for the duration of a block, then restore the previous ones."""
        before, self.routing = self.routing, {**self.routing, **hooks}
        try:
            yield
        finally:
            self.routing = before
