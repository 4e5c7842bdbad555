"""Configuration of a run: every setting in frozen, typed sections, and the rules for valid combinations.

No import of torch, OmegaConf or megatron-core: an invalid setting is reported in well under two seconds.
"""

from megatron_q3n.config.errors import EXIT_BAD_INPUT, EXIT_HANG, EXIT_REQUEUE, RunInUseError, UserError, suggest
from megatron_q3n.config.model import GATED_ATTENTION, GATED_DELTA_NET, SLIDING_ATTENTION, ModelConfig
from megatron_q3n.config.run import RunConfig, default_tree, known_settings, validate

__all__ = [
    "EXIT_BAD_INPUT",
    "EXIT_HANG",
    "EXIT_REQUEUE",
    "GATED_ATTENTION",
    "GATED_DELTA_NET",
    "SLIDING_ATTENTION",
    "ModelConfig",
    "RunConfig",
    "RunInUseError",
    "UserError",
    "default_tree",
    "known_settings",
    "suggest",
    "validate",
]
