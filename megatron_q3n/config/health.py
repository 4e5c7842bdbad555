"""What counts as trouble during training, and what is done about it."""

from typing import Literal

from pydantic import Field

from megatron_q3n.config.section import Section

Policy = Literal["skip", "roll_back", "stop"]


class HealthConfig(Section):
    """Bad steps, hangs and slow ranks.

    `skip` withholds the update; `roll_back` goes back to the newest checkpoint and leaves the batch out from then on;
    `stop` ends the run with exit code 2 and a message, the newest checkpoint untouched.
    """

    non_finite: Policy = Field("skip", description="a loss or gradient that is NaN or infinite")
    loss_spike: Literal["ignore", "skip", "roll_back", "stop"] = Field(
        "ignore", description="a loss or gradient norm far above those of the steps before"
    )
    spike_deviations: float = Field(
        10.0, gt=0, description="how far: standard deviations above the median, both from the window's quartiles"
    )
    spike_window_steps: int = Field(100, gt=4, description="sound steps that a new one is compared with")
    spike_minimum_steps: int = Field(20, gt=4, description="no spike is seen before so many sound steps")
    leave_out_batches: int = Field(
        1, gt=0, description="roll_back: batches to leave out, the bad one and those before it (since the checkpoint)"
    )
    max_troubles_in_a_row: int = Field(
        5, gt=0, description="bad steps in a row before the run stops whatever the policy"
    )
    max_roll_backs: int = Field(10, gt=0, description="over the whole run; the next one stops instead")
    hang_factor: float = Field(
        20.0, ge=0, description="no sign of life for this many median steps is a hang; 0: no watch"
    )
    hang_floor_seconds: float = Field(
        600.0, gt=0, description="but never sooner; a save or validation also has this long"
    )
    hang_start_seconds: float = Field(
        1800.0, gt=0, description="the same for the first step, which compiles and connects"
    )
    straggler_interval_steps: int = Field(
        50, ge=0, description="steps between reports of each rank's own time; 0: none"
    )
    straggler_ratio: float = Field(
        1.3, gt=1, description="a rank this many times slower than the median is named in the log"
    )
