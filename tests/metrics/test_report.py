"""Report pages from run directories in every state. Not covered: their appearance in a browser."""

import html.parser
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_strategies

from megatron_q3n.config import UserError
from megatron_q3n.metrics import jsonl
from megatron_q3n.metrics.report import write_comparison, write_report
from megatron_q3n.metrics.report.series import Series, downsample, pick, smooth
from megatron_q3n.metrics.report.variants import mean_and_spread, spread_text
from tests.metrics.fake_runs import expert_load, write_run

TOOL = Path(__file__).parents[2] / "tools/report.py"
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Checker(html.parser.HTMLParser):
    """HTML parser that checks that tags are closed in order, and collects external references and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "link", "iframe"}, tag
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href"} and not (value or "").startswith(("#", "data:")):
                self.fetched.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _checked_text(page: Path) -> str:
    """Check that a page is well-formed and self-contained; return its text."""
    source = page.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(source)
    assert checker.open == []
    assert checker.fetched == []
    assert not re.search(r"url\((?!#)|@import", source)
    return " ".join(" ".join(checker.text).split())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "pretrain-tiny-x", steps=60)


def test_a_finished_run(run_dir: Path) -> None:
    text = _checked_text(write_report(run_dir))
    bits = pick(jsonl.read(run_dir / "metrics.jsonl"), "bits_per_byte/validation").last
    assert bits is not None
    percent = 100 * (bits / 2.41 - 1)
    assert f"{bits:.3f} {percent:.1f} % above Witten-Bell bigram" in text
    for expected in ("60 of 60", "61.4 k", "1.96 M", "13 of 20 long lines", "samples.prompts"):
        assert expected in text, expected
    for title in ("Loss", "Expert load", "Gradient norm", "Throughput", "Settings", "Backends"):
        assert title in text, title
    assert "Skipped steps" not in text, "all zero"


def test_better_than_the_baseline_reads_below(run_dir: Path, tmp_path: Path) -> None:
    copy = write_run(tmp_path / "run", steps=30)
    (copy / "baseline.json").write_text('{"name": "Bigram", "bits_per_byte": 1000}')
    page = write_report(copy)
    assert re.search(r"99\.\d % below Bigram", _checked_text(page))
    assert '<em class="good">' in page.read_text()


def test_samples_are_escaped(run_dir: Path) -> None:
    source = write_report(run_dir).read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in source
    assert "<script" not in source


def test_the_same_run_gives_the_same_bytes(run_dir: Path) -> None:
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_charts_take_the_colors_of_the_page(run_dir: Path) -> None:
    source = write_report(run_dir).read_text()
    assert "stroke: var(--c0)" in source
    assert "DejaVu" not in source
    used = set(re.findall(r"var\((--\w+)\)", source))
    light, dark = source.split("prefers-color-scheme: dark")
    for scheme in (light, dark.split("* { box-sizing")[0]):
        assert used <= set(re.findall(r"(--\w+):", scheme))


@pytest.mark.parametrize("damage", [None, '{"half": '], ids=["absent", "torn"])
def test_every_other_file_is_optional(tmp_path: Path, damage: str | None) -> None:
    run_dir = write_run(tmp_path / "run", steps=3)
    for path in run_dir.glob("*.json"):
        path.unlink() if damage is None else path.write_text(damage)
    text = _checked_text(write_report(run_dir))
    for name in ("environment.json", "samples.json", "expert_load.json"):
        assert (f"This run has no {name}" if damage is None else f"{name} cannot be read") in text


def test_a_run_killed_at_once(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("recipe: pretrain-tiny\ntraining: {steps: 100}\n")
    text = _checked_text(write_report(tmp_path))
    assert "unfinished, at step 0 of 100" in text
    assert "This run logged no loss/train or loss/validation" in text


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_few_steps_of_many(tmp_path: Path, steps: int) -> None:
    run_dir = write_run(tmp_path / "run", steps=steps, total_steps=500)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss/tr')
    assert f"unfinished, at step {steps} of 500" in _checked_text(write_report(run_dir))


def test_non_finite_values(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=40)
    file = jsonl.open_at(run_dir / "metrics.jsonl", 30)
    for step in range(31, 34):
        file.append({"step": step, "time": 1.78e9, "tokens": step, "loss/train": math.nan, "grad_norm": math.inf})
    file.close()
    text = _checked_text(write_report(run_dir))
    assert "3 values were not finite" in text
    assert "Training loss not finite in 3 steps" in text


def test_nothing_but_nan(tmp_path: Path) -> None:
    file = jsonl.open_at(tmp_path / "metrics.jsonl", 0)
    for step in range(1, 40):
        file.append({"step": step, "time": 1.78e9, "tokens": step, "loss/train": math.nan, "loss/validation": math.nan})
    file.close()
    assert "39 values were not finite" in _checked_text(write_report(tmp_path))


def test_a_metric_without_a_panel_gets_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 1, "health/new_number": 3.5}\n')
    assert "health/new_number 3.5" in _checked_text(write_report(tmp_path))


def test_the_largest_model_has_a_heat_map(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=2)
    load = expert_load(48, 512, random.Random(0), 2)
    (run_dir / "expert_load.json").write_text(json.dumps(load))
    page = write_report(run_dir)
    assert "layer 46" in _checked_text(page)
    assert "data:image/png" in page.read_text()


def test_a_hundred_thousand_steps_stay_small(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            loss = 99.5 if step == 54_321 else 2 + step % 7 / 10
            file.write(f'{{"step": {step}, "time": {step}, "tokens": {step}, "loss/train": {loss}}}\n')
    page = write_report(tmp_path)
    assert "100,000" in _checked_text(page)
    assert page.stat().st_size < 300_000


@given(
    values=np_strategies.arrays(np.float64, st.integers(0, 300), elements=st.floats(-10, 10) | st.just(math.nan)),
    max_points=st.integers(2, 60),
)
def test_thinning_keeps_the_extremes(values: np.ndarray, max_points: int) -> None:
    series = Series(np.arange(len(values), dtype=np.float64), values)
    downsampled = downsample(series, max_points)
    assert len(downsampled) <= max(max_points, 2)
    assert (np.diff(downsampled.x) > 0).all()
    np.testing.assert_array_equal(downsampled.y, values[downsampled.x.astype(int)])
    if len(series.finite):
        assert downsampled.finite.min() == series.finite.min()
        assert downsampled.finite.max() == series.finite.max()


@given(np_strategies.arrays(np.float64, st.integers(1, 300), elements=st.floats(-10, 10) | st.just(math.nan)))
def test_smoothing_stays_within_the_values(values: np.ndarray) -> None:
    series = Series(np.arange(len(values), dtype=np.float64), values)
    smoothed = smooth(series)
    assert len(smoothed) == len(series)
    if len(series.finite):
        assert smoothed.finite.min() >= series.finite.min() - 1e-9
        assert smoothed.finite.max() <= series.finite.max() + 1e-9


def test_smoothing_does_not_lag() -> None:
    line = Series(np.arange(1000.0), np.arange(1000.0))
    np.testing.assert_allclose(smooth(line).y[100:-100], line.y[100:-100])


def test_comparison(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, steps=30) for name in "ab"]
    _set(runs[1], "schedule", "lr", 0.003)
    text = _checked_text(write_comparison(runs, tmp_path / "comparison.html"))
    assert "2 runs compared curves over tokens" in text
    assert "schedule.lr 0.002 0.003" in text
    assert "lr=0.002 lr=0.003 runs 1 1" in text
    with pytest.raises(UserError, match="2 or more run directories, found 1"):
        write_comparison(runs[:1], tmp_path / "comparison.html")


def test_runs_that_differ_in_the_seed_are_one_variant_with_a_spread(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run-{seed}", steps=30, seed=seed) for seed in range(5)]
    for run in runs[3:]:
        _set(run, "optimizer", "weight_decay", 0.0)
    text = _checked_text(write_comparison(runs, tmp_path / "comparison.html"))
    assert "5 runs compared 2 variants" in text
    assert "weight_decay=0.1 weight_decay=0.0 runs 3 2" in text
    assert "training.seed" not in text
    ends = [pick(jsonl.read(run / "metrics.jsonl"), "loss/validation").last for run in runs]
    for part in (ends[:3], ends[3:]):
        mean, spread = mean_and_spread(part)
        assert mean == pytest.approx(np.mean(part))
        assert spread == pytest.approx(np.std(part, ddof=1))
        # the text continues with ±
        assert f"{mean:.2f}" in text
    for index in range(8):
        runs.append(write_run(tmp_path / f"other-{index}", steps=1))
        _set(runs[-1], "schedule", "lr", 0.001 + index / 1000)
    with pytest.raises(UserError, match=r"up to 8 variants .* found 10"):
        write_comparison(runs, tmp_path / "comparison.html")


def test_recall_has_a_card_and_is_no_task(run_dir: Path) -> None:
    text = _checked_text(write_report(run_dir))
    found = json.loads((run_dir / "evaluation.json").read_text())["tasks"]
    accuracy = found["repeat 256 tokens"]["accuracy"]
    assert "Copy recall (induction)" in text
    assert f"256 {accuracy:.1%} 1.480 6.100" in " ".join(text.split())
    assert "repeat 256 tokens" not in text
    assert "brackets" in text, "a task that is not part of the probe"


def test_evaluations_are_compared(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{s}", 20, seed=s, gated=s < 2) for s in range(4)]
    for run in runs[2:]:
        _set(run, "model", "attention_gate", "none")
    page = write_comparison(runs, tmp_path / "page.html")
    text = " ".join(_checked_text(page).split())
    assert "Copy recall (induction)" in text
    losses = [
        [json.loads((r / "evaluation.json").read_text())["sets"]["validation"]["by_position"][3]["loss"] for r in pair]
        for pair in (runs[:2], runs[2:])
    ]
    cells = [spread_text(*mean_and_spread(pair)) for pair in losses]
    assert f"3,072 to 4,096 {cells[0]} {cells[1]}" in text
    for run in runs:
        (run / "evaluation.json").unlink()
    assert "Copy recall" not in _checked_text(write_comparison(runs, tmp_path / "page.html"))


def _set(run_dir: Path, section: str, name: str, value: object) -> None:
    tree = yaml.safe_load((run_dir / "config.yaml").read_text())
    tree[section][name] = value
    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree))


def test_instruments_have_their_sections(tmp_path: Path) -> None:
    few, many = (write_run(tmp_path / f"{n}", steps=60, layers=n) for n in (4, 48))
    for run in (few, many):
        text = _checked_text(write_report(run))
        for title in (
            "Attention weight on the first token",
            "Largest activation over the median by layer",
            "Gated DeltaNet",
            "Half-life of the state",
            "Largest norm scale by layer",
            "Gradient norm by layer",
            "Router entropy by layer",
        ):
            assert title in text, title
        assert "More" not in text.split(), "a metric without a panel"
    legend = '<i style="background:var(--c3)"></i>layer 3 '
    assert legend in (few / "report.html").read_text()
    assert legend not in (many / "report.html").read_text(), "48 layers are a heat map"


def test_alerts_have_a_section(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=60, gated=False)
    text = _checked_text(write_report(run))
    assert "Alerts Alerts of this run" in text
    assert "attention sink attention weight on the first token" in text
    assert "massive activations largest activation over median" in text
    quiet = write_run(tmp_path / "quiet", steps=10)
    assert "Alerts of this run" not in _checked_text(write_report(quiet))


def _tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_tool_rebuilds_reports_and_rejects_bad_input(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=2)
    done = _tool(run_dir)
    assert (done.returncode, done.stdout.strip()) == (0, str(run_dir / "report.html"))
    for wrong, says in ((tmp_path / "nowhere", "no such directory"), (tmp_path, "not a run directory")):
        refused = _tool(wrong)
        assert refused.returncode == 2
        assert says in refused.stderr
        assert "Traceback" not in refused.stderr
    assert not (tmp_path / "report.html").exists()


def test_a_damaged_metric_is_a_gap(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=40)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record, value in zip(records[5:], ["text", [1], {"a": 1}, True, 10**400, None]):
        record |= dict.fromkeys(("loss/train", "grad_norm", "tokens", "seconds_per_step"), value)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert write_report(run_dir).read_text().count("<svg") > 3


def test_earlier_evaluations_have_cards_too(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=40)
    path = run_dir / "evaluation.json"
    latest = json.loads(path.read_text())
    earlier = {**json.loads(path.read_text()), "checkpoint": "/r/checkpoints/step_0000007"}
    path.write_text(json.dumps({**latest, "earlier": [earlier]}))
    html = write_report(run_dir).read_text()
    name = next(iter(latest["sets"]))
    assert html.count(f"Held-out text: {name}") == 2
    assert f"Held-out text: {name} (earlier 1: step_0000007)" in html
    assert "Tasks (earlier 1: step_0000007)" in html
