"""tools/studies/compare_mtp.py: results from given evaluations, and a small comparison that trains its trunk.

Also tools/benchmarks/bench_generate.py on that trunk.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import forked

ROOT = Path(__file__).parents[2]
SHARES = {"single-step": [0.8, 0.5, 0.4, 0.2], "as-decoded": [0.8, 0.7, 0.6, 0.5]}


@pytest.fixture
def tool() -> Any:
    from tools.studies import compare_mtp  # late: it imports Hydra

    return compare_mtp


def results_of(tool: Any) -> dict[str, Any]:
    """Return the results of each way with two seeds, the second slightly better."""
    by_way = {}
    for name, shares in SHARES.items():
        seeds = {n: {kind: [s + 0.01 * n for s in shares] for kind in tool.KINDS} for n in (0, 1)}
        by_way[name] = tool.over_seeds(name, seeds)
    return by_way


def test_tokens_per_pass_are_one_and_the_drafts_kept(tool: Any) -> None:
    way = results_of(tool)["single-step"]["greedy"]
    first = [1.8, 1.8 + 0.8 * 0.5, 1.8 + 0.8 * 0.5 + 0.8 * 0.5 * 0.4]
    second = [1.81, 1.81 + 0.81 * 0.51, 1.81 + 0.81 * 0.51 + 0.81 * 0.51 * 0.41]
    for depth in range(3):
        expected = (first[depth] + second[depth]) / 2
        assert way["tokens_per_pass"][depth]["mean"] == pytest.approx(expected)
    assert way["acceptance"][0]["spread"] == pytest.approx(0.01 / 2**0.5)


def test_every_way_is_compared_with_single_step(tool: Any, tmp_path: Path) -> None:
    by_way = results_of(tool)
    verdict = tool.verdict(by_way)
    (length,) = (value for name, value in verdict.items() if "tokens per pass" in name)
    (points,) = (value for name, value in verdict.items() if "points" in name)
    assert length == pytest.approx(1.199, abs=1e-3)
    assert points == pytest.approx(0)
    results = {
        "ways": by_way,
        "verdict": verdict,
        "made_on": {},
        "trunk": "somewhere",
        "trunk_tokens": None,
        "tokens": 1e6,
        "command": "…",
    }
    text = tool.markdown(results)
    assert "80.5 ± 0.7 %" in text
    assert f"as-decoded: tokens per pass at depth 4, over single-step's: {length:.3f}" in text
    tool.draw(tmp_path / "drafts.png", by_way)
    assert (tmp_path / "drafts.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_setting_is_refused_before_anything_runs(tmp_path: Path) -> None:
    done = forked.run(
        ROOT / "tools/studies/compare_mtp.py", "--output", tmp_path, "--config-name", "mtp-tiny", "mtp.depth=3"
    )
    assert done.returncode == 2
    assert "mtp.depth" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of a small comparison that trains its trunk."""
    folder = tmp_path_factory.mktemp("compared")
    # the second time nothing is left to do
    for seconds in (600, 60):
        done = forked.run(
            ROOT / "tools/studies/compare_mtp.py",
            "--output",
            folder,
            "--pretrain",
            "pretrain-tiny",
            "--config-name",
            "mtp-tiny",
            "--ways",
            "single-step",
            "as-decoded-distilled",
            "--trunk",
            "training.steps=5",
            "schedule.warmup_steps=2",
            "validation.batches=1",
            "--evaluate",
            "evaluate.num_sequences=4",
            "evaluate.context_tokens=64",
            "--seeds",
            "1",
            "--workers",
            "2",
            "training.steps=3",
            "schedule.warmup_steps=1",
            "validation.batches=1",
            seconds=seconds,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_a_small_comparison_has_every_way_and_depth(compared: Path) -> None:
    results = json.loads((compared / "results.json").read_text())
    assert set(results["ways"]) == {"single-step", "as-decoded-distilled"}
    for way in results["ways"].values():
        assert len(way["greedy"]["acceptance"]) == len(way["drawn"]["tokens_per_pass"]) == 4


@pytest.mark.slow
def test_generation_of_its_trunk_is_measured(compared: Path) -> None:
    """tools/benchmarks/bench_generate.py; its measurement of CUDA graphs needs a GPU."""
    done = forked.run(
        ROOT / "tools/benchmarks/bench_generate.py",
        compared / "trunk",
        "--contexts",
        "64",
        "128",
        "--depths",
        "0",
        "2",
        "--prompts",
        "2",
        "--tokens",
        "12",
        "--json",
        compared / "bench.json",
        seconds=300,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((compared / "bench.json").read_text())
    assert [row["context"] for row in figures["contexts"]] == [64, 128]
    greedy = [row for row in figures["drafts"] if row["temperature"] == 0]
    assert [(row["depth"], row["same_texts"]) for row in greedy] == [(0, 2), (2, 2)]
