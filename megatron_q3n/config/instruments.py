"""Settings of the measurements inside the model while it trains, and of the alerts on metrics."""

from pydantic import Field

from megatron_q3n.config.section import Section


class InstrumentsConfig(Section):
    """Measurements at step 1 and every `interval_steps`: attention sinks, activations, norms, routers, decay.

    Steps in between are as without instruments.
    """

    interval_steps: int = Field(100, ge=0, description="steps between measurements; 0: none")
    global_rows: int = Field(
        8,
        gt=0,
        description="first rows of the global batch that are measured, the same in every layout; rounded up to whole "
        "micro-batches of all replicas (and to a multiple of interleaved pipeline stages)",
    )


class AlertsConfig(Section):
    """Thresholds of alerts, which appear in the log, in the report and in wandb. null: no alert."""

    pause_steps: int = Field(500, ge=0, description="steps for which an alert of one kind is not repeated")
    loss_spike_deviations: float | None = Field(
        8.0,
        gt=0,
        description="training loss above the median of the last 100 steps, in standard deviations (from the quartiles)",
    )
    dead_experts_share: float | None = Field(
        0.05,
        ge=0,
        lt=1,
        description="fraction of all experts without a token in the global batch, in 20 consecutive steps",
    )
    expert_load: float | None = Field(10.0, gt=1, description="tokens of the most loaded expert over its layer's mean")
    first_token_share: float | None = Field(
        0.3, gt=0, lt=1, description="fraction of attention on the first token, worst layer"
    )
    activation_over_median: float | None = Field(
        1000.0,
        gt=1,
        description="largest activation over the median, worst layer (massive: arXiv 2402.17762 says 1,000)",
    )
    norm_scale: float | None = Field(10.0, gt=1, description="largest scale of any norm")
    scoring_failures_share: float | None = Field(
        0.1, ge=0, lt=1, description="reinforcement learning: fraction of a rollout's responses whose scoring failed"
    )
    growth_factor: float | None = Field(
        2.0,
        gt=1,
        description="growth of sinks, massive activations or norms over growth_steps, before they reach the levels "
        "above; small values do not count (metrics/alerts.py)",
    )
    growth_steps: int = Field(
        1000, gt=0, description="steps over which growth is measured; half of them suffice early in a run"
    )
