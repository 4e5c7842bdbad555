"""report.html of one run: headline numbers, charts, expert load, evaluation, samples, settings and environment."""

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megatron_q3n.metrics.alerts import Alert, alerts_in
from megatron_q3n.metrics.progress import clock_text
from megatron_q3n.metrics.report import page
from megatron_q3n.metrics.report.charts import heat_map
from megatron_q3n.metrics.report.evaluation import evaluation_cards
from megatron_q3n.metrics.report.panels import EXPERTS, SECTIONS, panel_card, panels_for
from megatron_q3n.metrics.report.run_files import RunFiles, flatten, load, not_default
from megatron_q3n.metrics.report.sample_cards import sample_cards
from megatron_q3n.metrics.report.series import pick, smooth

REPORT_FILE = "report.html"
VALIDATION = "bits_per_byte/validation"
MAX_ALERTS = 20


def write_report(run_dir: Path) -> Path:
    """Write report.html into a run directory, finished or not, and return its path.

    Raises: UserError if the directory is not a run directory.
    """
    run = load(run_dir)
    alerts = alerts_in(run.records, run.config)
    body = [
        page.tiles(list(_headline(run))),
        page.section("Alerts", [alerts_card(alerts)] if alerts else []),
        *(page.section(section, _charts(run, section)) for section in SECTIONS),
        page.section("Evaluation", evaluation_cards(run.evaluation)),
        page.section("Generated text", sample_cards(run.path) or [_samples(run)]),
        page.section("Settings and environment", [_settings(run), _environment(run), _backends(run)]),
    ]
    return page.write(run_dir / REPORT_FILE, page.document(run.name, _subtitle(run), body))


def status_text(run: RunFiles) -> str:
    """Return the status of the run, e.g. "done" or "unfinished, at step 340 of 1,000"."""
    last = int(run.records[-1]["step"]) if run.records else 0
    status = str(run.summary.get("status", ""))
    if run.total_steps and last < run.total_steps:
        return f"{status or 'unfinished'}, at step {last:,} of {run.total_steps:,}"
    return status or ("all steps done" if run.total_steps else "")


def against_baseline(run: RunFiles, bits: float) -> tuple[str, str]:
    """Return the comparison with the baseline as text, and its tone ("good", "bad" or "")."""
    baseline = _baseline(run)
    if baseline is None:
        return "no baseline", ""
    percent = 100 * (1 - bits / baseline[1])
    relation, tone = ("below", "good") if percent >= 0 else ("above", "bad")
    return f"{abs(percent):.1f} % {relation} {baseline[0]}", tone


def active_seconds(run: RunFiles) -> float | None:
    """Return the seconds spent in steps, or between first and last record if step times were not logged."""
    in_steps = pick(run.records, "throughput/step_seconds").finite
    if len(in_steps):
        return float(in_steps.sum())
    times = pick(run.records, "time").finite
    return float(times[-1] - times[0]) if len(times) > 1 else None


def compact(number: float) -> str:
    """Return 2_870_000 as "2.87 M"."""
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if number >= size:
            return f"{number / (1e3 if letter == ' k' else size):.3g}{letter}"
    return f"{number:,.0f}"


def _subtitle(run: RunFiles) -> str:
    last = run.records[-1].get("time") if run.records else None
    date = datetime.fromtimestamp(last, UTC).strftime("%Y-%m-%d %H:%M UTC") if last else ""
    parts = (run.config.get("recipe"), status_text(run), date)
    return " · ".join(str(part) for part in parts if part)


def _headline(run: RunFiles) -> Iterator[tuple[str, str, str, str]]:
    bits = pick(run.records, VALIDATION).last
    if bits is not None:
        yield ("Validation bits per byte", f"{bits:.3f}", *against_baseline(run, bits))
    yield _loss_tile(run)
    steps = int(run.records[-1]["step"]) if run.records else 0
    tokens = pick(run.records, "tokens").last
    yield ("Steps", f"{steps:,}", f"of {run.total_steps:,}" if run.total_steps else "", "")
    yield ("Tokens", "–" if tokens is None else compact(tokens), "", "")
    speed = pick(run.records, "throughput/tokens_per_second").finite
    mfu = pick(run.records, "throughput/mfu").finite
    median = compact(float(np.median(speed))) if len(speed) else "–"
    yield ("Tokens/s", median, f"MFU {np.median(mfu):.1%}" if len(mfu) else "median", "")
    seconds = active_seconds(run)
    yield ("Time in steps", "–" if seconds is None else clock_text(seconds), "", "")
    parameters = run.summary.get("parameters")
    if isinstance(parameters, int | float):
        active = run.summary.get("active_parameters")
        remark = f"{compact(active)} active" if isinstance(active, int | float) else ""
        yield ("Parameters", compact(parameters), remark, "")


def _loss_tile(run: RunFiles) -> tuple[str, str, str, str]:
    raw = pick(run.records, "loss/train")
    loss = smooth(raw).last
    validation = pick(run.records, "loss/validation").last
    if len(raw) and not np.isfinite(raw.y[-1]):
        return ("Training loss", "not finite", f"in {raw.num_not_finite:,} steps", "bad")
    remark = f"validation {validation:.4f}" if validation is not None else "nats per token"
    return ("Training loss", "–" if loss is None else f"{loss:.4f}", remark, "")


