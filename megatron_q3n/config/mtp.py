"""How the multi-token prediction (MTP) layer is trained for drafting, in a stage of its own or inside another."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from megatron_q3n.config.errors import UserError
from megatron_q3n.config.section import Section
from megatron_q3n.config.sft import SftConfig

if TYPE_CHECKING:
    from megatron_q3n.config.run import RunConfig  # it imports this file


class MtpConfig(Section):
    """What the layer sees at each depth, what it is taught, and what of the model it may move."""

    method: Literal["stock", "inference"] = Field(
        "stock",
        description="stock: each depth reads keys and values of the depth before, and true tokens, as megatron-core "
        "trains; inference: what drafting reads, depth-1 keys and values of the prefix and those of its own drafts",
    )
    trunk: Literal["trained", "detached", "frozen"] = Field(
        "trained",
        description="detached: the layer's loss does not reach the trunk, which learns from its own; frozen: only the "
        "layer learns (stage mtp)",
    )
    own_drafts_start: float = Field(
        0.0, ge=0, le=1, description="share of anchors fed the model's own drafts, at the first step"
    )
    own_drafts_end: float = Field(1.0, ge=0, le=1, description="the same at the last step")
    after_wrong_draft: Literal["text", "skip"] = Field(
        "skip",
        description="text: deeper predictions after a draft that differs from the text are asked for the text all the "
        "same; skip: they do not count, as a rejected draft's successors never do",
    )
    label_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy with the text")
    distillation_weight: float = Field(
        0.0, ge=0, description="weight of the divergence from the model's own next-token distribution"
    )
    depth_weights: list[float] = Field(
        default_factory=list, description="relative weight of each depth's loss; empty: all the same"
    )
    acceptance_depth: int = Field(
        0,
        ge=0,
        description="validation drafts this deep and reports acceptance by the model's own distribution; 0: not",
    )

    @model_validator(mode="after")
    def _legal(self) -> "MtpConfig":
        if any(weight < 0 for weight in self.depth_weights) or (self.depth_weights and not sum(self.depth_weights)):
            raise UserError(
                f"mtp.depth_weights={self.depth_weights}: weights must be 0 or more, and one of them above."
            )
        if self.label_weight + self.distillation_weight == 0:
            raise UserError(
                "mtp.label_weight=0 and mtp.distillation_weight=0 leave nothing to learn; raise one of them."
            )
        if self.method == "stock":
            self._check_stock()
        return self

    def _check_stock(self) -> None:
        defaults = {
            "own_drafts_start": 0.0,
            "own_drafts_end": 1.0,
            "after_wrong_draft": "skip",
            "label_weight": 1.0,
            "distillation_weight": 0.0,
        }
        for name, value in defaults.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"mtp.{name}={getattr(self, name)} has no effect with mtp.method=stock; set mtp.method=inference."
                )


def check_mtp(config: "RunConfig") -> None:
    """Refuse what training for drafts cannot do, in any training stage.

    Raises: UserError.
    """
    mtp, model, depths = config.mtp, config.model, config.model.mtp_num_layers
    uses = config.stage == "mtp" or mtp != MtpConfig()
    if uses and depths == 0:
        raise UserError(
            "model.mtp_num_layers=0 builds no multi-token prediction layer to train or to draft with; set it to the "
            "number of depths."
        )
    if mtp.depth_weights and len(mtp.depth_weights) != depths:
        raise UserError(
            f"mtp.depth_weights has {len(mtp.depth_weights)} entries for model.mtp_num_layers={depths} depths; "
            "give one for each."
        )
    own_layers = depths > 1 and not model.mtp_use_repeated_layer
    if own_layers and (mtp.method == "inference" or mtp.acceptance_depth):
        raise UserError(
            f"model.mtp_num_layers={depths} layers of their own: drafts come from one layer that is repeated; set "
            "model.mtp_use_repeated_layer=true."
        )
    if mtp.trunk == "frozen" and config.stage != "mtp":
        raise UserError(
            f"mtp.trunk=frozen with stage={config.stage} would leave nothing of the stage; use detached, or stage=mtp."
        )
    if mtp.trunk == "frozen" and config.checkpoint.load is None:
        raise UserError(
            "mtp.trunk=frozen needs a trained trunk: say which with checkpoint.load=RUN_DIR (or a checkpoint in one)."
        )
    if config.stage == "mtp" and config.sft == SftConfig():
        return
    if config.stage == "mtp" and not config.sft.train:
        raise UserError(
            "stage=mtp with sft settings but no sft.train: name the conversations, or leave sft alone to use data."
        )
