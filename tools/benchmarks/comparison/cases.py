"""Shapes of a comparison, and the configuration from which every contestant is built.

One *period* is one repetition of the mixer pattern (3 Gated DeltaNet layers and 1 attention layer, each with its
MoE). Models of one and of two periods are timed; their difference is one period without embedding, head and loss,
so that the vocabulary drops out and may be small.
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal

from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.recipe import RECIPES, configure

KINDS = ("ours", "stock", "transformers")
PERIODS = (1, 2)
Routing = Literal["balanced", "real"]
Part = Literal["step", "gated_delta_net"]


@dataclass(frozen=True)
class Contestant:
    """A way to run the model, in a precision: a part of recipes/precision/."""

    kind: str
    precision: str

    @property
    def label(self) -> str:
        """Return the name used in tables."""
        return self.kind if self.precision == "bf16" else f"{self.kind}:{self.precision}"


@dataclass(frozen=True)
class Case:
    """One row of the comparison: experts per layer, tokens of a sequence, tokens of a micro-batch."""

    # None: the recipe's number
    experts: int | None
    sequence_length: int
    tokens: int

    @property
    def label(self) -> str:
        """Return the name used in tables."""
        experts = f", {self.experts} experts" if self.experts else ""
        rows = self.tokens // self.sequence_length
        return f"{self.tokens:,} tokens = {rows} × {self.sequence_length:,}{experts}"


@dataclass(frozen=True)
class Setting:
    """Settings that all cases share: recipe, routing, vocabulary, and the user's overrides."""

    recipe: str
    routing: Routing
    vocabulary: int
    overrides: tuple[str, ...] = ()


def contestants_named(names: str, default_precision: str = "bf16") -> list[Contestant]:
    """Parse "ours,ours:fp8_tensorwise,stock".

    Raises: UserError for an unknown contestant or precision, or one named twice.
    """
    found = []
    precisions = sorted(path.stem for path in (RECIPES / "precision").glob("*.yaml"))
    for name in names.split(","):
        kind, _, precision = name.strip().partition(":")
        if kind not in KINDS:
            raise UserError(f"--contestants {name}: no such contestant; there are {', '.join(KINDS)}.")
        if precision and precision not in precisions:
            raise UserError(
                f"--contestants {name}: there is no recipes/precision/{precision}.yaml; "
                f"there are {', '.join(precisions)}."
            )
        if kind == "transformers" and precision.startswith("fp8"):
            raise UserError(f"--contestants {name}: transformers does not train in FP8; use bf16.")
        found.append(Contestant(kind, precision or default_precision))
    if len(set(found)) < len(found):
        raise UserError(f"--contestants {names}: one is named twice; name each once.")
    return found


def cases_of(experts: str | None, sequence_lengths: str, tokens: str | None) -> list[Case]:
    """Combine comma-separated lists. Without tokens, a micro-batch is one sequence.

    Raises: UserError where tokens are not whole sequences.
    """
    cases = []
    lengths = _numbers("--sequence-length", sequence_lengths)
    for count, length in product(_numbers("--experts", experts) if experts else [None], lengths):
        for total in _numbers("--tokens", tokens) if tokens else [length]:
            if total % length:
                raise UserError(
                    f"--tokens {total} with --sequence-length {length}: a micro-batch is whole sequences; "
                    "make it a multiple."
                )
            cases.append(Case(count, length, total))
    return cases


def config_of(setting: Setting, case: Case, contestant: Contestant, periods: int) -> RunConfig:
    """Compose the recipe for a case: without auxiliary losses, MTP and activation checkpointing, unless overridden.

    Raises: UserError for settings that exclude each other.
    """
    arguments = ["--config-name", setting.recipe]
    single_gpu = ["parallel=single", "training.recompute_granularity=null", "training.recompute_modules=[]"]
    pattern = configure([*arguments, *single_gpu, *setting.overrides]).model.mixer_pattern
    rows = case.tokens // case.sequence_length
    fixed = [
        *single_gpu,
        f"precision={contestant.precision}",
        f"model.num_layers={periods * len(pattern)}",
        f"model.vocab_size={setting.vocabulary}",
        # no data is read; the value must only be legal
        f"data.stdlib_vocab_size={min(512, setting.vocabulary)}",
        "model.mtp_num_layers=0",
        "model.moe_router_load_balancing_type=none",
        "model.moe_aux_loss_coeff=0",
        f"model.max_position_embeddings={max(case.sequence_length, 32768)}",
        f"training.sequence_length={case.sequence_length}",
        f"training.micro_batch_size={rows}",
        f"training.global_batch_size={rows}",
    ]
    if case.experts:
        fixed.append(f"model.num_moe_experts={case.experts}")
    if setting.routing == "balanced":
        fixed.append("model.megatron.moe_router_force_load_balancing=true")
    return configure([*arguments, *fixed, *setting.overrides])


def _numbers(option: str, text: str) -> list[int]:
    numbers = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in numbers):
        raise UserError(f"{option} {text}: give positive whole numbers, e.g. 4096,16384.")
    return [int(part) for part in numbers]
