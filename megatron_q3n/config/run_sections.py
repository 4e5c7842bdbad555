"""All sections of a run's configuration in one tree, and the sizes that follow from several of them.

`config/run.py` adds the rules between sections; they are kept apart so that the files of rules can import this one.
"""

from typing import Literal

from pydantic import Field

from megatron_q3n.config import launch
from megatron_q3n.config.callbacks import CallbackConfig
from megatron_q3n.config.data import DataConfig
from megatron_q3n.config.evaluate import EvaluateConfig
from megatron_q3n.config.health import HealthConfig
from megatron_q3n.config.inference import InferenceConfig
from megatron_q3n.config.instruments import AlertsConfig, InstrumentsConfig
from megatron_q3n.config.model import ModelConfig
from megatron_q3n.config.mtp import MtpConfig
from megatron_q3n.config.parallel import ParallelConfig
from megatron_q3n.config.paths import FilePath
from megatron_q3n.config.reporting import LoggingConfig, SampleConfig
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


class RunSections(Section):
    """Every setting of a run. `config.yaml` in the run directory holds exactly these, resolved."""

    stage: Literal["pretrain", "longcontext", "generate", "sft", "rl", "serve", "mtp", "evaluate"] = "pretrain"
    recipe: str = Field(
        "custom",
        pattern=r"^\w[\w .,+=()-]*$",
        max_length=100,
        description="name of the recipe, which begins the name of the run directory",
    )
    run_dir: FilePath | None = Field(
        None, description="this very directory (resumed if it holds a checkpoint); null: runs/<recipe>-<utc>-<id>"
    )
    runs_dir: FilePath = Field("runs", description="parent of new run directories")
    dry_run: bool = Field(False, description="validate and print the memory arithmetic per rank; build nothing")
    own_model_settings: list[str] | None = Field(
        None,
        description="names of the model settings that recipe or command line set, written when a run is composed; the "
        "others are those of checkpoint.load, and the vocabulary holds the tokenizer; null: those that differ from the "
        "defaults",
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    callbacks: list[CallbackConfig] = Field(
        default_factory=list, description="extensions of a training run (training/callbacks.py), called in this order"
    )
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

    @property
    def world_size(self) -> int:
        """Processes of this run: the launcher's WORLD_SIZE, the planned size, or one."""
        # read in any case, so that a variable that is no number is refused
        launched = launch.world_size()
        return launched if launch.has_rendezvous() else self.parallel.world_size or 1

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the dense model; at least 1, so that the rules on divisors are checked first."""
        return max(1, self.parallel.data_parallel_size(self.world_size))

    @property
    def num_microbatches(self) -> int:
        """Forward passes per optimizer step and rank."""
        return self.training.global_batch_size // (self.training.micro_batch_size * self.data_parallel_size)

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of a micro-batch on a rank in the sequence-parallel regions, where the experts are."""
        layout, training = self.parallel, self.training
        ranks = layout.tensor_model_parallel_size * layout.context_parallel_size
        return training.micro_batch_size * training.sequence_length // ranks

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.training.global_batch_size * self.training.sequence_length