def _charts(run: RunFiles, section: str) -> list[str]:
    cards = []
    for panel in panels_for(run.records):
        if panel.section == section:
            baseline = _baseline(run) if VALIDATION in panel.metrics else None
            name, bits = baseline or ("", None)
            cards.append(panel_card(panel, run.records, line_at=bits, line_label=name))
    return [*cards, _expert_load(run)] if section == EXPERTS else cards


def alerts_card(alerts: Sequence[Alert]) -> str:
    """Return the latest alerts of a run as a table."""
    rows = [(f"step {a.step:,}: {a.kind}", a.message) for a in alerts[-MAX_ALERTS:]]
    earlier = f"{len(alerts) - MAX_ALERTS} earlier alerts are in logs/events.log. "
    note = f"{earlier if len(alerts) > MAX_ALERTS else ''}Levels and pauses are set by alerts.*."
    return page.card("Alerts of this run", page.table(rows), note=note, wide=True)


def _baseline(run: RunFiles) -> tuple[str, float] | None:
    baseline = run.baseline if isinstance(run.baseline, dict) else {}
    bits = baseline.get("bits_per_byte")
    return (str(baseline.get("name", "baseline")), float(bits)) if isinstance(bits, int | float) else None


def _expert_load(run: RunFiles) -> str:
    title = "Expert load"
    content = run.expert_load if isinstance(run.expert_load, dict) else {}
    layers = [layer for layer in content.get("layers", []) if layer.get("share")]
    if not layers or len({len(layer["share"]) for layer in layers}) > 1:
        return page.card(title, page.placeholder(_missing_text(run, "expert_load.json")), wide=True)
    shares = [layer["share"] for layer in layers]
    chart = heat_map(shares, [str(layer["name"]) for layer in layers], title=title)
    step = f"at step {content['step']:,}" if isinstance(content.get("step"), int) else ""
    note = "Tokens of each expert over the layer's mean: 1 is balanced, 0 is a dead expert."
    return page.card(title, chart, unit=step, note=note, wide=True)


def _samples(run: RunFiles) -> str:
    samples = run.samples if isinstance(run.samples, list) else []
    texts = [_sample(sample) for sample in samples if isinstance(sample, dict)]
    body = "".join(texts) or page.placeholder(_missing_text(run, "samples.json"))
    good, lines = run.summary.get("python_lines_accepted"), run.summary.get("python_lines")
    remark = f"; {good} of {lines} long lines pass Python's tokenizer" if lines else ""
    return page.card("Samples", body, note=f"Prompts in bold{remark}." if texts else "", wide=True)


def _sample(sample: dict[str, Any]) -> str:
    prompt, text = escape(str(sample.get("prompt", ""))), escape(str(sample.get("text", "")))
    return f'<div class="sample"><pre><b>{prompt}</b>{text}</pre></div>'


def _settings(run: RunFiles) -> str:
    title = "Settings"
    if run.config_text is None or "config.yaml" in run.damaged:
        return page.card(title, page.placeholder(_missing_text(run, "config.yaml")))
    changed = not_default(run.config)
    rows = page.table((name, _plain(value)) for name, value in changed.items())
    body = rows if changed else page.placeholder("All settings have their defaults.")
    full = page.collapsible("config.yaml, resolved", page.preformatted(run.config_text))
    return page.card(title, body + full, unit="that differ from the defaults")


def _environment(run: RunFiles) -> str:
    """Return the card of machine and versions, with long lists collapsed; backends have a separate card."""
    if not isinstance(run.environment, dict):
        return page.card("Environment", page.placeholder(_missing_text(run, "environment.json")))
    details = ""
    plain = {}
    for name, value in run.environment.items():
        if name != "backends" and isinstance(value, dict | list) and name != "command":
            details += page.collapsible(name.replace("_", " "), _rows(value)) if value else ""
        elif name != "backends":
            plain[name] = " ".join(map(str, value)) if isinstance(value, list) else value
    return page.card("Environment", _rows(plain) + details)


def _backends(run: RunFiles) -> str:
    """Return the card of backends and reasons; environment.json has them as "backend: reason" by component."""
    backends = run.environment.get("backends") if isinstance(run.environment, dict) else None
    if not isinstance(backends, dict):
        return ""
    rows = ((name, *str(value).partition(": ")[::2]) for name, value in backends.items())
    return page.card("Backends", page.table(rows, ("component", "backend", "reason")), wide=True)


def _rows(tree: Any) -> str:
    if isinstance(tree, list):
        return "".join(map(_rows, tree))
    return page.table((name, _plain(value)) for name, value in flatten(tree).items())


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_plain(inner)}" for name, inner in value.items())
    return "none" if value is None else str(value)


def _missing_text(run: RunFiles, name: str) -> str:
    if name in run.damaged:
        return f"{name} cannot be read: {run.damaged[name]}"
    if not (run.path / name).exists():
        return f"This run has no {name} yet."
    return f"{name} has nothing to show."
