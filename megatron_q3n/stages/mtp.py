"""MTP stage: trains the multi-token prediction layer to draft, on text or on conversations."""

from pathlib import Path

from megatron_q3n.config import RunConfig
from megatron_q3n.data.pretrain import build_pretrain_data
from megatron_q3n.stages import pretrain, sft


def run(config: RunConfig, run_dir: Path) -> int:
    """Train the layer and report; on conversations if `sft.train` is set, to adapt it after fine-tuning or RL.

    Returns: 0 when all steps are done, 75 when stopped early with everything saved.
    """
    if config.sft.train:
        return sft.run(config, run_dir)
    return pretrain.run(config, run_dir, build_pretrain_data)
