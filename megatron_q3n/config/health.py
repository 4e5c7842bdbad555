"""Settings of health: which steps, pauses and ranks are bad during training, and what is done about them."""

from typing import Literal

from pydantic import Field

from megatron_q3n.config.section import Section

Policy = Literal["skip", "roll_back", "stop"]


class HealthConfig(Section):
    """Policies for non-finite steps and loss spikes, hang detection, and the report of slow ranks (stragglers).

    `skip` withholds the update; `roll_back` returns to the newest checkpoint and skips the batch from then on (in RL
    the rollout); `stop` ends the run with exit code 2 and a message, the newest checkpoint untouched.
    """

    non_finite: Policy = Field("skip", description="a loss or gradient that is NaN or infinite")
    loss_spike: Literal["ignore", "skip", "roll_back", "stop"] = Field(
        "ignore", description="a loss or gradient norm far above those of the preceding steps"
    )
    spike_deviations: float = Field(
        10.0,
        gt=0,
        description="threshold of a spike: standard deviations above the median, both from the window's quartiles",
    )
    spike_window_steps: int = Field(
        100, gt=4, description="number of preceding sound steps that a new one is compared with"
    )
    spike_min_steps: int = Field(20, gt=4, description="sound steps before spikes are detected")
    skip_batches: int = Field(
        1,
        gt=0,
        description="roll_back: batches to skip, the bad one and those before it since the checkpoint; in RL rollouts",
    )
    max_consecutive_bad_steps: int = Field(
        5, gt=0, description="consecutive bad steps after which the run stops, whatever the policy"
    )
    max_roll_backs: int = Field(10, gt=0, description="roll-backs of the whole run; the next one stops it instead")
    hang_factor: float = Field(
        20.0, ge=0, description="a hang is no progress for this many median step times; 0: no hang detection"
    )
    hang_min_seconds: float = Field(
        600.0, gt=0, description="lower limit of that time; must also suffice for a save or a validation"
    )
    hang_startup_seconds: float = Field(
        1800.0, gt=0, description="time limit up to the first step, which includes loading and compilation"
    )
    straggler_interval_steps: int = Field(
        50, ge=0, description="steps between comparisons of the ranks' own compute times; 0: none"
    )
    straggler_ratio: float = Field(
        1.3, gt=1, description="a rank slower than the median by this factor is named in the log"
    )
