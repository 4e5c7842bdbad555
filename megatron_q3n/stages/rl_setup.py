"""Construction of the reinforcement learning loop from a configuration: prompts, rollout engine, reference policy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_q3n import checkpoint
from megatron_q3n.config import RunConfig
from megatron_q3n.config.rl import RlConfig
from megatron_q3n.data.chat_template import ChatTemplate
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.rl.http_engine import HttpEngine
from megatron_q3n.rl.loop import RlLoop
from megatron_q3n.rl.prompts import Part, Prompts
from megatron_q3n.rl.reference_policy import ReferencePolicy
from megatron_q3n.rl.reward_workers import RewardWorkers
from megatron_q3n.rl.rollout_engine import InProcessEngine, RolloutEngine
from megatron_q3n.stages.weight_sync import WeightSync
from megatron_q3n.training.state import TrainState


def build_loop(
    state: TrainState,
    run_dir: Path,
    reward_workers: RewardWorkers,
    tokenizer: TextTokenizer,
    template: ChatTemplate,
    heartbeat: Callable[[], object],
) -> RlLoop:
    """Build the loop; `heartbeat` is called after every forward pass of generation.

    With a KL penalty this loads the reference weights into the model, so call it before the run's own weights are
    loaded.
    Raises: UserError for invalid prompts.
    """
    rl = state.config.rl
    stop_tokens = frozenset({tokenizer.eod, template.end_of_turn})
    max_tokens, seed = _max_prompt_tokens(state.config), state.config.training.seed
    part: Part = "train" if _holds_out_share(rl) else "all"
    prompts = Prompts(
        rl.prompts, template, max_tokens=max_tokens, seed=seed, part=part, held_out_percent=rl.held_out_percent
    )
    engine = _engine(state, run_dir, tokenizer, stop_tokens, heartbeat)
    reference = _reference(state) if rl.kl_coefficient else None
    return RlLoop(state, engine, reward_workers, prompts, tokenizer, stop_tokens, reference)


def held_out_prompts(config: RunConfig, template: ChatTemplate) -> Prompts | None:
    """Return the prompts on which accuracy is evaluated: `rl.held_out`, a share of `rl.prompts`, or None."""
    rl, max_tokens = config.rl, _max_prompt_tokens(config)
    if rl.held_out:
        return Prompts(rl.held_out, template, max_tokens=max_tokens, seed=0, shuffled=False, name="rl.held_out")
    if not _holds_out_share(rl):
        return None
    percent = rl.held_out_percent
    return Prompts(
        rl.prompts, template, max_tokens=max_tokens, seed=0, shuffled=False, part="held_out", held_out_percent=percent
    )


def _holds_out_share(rl: RlConfig) -> bool:
    return not rl.held_out and rl.held_out_percent > 0


def introduction(loop: RlLoop, held_out: Prompts | None) -> list[str]:
    """Return the lines on prompts and algorithm that are logged when the run starts."""
    rules, rollout = loop.settings.rules, loop.settings.rollout
    too_long = f", {loop.prompts.num_too_long} too long" if loop.prompts.num_too_long else ""
    return [
        f"prompts {len(loop.prompts)}{too_long}; {rollout.prompts} × {rollout.samples_per_prompt} samples a rollout, "
        f"{loop.settings.updates_per_rollout} update(s) each, {rollout.engine} engine",
        "held out " + ("no prompts: rl.held_out_percent=0" if held_out is None else held_out.describe()),
        f"{loop.settings.algorithm}: {rules.ratio} ratio, clipped {rules.clip_low:g} below and {rules.clip_high:g} "
        f"above 1, normalized by {rules.normalisation}; routing replay "
        f"{'on' if loop.settings.routing_replay else 'off'}",
    ]


def isolation_lines(isolation: dict[str, Any]) -> list[str]:
    """Return the lines on what confines the scoring worker processes, with a warning where something is missing."""
    lines = [
        f"reward workers: namespaces {isolation['namespaces']}; files {isolation['files']}; "
        f"network {isolation['network']}; {isolation['user']}"
    ]
    if isolation["missing"]:
        lines.append(
            f"warning: this machine does not isolate {', '.join(isolation['missing'])} from the evaluation of "
            f"responses ({'; '.join(isolation['refused'])}); docs/security/reward-workers.md says what to allow"
        )
    return lines


def _engine(
    state: TrainState,
    run_dir: Path,
    tokenizer: TextTokenizer,
    stop_tokens: frozenset[int],
    heartbeat: Callable[[], object],
) -> RolloutEngine:
    rl, seed = state.config.rl, state.config.training.seed
    if rl.rollout.engine == "http":
        folder = Path(rl.rollout.weight_sync_dir) if rl.rollout.weight_sync_dir else None
        sync = WeightSync(state, run_dir, folder)
        return HttpEngine(state.parallel, rl.rollout, stop_tokens, tokenizer.vocab_size, seed, sync)
    return InProcessEngine(
        state.models[0],
        state.parallel,
        rl.rollout,
        stop_tokens,
        tokenizer.vocab_size,
        seed,
        records_routes=True,
        heartbeat=heartbeat,
    )


def _max_prompt_tokens(config: RunConfig) -> int:
    """Return the length of the longest prompt that fits into a packed row together with a response."""
    return config.training.sequence_length + 1 - config.rl.rollout.max_new_tokens


def _reference(state: TrainState) -> ReferencePolicy:
    """Return the weights the run was started from; a resumed run loads them again."""
    load = state.config.checkpoint.load
    if load is not None:
        checkpoint.load(state, checkpoint.find(load), resume=False, with_optimizer=False)
    return ReferencePolicy(state)
