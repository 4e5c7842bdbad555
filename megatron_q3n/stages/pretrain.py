"""Pretraining stage, also for continued pretraining and longer context: data, throughput, samples and baseline."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_q3n import run_directory
from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.config.sizes import flops_per_token, parameters
from megatron_q3n.conversion.run_tokenizer import run_tokenizer
from megatron_q3n.data.bigram import witten_bell_bits_per_byte
from megatron_q3n.data.pretrain import PretrainData, build_pretrain_data
from megatron_q3n.data.run_inputs import data_sections
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.device import measured_matmul_flops
from megatron_q3n.metrics import jsonl
from megatron_q3n.metrics.meters import throughput
from megatron_q3n.metrics.recorder import RECORDS_FILE
from megatron_q3n.stages import trained_model
from megatron_q3n.stages.samples import sample_texts, share_of_python_lines
from megatron_q3n.stages.session import Session
from megatron_q3n.training.callbacks import Callback
from megatron_q3n.training.fit import FitResult, fit
from megatron_q3n.training.loop_hooks import LoopHooks


def run(config: RunConfig, run_dir: Path, build_data: Callable[..., Any] = build_pretrain_data) -> int:
    """Train and report. `build_data` builds the batches; fine-tuning brings its own.

    Returns: 0 when all steps are done, 75 when stopped early with everything saved.
    """
    return Session(config, run_dir, PretrainStage(build_data)).run()


class PretrainStage:
    """Stage that trains on batches of a data set (training/fit.py)."""

    loss_metric = "loss/train"
    session: Session
    data: PretrainData

    def __init__(self, build_data: Callable[..., Any]) -> None:
        self._build_data = build_data

    def load_data(self, session: Session) -> None:
        """Build the data set; the leader first, into the cache that the other ranks read."""
        self.session, group = session, session.group
        self.data = self._build_data(session.config, is_leader=group.is_leader, barrier=group.barrier)
        if session.config.checkpoint.load is not None and data_sections(session.config) == ["data"]:
            check_same_tokenizer(session.config, self.data.tokenizer)

    def build(self, session: Session) -> list[Callback]:
        """Build nothing: the loop needs state and data only."""
        return []

    def introduction(self) -> list[str]:
        """Return the lines on data and number of tokens."""
        config, facts = self.session.config, self.data.describe()
        sources = ", ".join(f"{p['path']} ({p['tokens']:,} tokens, {p['epochs']:.2f} passes)" for p in facts["train"])
        held_out = ", ".join(f"{p['path']} ({p['tokens']:,} tokens)" for p in facts["validation"])
        steps, tokens = config.training.steps, config.tokens_per_step
        return [
            f"data {sources}; vocabulary {facts['tokenizer']['vocab_size']}",
            f"validation {held_out}",
            f"training {steps} steps × {tokens:,} tokens = {steps * tokens:,}",
        ]

    def train(self, hooks: LoopHooks) -> FitResult:
        """Train on the batches."""
        config, session = self.session.config, self.session
        flops = flops_per_token(config.model, config.training.sequence_length).total
        peak_flops = measured_matmul_flops(session.device, session.group.world_size)
        tokens = config.tokens_per_step
        return fit(session.state, self.data, hooks, lambda seconds: throughput(tokens, seconds, flops, peak_flops))

    def conclude(self, result: FitResult) -> None:
        """Write summary.json, expert load, samples and the comparison with the bigram baseline."""
        session, run_dir = self.session, self.session.run_dir
        config, state = session.config, session.state
        if result.validation_loss is None:
            _read_validation(result, run_dir)
        count = parameters(config.model)
        summary = {
            "steps": state.step,
            "tokens": state.tokens,
            "seconds": time.monotonic() - session.started,
            "parameters": count.total_with_mtp,
            "active_parameters": count.active_with_embeddings,
            "validation_loss": result.validation_loss,
            "bits_per_byte": result.bits_per_byte,
        }
        if result.expert_load:
            run_directory.write_expert_load(run_dir, state.step, result.expert_load)
        summary |= self._sample()
        if config.validation.bigram_baseline and result.bits_per_byte is not None:
            summary |= self._compare_with_bigram(result.bits_per_byte)
        run_directory.write_json(run_dir / "summary.json", summary)

    def _sample(self) -> dict[str, float]:
        """Write samples.json. Returns: how many lines of Python are valid, if the text is Python."""
        session, config = self.session, self.session.config
        samples = []
        if config.parallel.model_parallel_size == 1 and config.parallel.expert_model_parallel_size == 1:
            model = session.state.models[0]
            samples = sample_texts(model, self.data.tokenizer, config.samples, config.training.seed)
        else:
            session.note("no samples: generation needs the whole model in one process for now")
        run_directory.write_json(session.run_dir / "samples.json", samples)
        if not samples or config.data.source != "stdlib":
            return {}
        accepted, lines = share_of_python_lines(samples)
        session.note(f"{accepted} of {lines} sampled lines of 20 characters or more pass Python's tokenizer")
        return {"python_lines_accepted": accepted, "python_lines": lines}

    def _compare_with_bigram(self, bits_per_byte: float) -> dict[str, float]:
        """Fit the bigram on exactly the tokens of this run, evaluate it on the same validation tokens, and log both."""
        session, data = self.session, self.data
        bigram = witten_bell_bits_per_byte(
            data.train_sample_tokens(session.state.step * session.config.training.global_batch_size),
            data.validation_sample_tokens(),
            data.tokenizer.vocab_size,
            data.tokenizer.token_num_bytes(),
        )
        name = "Witten-Bell bigram on the same tokens"
        baseline = {"name": name, "bits_per_byte": bigram.bits_per_byte, "bits_per_token": bigram.bits_per_token}
        run_directory.write_json(session.run_dir / "baseline.json", baseline)
        below = 100 * (1 - bits_per_byte / bigram.bits_per_byte)
        assert math.isfinite(below)
        session.note(
            f"validation {bits_per_byte:.4f} bits per byte, {abs(below):.1f} % {'below' if below > 0 else 'above'} "
            f"the {name} ({bigram.bits_per_byte:.4f})"
        )
        return {"bigram_bits_per_byte": bigram.bits_per_byte, "percent_below_bigram": below}


def check_same_tokenizer(config: RunConfig, tokenizer: TextTokenizer) -> None:
    """Check that continued pretraining reads text of the tokenizer that the start checkpoint was trained with.

    Raises: UserError if it is another one, or unknown, and `checkpoint.load_other_tokenizer` does not allow it.
    """
    if config.checkpoint.load_other_tokenizer:
        return
    source = trained_model.find_checkpoint(config)
    if run_tokenizer(source) is None:
        raise UserError(
            f"{source} does not say which tokenizer it was trained with, so the text of `data` cannot be compared. "
            "If it is the right text, allow it with checkpoint.load_other_tokenizer=true."
        )
    before = trained_model.checkpoint_tokenizer(source, None)
    if before.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"checkpoint.load={source} was trained with the tokenizer {before.fingerprint[:12]}… "
            f"({before.vocab_size} entries), and the text of `data` was made with {tokenizer.fingerprint[:12]}… "
            f"({tokenizer.vocab_size} entries): the same ids would mean other tokens. Prepare the text with the "
            "checkpoint's tokenizer, or allow it with checkpoint.load_other_tokenizer=true."
        )


def _read_validation(result: FitResult, run_dir: Path) -> None:
    """Take the last validation from the records, if an earlier process took the last step and was killed after it."""
    last = jsonl.read(run_dir / RECORDS_FILE)[-1]
    result.validation_loss = last.get("loss/validation")
    result.bits_per_byte = last.get("bits_per_byte/validation")
