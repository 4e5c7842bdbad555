"""What is measured inside the model while it trains, and which of the numbers raise an alert."""

from pydantic import Field

from megatron_q3n.config.section import Section


class InstrumentsConfig(Section):
    """A look inside the model at step 1 and every `interval_steps`: sinks, activations, norms, routers, decay.

    Between these steps nothing is measured, and a step is what it would be without instruments.
    """

    interval_steps: int = Field(100, ge=0, description="0: never")
    microbatches: int = Field(
        1,
        gt=0,
        description="of each rank's share of the batch, the first so many are looked at (interleaved pipeline stages: "
        "rounded up to what they need)",
    )


class AlertsConfig(Section):
    """When a number is worth telling somebody: in the log, in the report and through wandb. null: never."""

    pause_steps: int = Field(500, ge=0, description="an alert of one kind is not repeated within so many steps")
    loss_spike_deviations: float | None = Field(
        8.0,
        gt=0,
        description="training loss above the median of the last 100 steps by so many standard deviations (from the "
        "quartiles)",
    )
    dead_experts_share: float | None = Field(
        0.05, ge=0, lt=1, description="share of all experts without a token in the global batch, 20 steps in a row"
    )
    expert_load: float | None = Field(10.0, gt=1, description="fullest expert's tokens over its layer's mean")
    first_token_share: float | None = Field(
        0.3, gt=0, lt=1, description="attention that goes to the first token, worst layer"
    )
    activation_over_median: float | None = Field(
        1000.0,
        gt=1,
        description="largest activation over the median, worst layer (massive: arXiv 2402.17762 says 1,000)",
    )
    norm_scale: float | None = Field(10.0, gt=1, description="largest scale of any norm")
    growth_factor: float | None = Field(
        2.0,
        gt=1,
        description="sinks, massive activations or norms that have grown by so much over growth_steps, long before "
        "they reach the levels above; small ones do not count (metrics/alerts.py)",
    )
    growth_steps: int = Field(
        1000, gt=0, description="how far back growth looks; in a young run, half as far is enough"
    )
