"""The loop of reinforcement learning, put together from a configuration: prompts, engine, graders, reference."""

from collections.abc import Callable
from pathlib import Path

from megatron_q3n import checkpoint
from megatron_q3n.config import RunConfig
from megatron_q3n.config.sizes import parameters
from megatron_q3n.data.chat_template import ChatTemplate
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.rl.http_engine import HttpEngine
from megatron_q3n.rl.loop import RlLoop
from megatron_q3n.rl.prompts import Prompts
from megatron_q3n.rl.reference_policy import Reference
from megatron_q3n.rl.rewards import Graders
from megatron_q3n.rl.rollout_engine import InProcessEngine, RolloutEngine
from megatron_q3n.stages.weight_sync import Publisher
from megatron_q3n.training.state import TrainState


def build_loop(
    state: TrainState,
    run_dir: Path,
    graders: Graders,
    tokenizer: TextTokenizer,
    template: ChatTemplate,
    alive: Callable[[], object],
) -> RlLoop:
    """Return the loop; `alive` is called while it generates. Loads what the reference needs, so it comes before the
    run's own weights.

    Raises: UserError for prompts that cannot be had.
    """
    rl = state.config.rl
    stop_tokens = frozenset({tokenizer.eod, template.end_of_turn})
    prompts = Prompts(rl.prompts, template, longest=_longest_prompt(state.config), seed=state.config.training.seed)
    engine = _engine(state, run_dir, tokenizer, stop_tokens, alive)
    reference = _reference(state) if rl.kl_coefficient else None
    return RlLoop(state, engine, graders, prompts, tokenizer, stop_tokens, reference)


def held_out_prompts(config: RunConfig, template: ChatTemplate) -> Prompts | None:
    """Return the prompts that accuracy is measured on, None where there are none."""
    if not config.rl.held_out:
        return None
    longest = _longest_prompt(config)
    return Prompts(config.rl.held_out, template, longest=longest, seed=0, shuffled=False)


def introduction(loop: RlLoop, run_dir: Path) -> str:
    """Say what is about to happen."""
    config, rules, rollout = loop.state.config, loop.settings.rules, loop.settings.rollout
    left_out = f", {loop.prompts.num_left_out} too long" if loop.prompts.num_left_out else ""
    return (
        f"run directory {run_dir}\n"
        f"model {config.model.name}: {parameters(config.model).total_with_mtp / 1e6:.2f} M parameters, "
        f"{loop.state.parallel.world_size} process(es), {config.precision.compute}\n"
        f"prompts {len(loop.prompts)}{left_out}; {rollout.prompts} × {rollout.samples_per_prompt} samples a rollout, "
        f"{loop.settings.updates_per_rollout} update(s) each, {rollout.engine} engine\n"
        f"{loop.settings.algorithm}: {rules.ratio} ratio, clipped {rules.clip_low:g} below and {rules.clip_high:g} "
        f"above 1, normalised by {rules.normalisation}; routing replay "
        f"{'on' if loop.settings.routing_replay else 'off'}"
    )


def _engine(
    state: TrainState, run_dir: Path, tokenizer: TextTokenizer, stop_tokens: frozenset[int], alive: Callable[[], object]
) -> RolloutEngine:
    rl, seed = state.config.rl, state.config.training.seed
    if rl.rollout.engine == "http":
        seen_by_servers = Path(rl.rollout.handover) if rl.rollout.handover else None
        publish = Publisher(state, run_dir, seen_by_servers)
        return HttpEngine(state.parallel, rl.rollout, stop_tokens, seed, publish)
    return InProcessEngine(
        state.models[0],
        state.parallel,
        rl.rollout,
        stop_tokens,
        tokenizer.vocab_size,
        seed,
        records_routes=True,
        alive=alive,
    )


def _longest_prompt(config: RunConfig) -> int:
    """Return the tokens of the longest prompt that leaves room for an answer in a row of the trainer."""
    return config.training.sequence_length + 1 - config.rl.rollout.max_new_tokens


def _reference(state: TrainState) -> Reference:
    """Return the weights the run began with, whatever it goes on from."""
    load = state.config.checkpoint.load
    if load is not None:
        checkpoint.load(state, checkpoint.find(load), resume=False, with_optimizer=False)
    return Reference(state)
