"""ExecutionPlan: the path of every kind of sublayer in this process, and why not a faster one. Data only, no torch.

The plan is made by the rules of `execution_rules.py` from the settings (layout included) and the `Hardware`: device,
backend and the kernels that passed qualification; in `build_model`, and for log and dry run. Layers read a field; they
decide nothing. What is known only from a call (number of tokens, packing, gradients) stays a condition in the layer
beside the field.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Literal


class Kernel(StrEnum):
    """Fused kernels, qualified at start-up (`kernels/startup/qualification.py`); values as in environment.json."""

    GATED_DELTA_RULE = "gated delta rule"
    GATED_DELTA_MIXER = "gated delta net prologue and epilogue"
    QKV_NORM_ROPE = "qkv split, q/k norm and RoPE"
    RESIDUAL_NORM = "RMSNorm of the residual stream"
    PERMUTATION = "MoE token permutation"
    EXPERT_EXCHANGE = "expert-parallel exchange"
    GROUPED_GEMM = "grouped GEMM"
    SWIGLU = "SwiGLU"
    SHARED_EXPERT_GATE = "shared expert gate"
    FP8_EXPERTS = "FP8 experts"
    DECODE_GEMM = "decode GEMM"
    DECODE_ATTENTION = "decode attention"
    DECODE_ROUTER = "decode router"
    DECODE_EXPERTS = "decode experts"
    DECODE_ARGMAX = "decode argmax"
    DECODE_GATED_DELTA = "decode gated delta step"


@dataclass(frozen=True)
class KernelStatus:
    """Which kernels may run in this process: those that passed their check, and why the others may not.

    `unavailable` maps a kernel to its reason; a kernel in neither was not checked.
    """

    qualified: frozenset[Kernel] = frozenset()
    unavailable: Mapping[Kernel, str] = field(default_factory=dict)

    def obstacle(self, kernel: Kernel) -> str | None:
        """Return why a kernel may not run, None if it may."""
        if kernel in self.qualified:
            return None
        return self.unavailable.get(kernel, f"the {kernel} kernel is not qualified in this process")


@dataclass(frozen=True)
class Hardware:
    """Process that runs the model: device, backend of dense layers, kernels that passed qualification.

    `ranks_per_node` is the number of processes on this machine, None where it is not known.
    """

    device: Literal["cpu", "cuda"]
    backend: Literal["torch", "transformer_engine"]
    kernels: KernelStatus = KernelStatus()
    ranks_per_node: int | None = None


@dataclass(frozen=True)
class Decision:
    """Decision: whether the fast path runs, the path that runs, and why not a faster one (None: it is the fastest)."""

    is_fast: bool
    path: str
    reason: str | None = None

    def __bool__(self) -> bool:
        """Return whether the fast path runs."""
        return self.is_fast

    def __str__(self) -> str:
        """Return the path and, where there is a faster one, why it does not run."""
        return self.path + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class SublayerPlan:
    """The residual branch around a mixer or the experts: hidden + f(norm(hidden)).

    `num_norm_consumers` is the number of aliases of the norm's output: one per consumer, so that the fused RMSNorm
    backward accumulates their gradients and the residual stream's in one pass; 1 on megatron-core's own path.
    """

    aliased_norm: Decision
    num_norm_consumers: int


@dataclass(frozen=True)
class GatedDeltaNetPlan:
    """Gated DeltaNet in training and prefill."""

    sublayer: SublayerPlan
    fused_mixer: Decision
    delta_rule: Decision
    context_parallel: Literal["none", "all_to_all", "state_passing"]
    checkpoints_activations: bool


@dataclass(frozen=True)
class GatedAttentionPlan:
    """Gated attention in training and prefill; unpacked rows only for `fused_qkv`; `masked_gqa` in draft chains."""

    sublayer: SublayerPlan
    fused_qkv: Decision
    core: Decision
    masked_gqa: Decision


@dataclass(frozen=True)
class MoEPlan:
    """Mixture of experts in training and prefill."""

    sublayer: SublayerPlan
    local_dispatcher: Decision
    expert_exchange: Decision
    symmetric_memory: Decision
    permutation: Decision
    fused_residual: Decision
    fp8_experts: Decision
    grouped_gemm: Decision
    grouped_gemm_backend: Literal["triton", "torch", "loop"]
    swiglu: Decision
    shared_expert_swiglu: Decision
    shared_expert_gate: Decision


@dataclass(frozen=True)
class DecodePlan:
    """Decoding: a few new tokens per sequence, no gradients.

    `experts_max_tokens` is the most tokens of a pass for which `experts` is the faster path.
    """

    gated_delta: Decision
    whole_linear: Decision
    gemm: Decision
    attention: Decision
    router: Decision
    norm_in_router: Decision
    experts: Decision
    experts_kernel: Decision
    experts_max_tokens: int
    moe_without_host_sync: Decision
    argmax: Decision
    draft_argmax: Decision
    cuda_graph: Decision


@dataclass(frozen=True)
class ExecutionPlan:
    """All decisions of a model in one process; immutable, shared by copies of the TransformerConfig that carries it."""

    norm: Decision
    gated_delta_net: GatedDeltaNetPlan
    gated_attention: GatedAttentionPlan
    moe: MoEPlan
    decode: DecodePlan
    training_step: Decision

    def __deepcopy__(self, _: object) -> "ExecutionPlan":
        """Return the plan itself: megatron-core deep-copies configurations."""
        return self

    def rows(self) -> Iterator[tuple[str, str, Decision]]:
        """Yield (sublayer kind, part, decision) of every decision, in the order of the model."""
        yield "every sublayer", "RMSNorm", self.norm
        for kind in ("gated_delta_net", "gated_attention", "moe", "decode"):
            yield from _decisions(kind.replace("_", " "), getattr(self, kind))
        yield "training step", "CUDA graph", self.training_step

    def as_tree(self) -> dict[str, dict[str, str]]:
        """Return the plan for environment.json: kind → part → "path (reason why not a faster one)"."""
        tree: dict[str, dict[str, str]] = {}
        for kind, part, decision in self.rows():
            tree.setdefault(kind, {})[part] = str(decision)
        return tree

    def lines(self) -> list[str]:
        """Return the plan for the log, a line per kind: "kind: path (reason): its parts; …"."""
        lines = []
        for kind, parts in self.as_tree().items():
            by_path: dict[str, list[str]] = {}
            for part, path in parts.items():
                by_path.setdefault(path, []).append(part)
            lines.append(f"{kind}: " + "; ".join(f"{', '.join(names)}: {path}" for path, names in by_path.items()))
        return lines


def _decisions(kind: str, plan: object) -> Iterator[tuple[str, str, Decision]]:
    for part in fields(plan):  # type: ignore[arg-type]
        name, value = part.name.replace("_", " "), getattr(plan, part.name)
        if isinstance(value, Decision):
            yield kind, name, value
        elif isinstance(value, SublayerPlan):
            yield kind, "norm and residual", value.aliased_norm
        elif part.name != "grouped_gemm_backend":
            # a setting or a limit without a faster alternative
            yield kind, name, Decision(True, {True: "yes", False: "no"}.get(value, str(value)))
