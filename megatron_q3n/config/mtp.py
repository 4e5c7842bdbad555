"""Settings of multi-token prediction (MTP) training for drafting: section `mtp`, for stage mtp and for other stages."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_q3n.config.errors import UserError
from megatron_q3n.config.section import Section


class MtpConfig(Section):
    """Inputs of the MTP layer at each depth, its losses, and the parameters that these losses train."""

    method: Literal["stock", "inference"] = Field(
        "stock",
        description="stock: as megatron-core trains, each depth attends to keys and values of the depth before and "
        "is fed the text's tokens; inference: as in drafting, each depth attends to the depth-1 keys and values of the "
        "prefix and to those of its own drafts",
    )
    trunk: Literal["trained", "detached", "frozen"] = Field(
        "trained",
        description="trained: the MTP loss trains the whole model; detached: its gradient stops at the trunk, which is "
        "trained by the language-model loss only; frozen: only the MTP layer is trained (stage mtp)",
    )
    scheduled_sampling_start: float = Field(
        0.0,
        ge=0,
        le=1,
        description="scheduled sampling: probability at the first step that an anchor is fed the model's own drafts "
        "instead of the text's tokens (teacher forcing); it changes linearly over the run",
    )
    scheduled_sampling_end: float = Field(1.0, ge=0, le=1, description="the same probability at the last step")
    after_wrong_draft: Literal["teacher_forcing", "mask"] = Field(
        "mask",
        description="label loss at the depths after a draft that differs from the text; teacher_forcing: the text "
        "stays the label; mask: the loss is masked, because verification discards what follows a rejected draft",
    )
    label_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy with the text's tokens")
    distillation_weight: float = Field(
        0.0, ge=0, description="weight of the KL divergence from the model's own next-token distribution"
    )
    depth_weights: list[float] = Field(
        default_factory=list, description="relative weight of each depth's loss; empty: equal weights"
    )
    acceptance_depth: int = Field(
        0,
        ge=0,
        description="draft depth of the acceptance measurement in validation, by the model's own distribution; 0: none",
    )

    @model_validator(mode="after")
    def _legal(self) -> "MtpConfig":
        if any(weight < 0 for weight in self.depth_weights) or (self.depth_weights and not sum(self.depth_weights)):
            raise UserError(
                f"mtp.depth_weights={self.depth_weights}: every weight must be 0 or more, and at least one above 0."
            )
        if self.label_weight + self.distillation_weight == 0:
            raise UserError("mtp.label_weight=0 and mtp.distillation_weight=0 leave no loss; raise one of them.")
        if self.method == "stock":
            self._check_stock()
        return self

    def _check_stock(self) -> None:
        defaults = {
            "scheduled_sampling_start": 0.0,
            "scheduled_sampling_end": 1.0,
            "after_wrong_draft": "mask",
            "label_weight": 1.0,
            "distillation_weight": 0.0,
        }
        for name, value in defaults.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"mtp.{name}={getattr(self, name)} has no effect with mtp.method=stock; set mtp.method=inference."
                )
