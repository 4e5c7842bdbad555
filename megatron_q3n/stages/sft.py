"""Supervised fine-tuning stage: the training run of pretraining on packed conversations."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_q3n.config import RunConfig
from megatron_q3n.data.folders import cache_root
from megatron_q3n.data.sft import SftData
from megatron_q3n.data.tokenized_conversations import tokenized_conversations
from megatron_q3n.stages import chat_format, pretrain


def run(config: RunConfig, run_dir: Path) -> int:
    """Fine-tune and report.

    Returns: 0 when all steps are done, 75 when stopped early with everything saved.
    """
    return pretrain.run(config, run_dir, partial(build_sft_data, run_dir=run_dir))


def build_sft_data(config: RunConfig, *, is_leader: bool, barrier: Callable[[], None], run_dir: Path) -> SftData:
    """Tokenize and pack the conversations; the leader first, into the cache that the other ranks read.

    Raises: UserError for invalid conversations, or if none fits.
    """
    if not is_leader:
        barrier()
    tokenizer, template = chat_format.load_chat_format(config, run_dir)
    train, validation = tokenized_conversations(
        config.sft, template, config.training.sequence_length, cache_root(config.data.cache_dir), tokenizer.fingerprint
    )
    if is_leader:
        chat_format.save(run_dir, tokenizer, template)
        barrier()
    return SftData.of(config, tokenizer, train, validation)
