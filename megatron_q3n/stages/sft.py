"""Supervised fine-tuning stage: the training run of pretraining on packed conversations."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_q3n.config import RunConfig
from megatron_q3n.data.folders import cache_root
from megatron_q3n.data.loss_display import loss_display
from megatron_q3n.data.sft import SftData
from megatron_q3n.data.tokenized_conversations import tokenized_conversations
from megatron_q3n.stages import chat_format
from megatron_q3n.stages.pretrain import PretrainStage
from megatron_q3n.stages.session import Session
from megatron_q3n.training.fit import FitResult
from megatron_q3n.training.loop_hooks import LoopHooks


class SftStage(PretrainStage):
    """Stage that trains on conversations, and first shows which tokens of one of them have a loss."""

    def train(self, hooks: LoopHooks) -> FitResult:
        """Show a conversation, and train on the batches."""
        # SftData has the interface of PretrainData and more
        data: Any = self.data
        self.session.recorder.note(*loss_display(data.train[0], data.tokenizer))
        return super().train(hooks)


def run(config: RunConfig, run_dir: Path) -> int:
    """Fine-tune and report; also trains the MTP layer on conversations.

    Returns: 0 when all steps are done, 75 when stopped early with everything saved.
    """
    return Session(config, run_dir, SftStage(partial(build_sft_data, run_dir=run_dir))).run()


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
