"""The one table of metric names. metrics.jsonl, wandb, the progress bar and report.html all use exactly these.

What does not live here: how a number is computed (training, model) or shown (the sinks). Names are stable: a
dashboard or a script made today reads the runs of next year. A new number means a new row here first; an
unknown name is refused.

A name may hold one place for a whole number, written `<k>`: `loss/mtp_<k>` stands for `loss/mtp_1`,
`loss/mtp_2` and so on.
"""

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One row: what is measured, in which unit, the panel that shows it, and which extreme to remember, if any."""

    name: str
    unit: str
    meaning: str
    group: str
    best: Literal["min", "max", ""] = ""


NORM_KINDS = {
    "mixer": "before attention and Gated DeltaNet",
    "moe": "before experts",
    "query": "of queries",
    "key": "of keys",
    "delta_output": "on Gated DeltaNet's output",
    "final": "before the head",
    "mtp": "inside MTP",
}


TRUNK_AND_MTP = ("layer_<k>", "mtp")


def _by_layer(metric: Metric, places: tuple[str, ...] = ("layer_<k>",)) -> list[Metric]:
    """Return a row for each place a number is also given for; layers count from 0, a mixer and its experts one.

    MTP's layer is in no number of all layers.
    """
    return [replace(metric, name=f"{metric.name}_{place}") for place in places]


METRICS = (
    Metric("step", "steps", "optimizer steps done; the first step of a run is 1", "progress"),
    Metric("tokens", "tokens", "tokens consumed since step 1, over all ranks", "progress"),
    Metric("time", "seconds", "when the record was written (unix time)", "progress"),
    Metric("skipped_steps", "steps", "updates skipped so far: a gradient not finite", "progress"),
    Metric("roll_backs", "count", "returns to a checkpoint because of a bad step", "progress"),
    Metric("loss/train", "nats/token", "language-model loss of the global batch, alone", "loss"),
    Metric("loss/mtp_<k>", "nats/token", "loss of multi-token prediction depth k, unscaled", "loss"),
    Metric("loss/balance", "1", "expert balance loss, unscaled; 1.0 is perfectly even", "loss"),
    Metric("loss/validation", "nats/token", "language-model loss on held-out text", "loss", "min"),
    Metric("bits_per_byte/validation", "bits/byte", "the same per byte of text", "loss", "min"),
    Metric("learning_rate", "1", "learning rate the step was taken with", "optimizer"),
    Metric("grad_norm", "1", "L2 norm of the whole gradient before clipping", "optimizer"),
    Metric("params_norm", "1", "L2 norm of all parameters after the step", "optimizer"),
    Metric("throughput/tokens_per_second", "tokens/s", "over all ranks", "throughput"),
    Metric("throughput/step_seconds", "seconds", "one step, validation excluded", "throughput"),
    Metric(
        "throughput/model_tflops_per_second",
        "TFLOP/s",
        "the model's own arithmetic, over all ranks; recomputation is not counted",
        "throughput",
    ),
    Metric(
        "throughput/mfu",
        "1",
        "tokens/s × FLOPs per token (forward and backward, recurrent form, config/sizes.py) over devices × the bf16 "
        "matrix product's rate, measured at the start; absent on a CPU, which has no one peak",
        "throughput",
    ),
    Metric(
        "throughput/instruments_seconds",
        "seconds",
        "a look inside the model (instruments.interval_steps); not part of a step's time",
        "throughput",
    ),
    Metric(
        "throughput/slowest_over_median",
        "1",
        "the slowest rank's own time per step over the median rank's, every health.straggler_interval_steps",
        "throughput",
    ),
    Metric("memory/peak_gib", "GiB", "peak memory of the fullest rank", "memory"),
    Metric("experts/max_over_mean", "1", "fullest expert's tokens over the mean, worst layer", "experts"),
    Metric("experts/dead", "experts", "experts without a token in the batch, all layers", "experts"),
    *_by_layer(
        Metric("experts/max_over_mean", "1", "the same of one layer, or of MTP", "experts"),
        places=("layer_<k>", "mtp", "mtp_<k>"),
    ),
    *_by_layer(
        Metric("experts/dead", "experts", "the same of one layer, or of MTP", "experts"),
        places=("layer_<k>", "mtp", "mtp_<k>"),
    ),
    Metric(
        "router/entropy",
        "1",
        "entropy of a token's softmax over all experts, over ln of their number: 1 is no preference; mean over layers",
        "router",
    ),
    Metric("router/entropy_min", "1", "the same, of the layer with the least", "router"),
    *_by_layer(Metric("router/entropy", "1", "the same of one layer, or of MTP", "router"), TRUNK_AND_MTP),
    Metric(
        "sinks/first_token",
        "1",
        "attention to the document's first token, mean over later queries, heads and attention layers; an even spread "
        "over T tokens is about ln(T)/T",
        "sinks",
    ),
    Metric("sinks/first_token_max", "1", "the same, of the layer with most", "sinks"),
    *_by_layer(Metric("sinks/first_token", "1", "the same of one layer, or of MTP", "sinks"), TRUNK_AND_MTP),
    Metric("activations/max", "1", "largest magnitude in the residual stream, of all layers", "activations"),
    Metric(
        "activations/max_over_median",
        "1",
        "a layer's largest magnitude over its median (over a token's channels, mean over tokens), worst layer",
        "activations",
    ),
    *_by_layer(Metric("activations/max", "1", "as it leaves one layer, or MTP's", "activations"), TRUNK_AND_MTP),
    *_by_layer(Metric("activations/max_over_median", "1", "of one layer, or MTP's", "activations"), TRUNK_AND_MTP),
    *_by_layer(
        Metric(
            "activations/rms",
            "1",
            "root mean square of the residual stream as it leaves one layer, or MTP's",
            "activations",
        ),
        TRUNK_AND_MTP,
    ),
    Metric("norms/max", "1", "largest scale of any norm, 1 + weight where zero-centered, in magnitude", "norms"),
    *(Metric(f"norms/max_{kind}", "1", f"the same {where}", "norms") for kind, where in NORM_KINDS.items()),
    *_by_layer(Metric("norms/max", "1", "the same of all norms in one layer", "norms")),
    *_by_layer(
        Metric(
            "gradients/norm",
            "1",
            "L2 norm of the gradient of one layer's parameters before clipping; head: with the final norm",
            "gradients",
        ),
        places=("layer_<k>", "embedding", "head", "mtp"),
    ),
    Metric(
        "delta/half_life",
        "tokens",
        "ln 2 over the mean of -log decay of a Gated DeltaNet head, median of all heads",
        "delta",
    ),
    Metric("delta/half_life_min", "tokens", "of the most forgetful head", "delta"),
    Metric("delta/half_life_max", "tokens", "of the head that remembers longest", "delta"),
    *_by_layer(Metric("delta/half_life", "tokens", "median of one layer's heads", "delta")),
    Metric(
        "delta/state_norm",
        "1",
        "Frobenius norm of a head's state at the end of a sequence, mean over heads and layers",
        "delta",
    ),
    *_by_layer(Metric("delta/state_norm", "1", "the same of one layer", "delta")),
    Metric(
        "acceptance/greedy_<k>",
        "1",
        "share of greedy drafts at depth k that the model itself would choose, all before having been kept; where "
        "the held-out text goes on as drafted",
        "acceptance",
    ),
    Metric(
        "acceptance/sampled_<k>",
        "1",
        "chance that a drawn draft at depth k is kept, Σ min(p, q), at the same places",
        "acceptance",
    ),
    Metric(
        "acceptance/greedy_length",
        "tokens",
        "a pass of the trunk yields: 1 and the drafts kept, from the shares by depth",
        "acceptance",
    ),
    Metric("acceptance/sampled_length", "tokens", "the same of drawn drafts", "acceptance"),
    Metric("loss/policy", "1", "policy loss, weighed as the algorithm normalises it", "policy"),
    Metric("reward/score", "1", "mean score of a rollout's answers", "reward"),
    Metric("reward/reward", "1", "mean of what advantages are made of: scores and the penalty for length", "reward"),
    Metric("reward/full_marks", "1", "share of answers with a score of 1 or more", "reward", "max"),
    Metric("reward/held_out", "1", "the same of the likeliest answers to held-out prompts", "reward"),
    Metric("reward/even_groups", "1", "share of groups whose answers all got one score", "reward"),
    Metric("reward/failures", "answers", "graders that hung or crashed, and answers without an answer", "reward"),
    Metric("rollout/length_mean", "tokens", "of an answer", "rollout"),
    Metric("rollout/length_max", "tokens", "of an answer", "rollout"),
    Metric("rollout/cut_off", "1", "share of answers that did not end by themselves", "rollout"),
    Metric("rollout/groups_drawn", "groups", "prompts answered for the rollout, with those drawn anew", "rollout"),
    Metric("rollout/seconds", "seconds", "answering and grading", "rollout"),
    Metric("rollout/look_back_seconds", "seconds", "the trainer's and the reference's probabilities", "rollout"),
    Metric("rl/ratio", "1", "mean importance ratio of the update's tokens", "policy"),
    Metric("rl/clipped", "1", "share of tokens whose ratio is clipped", "policy"),
    Metric("rl/kl_to_old", "nats/token", "KL of the weights at the rollout's end from those updated", "policy"),
    Metric("rl/kl_to_reference", "nats/token", "KL from the weights the run began with; 0 without one", "policy"),
    Metric("rl/entropy", "nats/token", "of the distribution each token was drawn from", "policy"),
    Metric("rl/importance", "1", "mean truncated weight from rollout to trainer", "policy"),
    Metric("rl/capped", "1", "share of tokens whose weight is cut off", "policy"),
    Metric("rl/staleness_max", "steps", "optimizer steps since the weights that drew the oldest sample", "policy"),
    Metric("rl/mtp_gradient", "1", "largest gradient of an MTP parameter: 0, they sit out", "policy"),
    Metric("rl/balance_in_loss", "1", "what the expert balance loss adds to the policy loss", "policy"),
    Metric("mismatch/logprob_mean", "nats", "mean distance of rollout and trainer log probabilities", "mismatch"),
    Metric("mismatch/logprob_max", "nats", "the largest", "mismatch"),
    Metric("mismatch/kl", "nats/token", "KL of rollout and trainer on the drawn tokens", "mismatch"),
    Metric(
        "mismatch/chunks",
        "1",
        "relative difference of the delta rule by chunks from the recurrence, worst layer",
        "mismatch",
    ),
    Metric("mismatch/routes_<k>", "1", "share of tokens the trainer would route otherwise, layer k", "mismatch"),
    Metric("mismatch/routes_used", "1", "share routed otherwise in training, worst layer; 0 with replay", "mismatch"),
)

GROUPS = tuple(dict.fromkeys(metric.group for metric in METRICS))
"""The panels, in the order of the table."""

STEP, TOKENS, TIME = "step", "tokens", "time"


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], Metric], ...]:
    return tuple((re.compile(re.escape(metric.name).replace(re.escape("<k>"), r"\d+")), metric) for metric in METRICS)


@cache
def find(name: str) -> Metric | None:
    """Return the row that describes `name`, or None."""
    return next((metric for pattern, metric in _patterns() if pattern.fullmatch(name)), None)


def check(name: str) -> Metric:
    """Return the row of `name`.

    Raises: AssertionError for a name that the table does not hold; the caller logs something undocumented.
    """
    metric = find(name)
    assert metric is not None, f"metric {name!r} has no row in megatron_q3n/metrics/names.py; add one"
    return metric


def markdown_table() -> str:
    """Return the table for the documentation."""
    rows = ["| name | unit | meaning | panel |", "|---|---|---|---|"]
    rows += [f"| `{m.name}` | {m.unit} | {m.meaning} | {m.group} |" for m in METRICS]
    return "\n".join(rows) + "\n"
