"""The whole configuration of a run, and the rules that span its sections."""

import re
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from megatron_q3n.config import launch
from megatron_q3n.config.data import DataConfig
from megatron_q3n.config.errors import UserError, suggest
from megatron_q3n.config.evaluate import EvaluateConfig, check_evaluate
from megatron_q3n.config.health import HealthConfig
from megatron_q3n.config.inference import InferenceConfig
from megatron_q3n.config.instruments import AlertsConfig, InstrumentsConfig
from megatron_q3n.config.model import ModelConfig
from megatron_q3n.config.mtp import MtpConfig, check_mtp
from megatron_q3n.config.parallel import ParallelConfig
from megatron_q3n.config.post_training import check_rl, check_sft
from megatron_q3n.config.rl import RlConfig
from megatron_q3n.config.section import Section
from megatron_q3n.config.serve import ServeConfig
from megatron_q3n.config.sft import SftConfig
from megatron_q3n.config.training import (
    CheckpointConfig,
    OptimizerConfig,
    PrecisionConfig,
    ScheduleConfig,
    TrainingConfig,
    ValidationConfig,
)


class WandbConfig(Section):
    """Weights & Biases; offline runs are uploaded later with `wandb sync`."""

    mode: Literal["auto", "offline", "online", "disabled"] = Field(
        "auto", description="auto: online when the user is logged in, else offline"
    )
    project: str = "megatron_q3n"
    entity: str | None = None
    tags: list[str] = Field(default_factory=list)


class LoggingConfig(Section):
    """What a run shows while it runs."""

    progress: bool | None = Field(None, description="live progress bar; null: when stdout is a terminal")
    interval_steps: int = Field(10, gt=0, description="steps between lines of the log when there is no progress bar")
    wandb: WandbConfig = WandbConfig()


class SampleConfig(Section):
    """Text generated at the end of a run, for the report."""

    count: int = Field(3, ge=0)
    tokens: int = Field(96, gt=0)
    temperature: float = Field(0.7, ge=0, description="0 is greedy")
    prompts: list[str] = Field(default_factory=lambda: ["def ", "class ", "import "])


# cuDNN 9.19's attention backward, captured at 255 tokens, copies from a host buffer that it frees at once: replays
# compute with garbage. 256, 384 and more are clean (H200); training/step_graph.py looks at every graph all the same.
GRAPH_SEQUENCE_MULTIPLE = 128


