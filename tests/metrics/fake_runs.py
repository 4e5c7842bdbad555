"""Fake run directories with plausible curves, for tests of the report and for viewing it.

python tests/metrics/fake_runs.py DIRECTORY [STEPS]     write one run and its report
"""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_q3n.config import validate
from megatron_q3n.metrics import jsonl

TOKENS_PER_STEP = 1024
BYTES_PER_TOKEN = 2.4
START_TIME = 1_780_000_000.0


def write_run(
    run_dir: Path, steps: int = 700, total_steps: int | None = None, seed: int = 0, layers: int = 4, gated: bool = True
) -> Path:
    """Write every file of a finished run (killed at `steps` when `total_steps` is more)."""
    rng = random.Random(seed)
    total_steps = total_steps or steps
    run_dir.mkdir(parents=True, exist_ok=True)
    file = jsonl.open_at(run_dir / "metrics.jsonl", 0)
    instruments_rng = random.Random(seed)
    for step in range(1, steps + 1):
        record = _record(step, total_steps, rng)
        if step == 1 or step % max(1, total_steps // 14) == 0:
            record |= _instruments(step / total_steps, layers, gated, instruments_rng)
        file.append(record)
    file.close()
    tree = {
        "recipe": "pretrain-tiny",
        "training": {"steps": total_steps, "seed": 4000 + seed},
        "schedule": {"lr": 2e-3, "warmup_steps": 0},
        "samples": {"prompts": ["def ", "class "]},
    }
    config = validate(tree).model_dump(mode="json")
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    _dump(run_dir / "environment.json", _environment())
    _dump(run_dir / "samples.json", _samples())
    _dump(run_dir / "expert_load.json", expert_load(4, 8, rng, steps))
    baseline = {"name": "Witten-Bell bigram, same tokens", "bits_per_byte": 2.41, "bits_per_token": 5.8}
    _dump(run_dir / "baseline.json", baseline)
    _dump(run_dir / "evaluation.json", evaluation(gated, instruments_rng))
    summary = {"parameters": 1_962_496, "active_parameters": 1_175_000, "python_lines": 20, "python_lines_accepted": 13}
    if steps == total_steps:
        _dump(run_dir / "summary.json", summary)
    return run_dir


def expert_load(num_layers: int, num_experts: int, rng: random.Random, step: int) -> dict[str, Any]:
    """Return a load with one dead and one favored expert."""
    layers = []
    for layer in range(num_layers):
        weights = [math.exp(rng.gauss(0, 0.3)) for _ in range(num_experts)]
        weights[0] = 0.0 if layer == 1 else weights[0]
        weights[-1] *= 2.5 if layer == 2 else 1
        share = [weight / sum(weights) for weight in weights]
        layers.append({"name": f"layer {layer}", "share": share})
    return {"layers": layers, "step": step}


def evaluation(gated: bool, rng: random.Random) -> dict[str, Any]:
    """Return an evaluation.json: loss by position (worse at long positions without the gate), copy recall, a task."""

    def text(start: int, end: int) -> dict[str, Any]:
        loss = 2.1 + (0.0 if gated or start < 2048 else 0.8) + rng.gauss(0, 0.01)
        found = {"tokens": end - start, "bytes": 3 * (end - start), "loss": loss}
        return found | {"perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2) / 3}

    stretches = [(start, start + 1024) for start in range(0, 4096, 1024)]
    tasks = {
        f"repeat {length} tokens": {
            "accuracy": min(1.0, max(0.0, 1 - length / 700 + rng.gauss(0, 0.02))),
            "loss": 0.2 + length / 200,
            "loss of the first copy": 6.1,
        }
        for length in (16, 64, 256, 512)
    }
    by_position = [{"from": a, "to": b, **text(a, b)} for a, b in stretches]
    sets = {"validation": {**text(0, 4096), "by_position": by_position}}
    return {"checkpoint": "x", "sets": sets, "tasks": {**tasks, "brackets": {"accuracy": 0.42}}}


def _record(step: int, total_steps: int, rng: random.Random) -> dict[str, float]:
    clean = 3.62 + 2.6 * math.exp(-step / 60) + 0.55 * math.exp(-step / 400)
    loss = clean + rng.gauss(0, 0.08)
    seconds = 0.31 + abs(rng.gauss(0, 0.015)) + (0.9 if step == 1 else 0)
    record = {
        "step": step,
        "time": START_TIME + 0.33 * step,
        "tokens": step * TOKENS_PER_STEP,
        "loss/train": loss,
        "loss/mtp_1": loss + 0.35 + rng.gauss(0, 0.05),
        "loss/load_balancing": 1 + 0.35 * math.exp(-step / 90) + abs(rng.gauss(0, 0.008)),
        "grad_norm": 0.5 + 6 * math.exp(-step / 25) + abs(rng.gauss(0, 0.12)) + (4 if step == 431 else 0),
        "learning_rate": _learning_rate(step, total_steps),
        "throughput/tokens_per_second": TOKENS_PER_STEP / seconds,
        "throughput/step_seconds": seconds,
        "throughput/model_tflops_per_second": 7.1e-6 * TOKENS_PER_STEP / seconds,
        "memory/peak_gib": 1.31,
        "experts/load_imbalance": 1.4 + 1.2 * math.exp(-step / 80) + abs(rng.gauss(0, 0.08)),
        "experts/dead": max(0, 3 - step // 40),
        "skipped_steps": 0,
    }
    if step % 50 == 0 or step == total_steps:
        record["loss/validation"] = clean + 0.05 + rng.gauss(0, 0.008)
        bits = record["loss/validation"] / math.log(2) / BYTES_PER_TOKEN
        record["bits_per_byte/validation"] = bits
    return record


def _instruments(done: float, layers: int, gated: bool, rng: random.Random) -> dict[str, float]:
    """Return instruments metrics: attention sinks and massive activations grow without the gate."""

    def noisy(value: float) -> float:
        return value * math.exp(rng.gauss(0, 0.06))

    sink = 0.02 + (0.02 if gated else 0.4) * done
    peak = 8 + (20 if gated else 1500) * done**2
    values: dict[str, float] = {}
    for layer in range(layers):
        depth = (layer + 1) / layers
        values[f"activations/max_over_median_layer_{layer}"] = noisy(4 + peak * depth)
        values[f"activations/max_layer_{layer}"] = noisy(3 + peak * depth)
        values[f"activations/rms_layer_{layer}"] = noisy(1 + depth * done)
        values[f"norm_scale/max_layer_{layer}"] = noisy(1 + 0.3 * done)
        values[f"gradients/norm_layer_{layer}"] = noisy(0.3 - 0.2 * depth)
        values[f"router/entropy_layer_{layer}"] = 0.98 - 0.2 * done * rng.random()
        values[f"experts/load_imbalance_layer_{layer}"] = noisy(1.3 + done * depth)
        if layer % 4 == 3:
            values[f"attention/first_token_share_layer_{layer}"] = noisy(sink * depth)
        else:
            values[f"gated_delta/half_life_tokens_layer_{layer}"] = noisy(2 ** (8 * depth))
            values[f"gated_delta/state_norm_layer_{layer}"] = noisy(0.2 + done)
    return {
        "attention/first_token_share": sink / 2,
        "attention/first_token_share_max": noisy(sink),
        "activations/max_over_median": 4 + peak,
        "norm_scale/max": noisy(1 + 0.3 * done),
        "gated_delta/half_life_tokens": 4.0,
        "router/entropy": noisy(0.98 - 0.1 * done),
        **values,
    }


def _learning_rate(step: int, total_steps: int) -> float:
    if step < 20:
        return 2e-3 * step / 20
    return 2e-4 + 0.9e-3 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))


def _environment() -> dict[str, Any]:
    return {
        "started": "2026-05-28T20:26:12+00:00",
        "command": ["train.py", "--config-name", "pretrain-tiny"],
        "host": "node1",
        "platform": "Linux-6.1-x86_64",
        "processes": 1,
        "gpu": None,
        "backends": {
            "communication": "gloo: no CUDA device",
            "gated_delta_rule": "torch: flash-linear-attention needs a GPU",
            "model": "torch: TransformerEngine is not installed",
        },
        "packages": {"torch": "2.11.0", "megatron-core": "0.19.2", "triton": None},
        "git": "63a28de0b1c2-dirty",
        "earlier_sessions": [{"started": "2026-05-28T19:01:00+00:00", "host": "node0"}],
    }


def _samples() -> list[dict[str, str]]:
    return [
        {"prompt": "def ", "text": "get_name(self, <name>):\n    return self._names[name] & 0xff\n"},
        {"prompt": "class ", "text": "Handler(BaseHandler):\n    '''</pre><script>alert(1)</script>'''\n"},
        {"prompt": "import ", "text": "os\nimport sys\nfrom typing import Any, Optional\n\n\ndef main() -> None:\n"},
    ]


def _dump(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree))


if __name__ == "__main__":
    # imported here, because the tests import this file without drawing
    from megatron_q3n.metrics.report import write_report

    run = write_run(Path(sys.argv[1]), *map(int, sys.argv[2:3]))
    print(write_report(run))
