"""Table of metric names, used by metrics.jsonl, wandb, the progress line and report.html.

The table gives the name, unit, meaning and panel of each metric. Metrics are computed in training and model code and
displayed by the sinks; neither belongs here. Names are stable, so that dashboards and scripts keep working. A new
metric needs a row here first; the Recorder refuses an unknown name.

A name may contain one integer placeholder `<k>`: `loss/mtp_<k>` matches `loss/mtp_1`, `loss/mtp_2` and so on.
Metrics that a callback of the user returns (training/callbacks.py) need no row: their names begin with `custom/`.
"""

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One row of the table. `best` is the extreme that wandb keeps in the run summary beside the last value."""

    name: str
    unit: str
    meaning: str
    group: str
    best: Literal["min", "max", ""] = ""


NORM_KINDS = {
    "mixer": "before attention and Gated DeltaNet",
    "moe": "before the MoE layers",
    "query": "on queries",
    "key": "on keys",
    "delta_output": "on the Gated DeltaNet output",
    "final": "before the output layer",
    "mtp": "inside MTP",
}


TRUNK_AND_MTP = ("layer_<k>", "mtp")


def _by_layer(metric: Metric, suffixes: tuple[str, ...] = ("layer_<k>",)) -> list[Metric]:
    """Return one row per suffix.

    Layers count from 0; a mixer and the MoE layer after it are one layer. Numbers over all layers exclude the MTP
    layer.
    """
    return [replace(metric, name=f"{metric.name}_{suffix}") for suffix in suffixes]


METRICS = (
    Metric("step", "steps", "optimizer steps done; the first step of a run is 1", "progress"),
    Metric("tokens", "tokens", "tokens consumed since step 1, over all ranks", "progress"),
    Metric("time", "seconds", "when the record was written (unix time)", "progress"),
    Metric(
        "skipped_steps", "steps", "updates withheld so far: non-finite gradient, loss spike or callback", "progress"
    ),
    Metric(
        "repeated_steps",
        "steps",
        "steps of this process repeated without their CUDA graph, because a rank had more expert rows than its buffers",
        "progress",
    ),
    Metric("roll_backs", "count", "rollbacks to a checkpoint after a bad step", "progress"),
    Metric("loss/train", "nats/token", "language-model loss of the global batch, without auxiliary losses", "loss"),
    Metric("loss/mtp_<k>", "nats/token", "loss of multi-token prediction depth k, unscaled", "loss"),
    Metric("loss/load_balancing", "1", "MoE load balancing loss, unscaled; 1.0 is perfectly balanced", "loss"),
    Metric("loss/validation", "nats/token", "language-model loss on held-out text", "loss", "min"),
    Metric("loss/validation/<source>", "nats/token", "the same on one source of a blend, by the source's name", "loss"),
    Metric("bits_per_byte/validation", "bits/byte", "validation loss in bits per byte of text", "loss", "min"),
    Metric("learning_rate", "1", "learning rate of the step", "optimizer"),
    Metric("grad_norm", "1", "L2 norm of the whole gradient before clipping", "optimizer"),
    Metric("params_norm", "1", "L2 norm of all parameters after the step", "optimizer"),
    Metric("throughput/tokens_per_second", "tokens/s", "over all ranks", "throughput"),
    Metric("throughput/step_seconds", "seconds", "time of one step, validation excluded", "throughput"),
    Metric(
        "throughput/model_tflops_per_second",
        "TFLOP/s",
        "model FLOPs over all ranks; activation recomputation is not counted",
        "throughput",
    ),
    Metric(
        "throughput/mfu",
        "1",
        "model FLOPs utilization: tokens/s × FLOPs per token (forward and backward, recurrent form, config/sizes.py) "
        "over devices × bf16 matmul rate measured at start-up; not logged on a CPU, which has no single peak rate",
        "throughput",
    ),
    Metric(
        "throughput/instruments_seconds",
        "seconds",
        "time of one instruments pass (instruments.interval_steps); not part of the step time",
        "throughput",
    ),
    Metric(
        "throughput/straggler_ratio",
        "1",
        "compute time per step of the slowest rank over the median rank, every health.straggler_interval_steps",
        "throughput",
    ),
    Metric("memory/peak_gib", "GiB", "peak device memory, maximum over ranks", "memory"),
    Metric(
        "experts/load_imbalance", "1", "tokens of the most loaded expert over the layer's mean, worst layer", "experts"
    ),
    Metric("experts/dead", "experts", "experts that received no token of the batch, all layers", "experts"),
    *_by_layer(
        Metric("experts/load_imbalance", "1", "load imbalance (max over mean) of one layer, or of MTP", "experts"),
        suffixes=("layer_<k>", "mtp", "mtp_<k>"),
    ),
    *_by_layer(
        Metric("experts/dead", "experts", "dead experts of one layer, or of MTP", "experts"),
        suffixes=("layer_<k>", "mtp", "mtp_<k>"),
    ),
    Metric(
        "router/entropy",
        "1",
        "entropy of the router softmax over all experts, divided by ln(num_experts): 1 is uniform; mean over layers",
        "router",
    ),
    Metric("router/entropy_min", "1", "normalized router entropy, minimum over layers", "router"),
    *_by_layer(
        Metric("router/entropy", "1", "normalized router entropy of one layer, or of MTP", "router"), TRUNK_AND_MTP
    ),
    Metric(
        "attention/first_token_share",
        "1",
        "attention weight on the document's first token (attention sink), mean over later queries, heads and attention "
        "layers; uniform attention over T tokens gives about ln(T)/T",
        "attention",
    ),
    Metric("attention/first_token_share_max", "1", "first-token attention weight, maximum over layers", "attention"),
    *_by_layer(
        Metric("attention/first_token_share", "1", "first-token attention weight of one layer, or of MTP", "attention"),
        TRUNK_AND_MTP,
    ),
    Metric("activations/max", "1", "largest magnitude in the residual stream, over all layers", "activations"),
    Metric(
        "activations/max_over_median",
        "1",
        "a layer's largest magnitude over its median (over a token's channels, mean over tokens), worst layer",
        "activations",
    ),
    *_by_layer(
        Metric("activations/max", "1", "largest magnitude at the output of one layer, or of MTP's", "activations"),
        TRUNK_AND_MTP,
    ),
    *_by_layer(
        Metric(
            "activations/max_over_median", "1", "largest over median magnitude of one layer, or of MTP's", "activations"
        ),
        TRUNK_AND_MTP,
    ),
    *_by_layer(
        Metric(
            "activations/rms",
            "1",
            "root mean square of the residual stream at the output of one layer, or of MTP's",
            "activations",
        ),
        TRUNK_AND_MTP,
    ),
    Metric("norm_scale/max", "1", "largest magnitude of any norm's scale (1 + weight if zero-centered)", "norm_scale"),
    *(
        Metric(f"norm_scale/max_{kind}", "1", f"largest scale of the norms {where}", "norm_scale")
        for kind, where in NORM_KINDS.items()
    ),
    *_by_layer(Metric("norm_scale/max", "1", "largest scale of the norms of one layer", "norm_scale")),
    *_by_layer(
        Metric(
            "gradients/norm",
            "1",
            "L2 norm of the gradient of one layer's parameters before clipping; head: the output layer and final norm",
            "gradients",
        ),
        suffixes=("layer_<k>", "embedding", "head", "mtp"),
    ),
    Metric(
        "gated_delta/half_life_tokens",
        "tokens",
        "half-life of a Gated DeltaNet head's state: ln 2 over the mean of -log decay; median over all heads",
        "gated_delta",
    ),
    Metric("gated_delta/half_life_tokens_min", "tokens", "minimum over heads", "gated_delta"),
    Metric("gated_delta/half_life_tokens_max", "tokens", "maximum over heads", "gated_delta"),
    *_by_layer(Metric("gated_delta/half_life_tokens", "tokens", "median over one layer's heads", "gated_delta")),
    Metric(
        "gated_delta/state_norm",
        "1",
        "Frobenius norm of a head's state at the end of a sequence, mean over heads and layers",
        "gated_delta",
    ),
    *_by_layer(Metric("gated_delta/state_norm", "1", "state norm, mean over one layer's heads", "gated_delta")),
    Metric(
        "acceptance_rate/greedy_<k>",
        "1",
        "acceptance rate of greedy drafts at depth k, given that all earlier drafts were accepted; measured where the "
        "held-out text continues as drafted",
        "acceptance",
    ),
    Metric(
        "acceptance_rate/sampled_<k>",
        "1",
        "acceptance probability of a sampled draft at depth k, Σ min(p, q), at the same positions",
        "acceptance",
    ),
    Metric(
        "acceptance_length/greedy",
        "tokens",
        "tokens per forward pass of the trunk: 1 plus the accepted drafts, from the acceptance rates by depth",
        "acceptance",
    ),
    Metric("acceptance_length/sampled", "tokens", "acceptance length of sampled drafts", "acceptance"),
    Metric("loss/policy", "1", "policy loss, normalized as the algorithm specifies", "policy"),
    Metric("reward/score_mean", "1", "mean score of the rollout's completions that were scored", "reward"),
    Metric("reward/reward_mean", "1", "mean reward used for advantages: score plus overlong penalty", "reward"),
    Metric("reward/solved", "1", "fraction of completions with a score of 1 or more", "reward", "max"),
    Metric("reward/eval_accuracy", "1", "fraction of held-out prompts solved with greedy decoding", "reward"),
    Metric(
        "reward/zero_variance_groups", "1", "fraction of groups whose scored completions have the same score", "reward"
    ),
    Metric(
        "reward/failures",
        "completions",
        "completions whose scoring failed (exception, crash, time limit); without advantage, and in no mean",
        "reward",
    ),
    Metric("reward/failure_share", "1", "fraction of completions whose scoring failed", "reward"),
    Metric("reward/no_answer", "completions", "completions without an answer, which have the failure score", "reward"),
    Metric("rollout/length_mean", "tokens", "mean completion length", "rollout"),
    Metric("rollout/length_max", "tokens", "maximum completion length", "rollout"),
    Metric("rollout/truncated", "1", "fraction of completions that ended without a stop token", "rollout"),
    Metric(
        "rollout/groups_generated", "groups", "groups generated for the rollout, resampled ones included", "rollout"
    ),
    Metric("rollout/seconds", "seconds", "generation and scoring", "rollout"),
    Metric("rollout/logprobs_seconds", "seconds", "old and reference log probabilities in the trainer", "rollout"),
    Metric("rl/ratio", "1", "mean importance ratio of the update's tokens", "policy"),
    Metric("rl/clip_fraction", "1", "fraction of tokens whose ratio is clipped", "policy"),
    Metric("rl/kl_to_old", "nats/token", "KL between the policy of the rollout and the policy updated", "policy"),
    Metric("rl/kl_to_reference", "nats/token", "KL to the reference policy (initial weights); 0 without one", "policy"),
    Metric("rl/entropy", "nats/token", "entropy of the policy's sampling distribution", "policy"),
    Metric("rl/importance_weight", "1", "mean truncated importance sampling weight, rollout to trainer", "policy"),
    Metric("rl/importance_clip_fraction", "1", "fraction of tokens whose importance weight is truncated", "policy"),
    Metric("rl/staleness_max", "steps", "optimizer steps since the weights that generated the oldest sample", "policy"),
    Metric("rl/mtp_grad_max", "1", "largest gradient of an MTP parameter; 0, because MTP is not trained", "policy"),
    Metric("rl/load_balancing_loss", "1", "scaled load balancing loss added to the policy loss", "policy"),
    Metric(
        "train_rollout/logprob_diff_mean",
        "nats",
        "mean absolute difference of rollout and trainer log probabilities",
        "train_rollout",
    ),
    Metric("train_rollout/logprob_diff_max", "nats", "maximum of the same difference", "train_rollout"),
    Metric("train_rollout/kl", "nats/token", "KL between rollout and trainer on the sampled tokens", "train_rollout"),
    Metric(
        "train_rollout/chunked_rule_error",
        "1",
        "relative difference of the chunked delta rule from the recurrent one, worst layer",
        "train_rollout",
    ),
    Metric(
        "train_rollout/routing_mismatch_layer_<k>",
        "1",
        "fraction of tokens that the trainer's router sends to other experts than the rollout did",
        "train_rollout",
    ),
    Metric(
        "train_rollout/routing_mismatch_after_replay",
        "1",
        "fraction of tokens processed by other experts in training, worst layer; 0 with routing replay",
        "train_rollout",
    ),
)

GROUPS = tuple(dict.fromkeys(metric.group for metric in METRICS))
"""The panel groups, in the order of the table."""

# parts of a row's name that stand for many names: an index from 0, and a data source
PLACEHOLDERS = {"<k>": r"\d+", "<source>": r"[\w-]+"}
STEP, TOKENS, TIME = "step", "tokens", "time"
CUSTOM = "custom/"


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], Metric], ...]:
    return tuple((re.compile(expression(metric.name)), metric) for metric in METRICS)


def expression(row: str) -> str:
    """Return the regular expression of the metric names that a row of the table describes."""
    escaped = re.escape(row)
    for placeholder, names in PLACEHOLDERS.items():
        escaped = escaped.replace(re.escape(placeholder), names)
    return escaped


@cache
def find(name: str) -> Metric | None:
    """Return the row that describes `name`, or None. Any name below `custom/` has one."""
    if re.fullmatch(rf"{CUSTOM}[\w./-]+", name):
        return Metric(name, "1", "returned by a callback", "custom")
    return next((metric for pattern, metric in _patterns() if pattern.fullmatch(name)), None)


def check(name: str) -> Metric:
    """Return the row of `name`.

    Raises: AssertionError for a name that is not in the table.
    """
    metric = find(name)
    assert metric is not None, f"metric {name!r} has no row in megatron_q3n/metrics/names.py; add one"
    return metric


def markdown_table() -> str:
    """Return the table in Markdown."""
    rows = ["| name | unit | meaning | panel |", "|---|---|---|---|"]
    rows += [f"| `{m.name}` | {m.unit} | {m.meaning} | {m.group} |" for m in METRICS]
    return "\n".join(rows) + "\n"