class RunConfig(Section):
    """Everything a run needs to know. `config.yaml` in the run directory is exactly this, resolved."""

    stage: Literal["pretrain", "longcontext", "generate", "sft", "rl", "serve", "mtp", "evaluate"] = "pretrain"
    recipe: str = Field("custom", description="name of the recipe, for the run directory")
    run_dir: str | None = Field(
        None, description="this very directory (resumed if it holds a checkpoint); null: runs/<recipe>-<utc>-<id>"
    )
    runs_dir: str = Field("runs", description="parent of new run directories")
    dry_run: bool = Field(False, description="validate and print the memory arithmetic per rank; build nothing")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    instruments: InstrumentsConfig = InstrumentsConfig()
    alerts: AlertsConfig = AlertsConfig()
    logging: LoggingConfig = LoggingConfig()
    samples: SampleConfig = SampleConfig()
    inference: InferenceConfig = InferenceConfig()
    sft: SftConfig = SftConfig()
    mtp: MtpConfig = MtpConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    rl: RlConfig = RlConfig()
    serve: ServeConfig = ServeConfig()

    @model_validator(mode="after")
    def _legal(self) -> "RunConfig":
        self.parallel.check_against(self.model, self.training.sequence_length, self.world_size)
        self._check_start()
        if self.stage == "evaluate":
            check_evaluate(self)
        if self.stage in ("generate", "serve", "evaluate"):
            return self  # what follows is about training
        self._check_batch()
        self._check_schedule()
        self._check_recompute()
        self._check_graph()
        self._check_fp8()
        self._check_data()
        check_mtp(self)
        if self.stage == "sft" or (self.stage == "mtp" and self.sft.train):
            check_sft(self)
        if self.stage == "rl":
            check_rl(self)
        return self

    def _check_start(self) -> None:
        if self.stage == "longcontext" and self.checkpoint.load is None:
            raise UserError(
                "stage=longcontext continues a trained model: say which with checkpoint.load=RUN_DIR "
                "(or a checkpoint in one, e.g. checkpoint.load=runs/latest)."
            )
        if self.stage in ("generate", "serve") and self.checkpoint.load is None:
            raise UserError(
                f"stage={self.stage} needs a trained model: say which with checkpoint.load=RUN_DIR "
                "(or a checkpoint in one, e.g. checkpoint.load=runs/latest)."
            )
        if self.checkpoint.load_optimizer and self.checkpoint.load is None:
            raise UserError("checkpoint.load_optimizer=true has no effect without checkpoint.load.")

    def _check_batch(self) -> None:
        training, layout = self.training, self.parallel
        if training.sequence_length > self.model.max_position_embeddings:
            raise UserError(
                f"training.sequence_length={training.sequence_length} is more than "
                f"model.max_position_embeddings={self.model.max_position_embeddings}; "
                "raise the latter or shorten."
            )
        per_pass = training.micro_batch_size * self.data_parallel_size
        if training.global_batch_size % per_pass:
            raise UserError(
                f"training.global_batch_size={training.global_batch_size} is not divisible by "
                f"training.micro_batch_size={training.micro_batch_size} × data parallel size "
                f"{self.data_parallel_size} (= {per_pass}); make it a multiple."
            )
        pipeline = layout.pipeline_model_parallel_size
        if layout.virtual_pipeline_model_parallel_size and self.num_microbatches % pipeline:
            raise UserError(
                f"{self.num_microbatches} micro-batches per step are not divisible by "
                f"parallel.pipeline_model_parallel_size={pipeline}, as interleaved stages need; "
                "change training.global_batch_size or training.micro_batch_size."
            )

    def _check_schedule(self) -> None:
        schedule, steps = self.schedule, self.training.steps
        if schedule.warmup_steps >= steps and schedule.warmup_steps:
            raise UserError(f"schedule.warmup_steps={schedule.warmup_steps} must be below training.steps={steps}.")
        if schedule.style == "wsd" and schedule.warmup_steps + (schedule.decay(steps) or 0) > steps:
            raise UserError(
                f"schedule.warmup_steps={schedule.warmup_steps} + "
                f"schedule.decay_steps={schedule.decay(steps)} is more than training.steps={steps}; "
                "shorten one of them."
            )

    def _check_fp8(self) -> None:
        """Refuse what FP8's matrix products cannot take: every dimension of theirs on a rank is a multiple of 16, for
        mxfp8 of 32."""
        if self.precision.fp8 is None:
            return
        model, layout = self.model, self.parallel
        tensor, context = layout.tensor_model_parallel_size, layout.context_parallel_size
        heads = f" / parallel.tensor_model_parallel_size={tensor}" if tensor > 1 else ""
        gated = 2 if model.gate_lies_with_queries else 1
        key, value = (
            model.linear_num_key_heads * model.linear_key_head_dim,
            model.linear_num_value_heads * model.linear_value_head_dim,
        )
        queries, groups = model.num_attention_heads, model.num_query_groups
        tokens = self.training.micro_batch_size * self.training.sequence_length
        products = {
            "tokens of a micro-batch (training.micro_batch_size × sequence_length)": (tokens, context),
            "model.hidden_size": (model.hidden_size, 1),
            f"q|k|v|z of Gated DeltaNet{heads}": (2 * key + 2 * value, tensor),
            f"the values of Gated DeltaNet{heads}": (value, tensor),
            f"q|k|v of gated attention{heads}": ((gated * queries + 2 * groups) * model.kv_channels, tensor),
            f"the output of gated attention{heads}": (queries * model.kv_channels, tensor),
            f"model.moe_shared_expert_intermediate_size{heads}": (model.moe_shared_expert_intermediate_size, tensor),
        }
        multiple = 32 if self.precision.fp8_recipe == "mxfp8" else 16
        for what, (size, cut) in products.items():
            if size % (multiple * cut):
                raise UserError(
                    f"precision.fp8={self.precision.fp8}: {what} is {size // cut} on a rank, and FP8's matrix "
                    f"products take multiples of {multiple}; change it, or set precision.fp8=null."
                )

    def graph_obstacle(self) -> str | None:
        """Say what keeps a step's passes from becoming one CUDA graph; None when nothing does."""
        layout = self.parallel
        if layout.model_parallel_size * layout.expert_model_parallel_size > 1:
            return "tensor, pipeline, context and expert parallelism communicate inside the passes"
        if layout.expert_tensor_parallel_size > 1:
            return "expert tensor parallelism communicates inside the passes"
        if layout.overlap_grad_reduce:
            return "parallel.overlap_grad_reduce=true communicates inside the passes"
        if self.stage in ("sft", "rl") or (self.stage == "mtp" and self.sft.train):
            return f"stage={self.stage} packs conversations, and every batch has other shapes"
        if self.data.mask_document_boundaries:
            return "data.mask_document_boundaries=true gives every batch other shapes"
        if self.training.recompute_granularity is not None:
            return "recompute saves and restores random states on the host"
        if self.training.sequence_length % GRAPH_SEQUENCE_MULTIPLE:
            return (
                f"training.sequence_length={self.training.sequence_length} is not a multiple of "
                f"{GRAPH_SEQUENCE_MULTIPLE}, and there cuDNN's attention copies from the host"
            )
        return None

    def _check_graph(self) -> None:
        obstacle = self.graph_obstacle()
        if self.training.cuda_graph and obstacle:
            raise UserError(f"training.cuda_graph=true: {obstacle}; set it false or change the other setting.")

    def _check_recompute(self) -> None:
        if self.precision.fp8 and "moe_act" in self.training.recompute_modules:
            raise UserError(
                "training.recompute_modules=[moe_act] has no effect with precision.fp8: the FP8 experts keep their "
                "activations for the weight gradient; use moe, or leave it out."
            )
        method, sublayers = self.training.recompute_method, self.training.recompute_num_layers
        full = self.training.recompute_granularity == "full"
        if full and self.model.mtp_num_layers and (method, sublayers) != ("uniform", 1):
            raise UserError(
                f"training.recompute_method={method} with training.recompute_num_layers={sublayers}: "
                "megatron-core recomputes MTP layers only with uniform and 1; set these, or "
                "model.mtp_num_layers=0."
            )

    def _check_data(self) -> None:
        if self.data.source == "stdlib" and self.data.stdlib_vocab_size > self.model.vocab_size:
            raise UserError(
                f"data.stdlib_vocab_size={self.data.stdlib_vocab_size} is more than "
                f"model.vocab_size={self.model.vocab_size}; the model needs a row for every token."
            )
        if not self.data.mask_document_boundaries:
            return
        if self.training.micro_batch_size != 1:
            raise UserError(
                "data.mask_document_boundaries=true packs documents into one row: "
                f"training.micro_batch_size must be 1, found {self.training.micro_batch_size}. "
                "Use a longer sequence or more micro-batches instead."
            )
        alignment, context = self.data.document_alignment, self.parallel.context_parallel_size
        if context > 1 and alignment % (2 * context):
            raise UserError(
                f"data.document_alignment={alignment} must be a multiple of 2 × "
                f"parallel.context_parallel_size={context} (= {2 * context}): every document is cut "
                "into so many equal chunks."
            )
        if self.training.sequence_length % alignment:
            raise UserError(
                f"training.sequence_length={self.training.sequence_length} is not divisible by "
                f"data.document_alignment={alignment}; make it a multiple."
            )

    @property
    def world_size(self) -> int:
        """Processes of this run: the launcher's WORLD_SIZE, the planned size, or one."""
        return launch.world_size() if launch.has_neighbours() else self.parallel.world_size or 1

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the dense model; at least 1 so that the divisor rules can speak first."""
        return max(1, self.parallel.data_parallel_size(self.world_size))

    @property
    def num_microbatches(self) -> int:
        """Forward passes per optimizer step and rank."""
        return self.training.global_batch_size // (self.training.micro_batch_size * self.data_parallel_size)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.training.global_batch_size * self.training.sequence_length


def default_tree() -> dict[str, Any]:
    """Return every default as a plain tree, unchecked: a recipe may be legal in a world the defaults are not."""
    return RunConfig.model_construct().model_dump(mode="json")


def known_settings(section: type[Section] = RunConfig, prefix: str = "") -> list[str]:
    """Return every dotted setting name, e.g. "training.steps"."""
    names = []
    for name, field in section.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            names += known_settings(field.annotation, f"{prefix}{name}.")
    return names


def validate(tree: dict[str, Any]) -> RunConfig:
    """Turn a composed plain tree into a frozen RunConfig.

    Raises: UserError with one line per problem: where, what was found, what is allowed.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(problem) for problem in error.errors())) from None


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    original = problem.get("ctx", {}).get("error")
    if isinstance(original, UserError):
        return str(original)
    if problem["type"] == "extra_forbidden":
        return f"{where}: no such setting.{suggest(where, known_settings())}"
    reason = re.sub(r"^Value error, ", "", problem["msg"])
    return f"{where}={problem['input']!r}: {reason[0].lower()}{reason[1:]}."
