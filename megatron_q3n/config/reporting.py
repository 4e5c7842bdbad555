"""Settings of what a run shows: its log, Weights & Biases, and sample texts."""

from typing import Literal

from pydantic import Field

from megatron_q3n.config.sampling import Temperature
from megatron_q3n.config.section import Section


class WandbConfig(Section):
    """Weights & Biases; offline runs are uploaded later with `wandb sync`."""

    mode: Literal["auto", "offline", "online", "disabled"] = Field(
        "auto", description="auto: online when the user is logged in, else offline"
    )
    project: str = "megatron_q3n"
    entity: str | None = None
    tags: list[str] = Field(default_factory=list)


class LoggingConfig(Section):
    """Progress bar, log lines and Weights & Biases."""

    progress: bool | None = Field(None, description="live progress bar; null: when stdout is a terminal")
    interval_steps: int = Field(10, gt=0, description="steps between lines of the log when there is no progress bar")
    wandb: WandbConfig = WandbConfig()


class SampleConfig(Section):
    """Text generated at the end of a run, for the report."""

    count: int = Field(3, ge=0)
    tokens: int = Field(96, gt=0)
    temperature: Temperature = Field(0.7, description="0.001 to 1000; 0 is greedy")
    prompts: list[str] = Field(default_factory=lambda: ["def ", "class ", "import "])
