"""Ablation studies: their recipes, measures of a run, outcomes, and one complete small study on a CPU.

Not covered: that a study is large enough to show its effect. The report on several runs: tests/metrics.
"""

import dataclasses
import importlib
import json
import re
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megatron_q3n.config import UserError
from megatron_q3n.config.execution_rules import step_graph_obstacle
from megatron_q3n.recipe import RECIPES, configure, register_defaults
from tests import forked

ROOT = Path(__file__).parents[2]
STUDIES = sorted(path.stem for path in RECIPES.glob("ablation-*.yaml"))
TINY = [
    "model=tiny",
    "precision=fp32",
    "data.stdlib_vocab_size=512",
    "training.steps=8",
    "schedule.warmup_steps=1",
    "training.sequence_length=64",
    "training.micro_batch_size=2",
    "training.global_batch_size=2",
]
SMALL_STUDY = {
    "question": "Does a rate of 1e6 train?",
    "claim": "No.",
    "source": "none",
    "base": "pretrain-mini",
    "common": [
        *TINY,
        "schedule.style=constant",
        "schedule.min_lr=0",
        "samples.count=0",
        "validation.batches=1",
        "evaluate.num_sequences=2",
        "evaluate.context_tokens=64",
        "evaluate.recall_lengths=[4]",
        "evaluate.num_recall_sequences=3",
    ],
    "variants": {"usual": ["schedule.lr=1.0e-3"], "wild": ["schedule.lr=1.0e+6"]},
    "compare": {"validation loss": "loss/validation", "recall": "recall/loss_4", "spikes": "loss/train spikes"},
    "evaluate": True,
}


@pytest.fixture(autouse=True)
def registered_defaults() -> None:
    """Register the settings' defaults with Hydra, as the command does."""
    register_defaults()


def module(name: str) -> Any:
    """Import a module of tools/studies/ablations/."""
    return importlib.import_module(f"tools.studies.ablations.{name}")


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "ablation-small.yaml"
    path.write_text(yaml.safe_dump({**SMALL_STUDY, **changes}, allow_unicode=True))
    return path


@pytest.mark.parametrize("study", STUDIES)
def test_study_is_legal_at_its_size_and_at_a_tiny_one_and_is_on_the_page(study: str) -> None:
    recipe = module("recipe").read(module("recipe").find(study))
    assert recipe.seeds >= 2
    for settings in ([], [*TINY, "evaluate.context_tokens=64"]):
        trials = module("recipe").trials(recipe, Path("out"), recipe.seeds, [], settings)
        assert len(trials) == recipe.seeds * len(recipe.variants)
        obstacles = {step_graph_obstacle(trial.config) for trial in trials}
        assert settings or obstacles == {None}, "without a CUDA graph a run takes four times as long"
        assert trials[0].config.training.steps == (8 if settings else trials[0].config.training.steps)
    page = module("evidence").PAGE.read_text()
    assert all(page.count(comment) == 1 for comment in module("evidence").markers(study))
    assert f"`tools/studies/ablation.py {study}" in page


STATUSES = ("reproduced", "not at this size", "opposite", "not measured yet", "step 0 measured below")


def test_every_study_answers_a_claim_and_every_claim_has_a_status() -> None:
    page = module("evidence").PAGE.read_text()
    table = page.partition("## Claims")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    claims = rows[1:]
    assert len(claims) == 16, (
        "15 of Qwen3-Next's description and the papers behind it, and one question of this project"
    )
    for claim, source, study_links, status in claims:
        assert claim.strip()
        assert source.strip()
        assert status.strip().strip("*").startswith(STATUSES), claim
        for study, section in re.findall(r"\[(ablation-[a-z-]+)\]\(#([a-z-]+)\)", study_links):
            heading = page.partition(module("evidence").markers(study)[0])[0].rpartition("\n## ")[2]
            named = re.sub(r"[^a-z -]", "", heading.splitlines()[0].lower()).replace(" ", "-")
            assert (study in STUDIES, named) == (True, section)
    assert {*re.findall(r"\[(ablation-[a-z-]+)\]", table)} == {*STUDIES}


def test_the_patterns_compared_have_equally_many_parameters() -> None:
    recipe = module("recipe").read(module("recipe").find("ablation-pattern"))
    count = importlib.import_module("megatron_q3n.config.sizes").parameters
    trials = module("recipe").trials(recipe, Path("out"), 1, [], [])
    totals = [count(trial.config.model).total_with_mtp for trial in trials]
    assert max(totals) < 1.002 * min(totals)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown field": ({"color": "red"}, "color: Extra inputs are not permitted"),
    "no question": ({"question": ""}, "question: String should have at least 1"),
    "one variant": ({"variants": {"a": []}}, "variants: Dictionary should have at least 2"),
    "more than there are colors": ({"variants": {f"v{i}": [f"x={i}"] for i in range(9)}}, "at most 8"),
    "same variants": ({"variants": {"a": [], "b": []}}, "two variants have the same settings"),
    "not a name of a folder": ({"variants": {"a/b": [], "c": ["x=1"]}}, "variant 'a/b': a name has"),
    "the study's own": ({"common": ["training.seed=3"]}, "common: training.seed=3 is set by the study itself"),
    "no metric": ({"compare": {"loss": "loss/validatoin"}}, "Did you mean 'loss/validation'"),
    "no such reading": ({"compare": {"loss": "loss/train best"}}, "'best' is none of last, first"),
    "spikes of another": ({"compare": {"x": "grad_norm spikes"}}, "spikes are counted of loss/train only"),
    "recall over time": ({"compare": {"x": "recall/loss_4 max"}}, "measured once, at the end"),
    "recall without evaluation": ({"evaluate": False}, "recall/loss_4 needs evaluate: true"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_study_is_refused(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(UserError) as refused:
        module("recipe").read(written(tmp_path, **changes))
    assert message in str(refused.value)
    assert "ablation-small.yaml" in str(refused.value)


WRONG_RUNS: dict[str, tuple[dict[str, Any], list[str], list[str], str]] = {
    "variant's setting": ({"variants": {"a": [], "b": ["schedule.rl=1"]}}, [], [], "variant b: schedule.rl: no such"),
    "base": ({"base": "pretrain-smal"}, [], [], "no such recipe. Did you mean 'pretrain-small'"),
    "evaluation": ({}, [], ["evaluate.recall_lengths=[1]"], "variant usual: evaluate.recall_lengths"),
    "only": ({}, ["wide"], [], "--only wide: no such variant. Did you mean 'wild'"),
    "the study's own": ({}, [], ["run_dir=x"], "run_dir=x is set by the study itself"),
}


@pytest.mark.parametrize("case", WRONG_RUNS)
def test_wrong_runs_are_refused_before_any_starts(case: str, tmp_path: Path) -> None:
    changes, only, settings, message = WRONG_RUNS[case]
    recipe = module("recipe").read(written(tmp_path, **changes))
    with pytest.raises(UserError) as refused:
        module("recipe").trials(recipe, tmp_path / "out", 1, only, settings)
    assert message in str(refused.value)


def test_an_ablation_is_not_a_recipe_and_a_recipe_is_not_an_ablation() -> None:
    with pytest.raises(UserError, match=r"run it with tools/studies/ablation\.py ablation-gate"):
        configure(["--config-name", "ablation-gate"])
    with pytest.raises(UserError, match="no such study"):
        module("recipe").find("pretrain-small")


def losses(*values: float) -> Any:
    records = [{"step": step, "loss/train": value} for step, value in enumerate(values, start=1)]
    return SimpleNamespace(records=records, evaluation=None)


def test_divergence_is_a_lasting_rise_of_the_loss() -> None:
    diverged = module("measures").has_diverged
    falling = [6 - 0.03 * step for step in range(100)]
    assert not diverged(losses(*falling))
    assert not diverged(losses(*falling[:60], 9.0, *falling[60:])), "one spike is not divergence"
    assert diverged(losses(*falling, *[4.0] * 20))
    assert not diverged(losses(*falling, *[3.4] * 20))
    assert diverged(losses(*falling, float("nan")))
    assert diverged(losses(float("nan")))
    assert not diverged(losses())


def test_spikes_are_counted_step_by_step() -> None:
    steady = [3.0 + 0.01 * (step % 5) for step in range(60)]
    run = losses(*steady, 8.0, 8.0, *steady, float("nan"))
    assert module("measures").measure("loss/train spikes").of(run) == 3
    assert module("measures").measure("loss/train spikes").of(losses(*steady)) == 0


def test_measures_are_read_from_records_and_the_evaluation() -> None:
    measure = module("measures").measure
    run = losses(5.0, 2.0, float("nan"), 3.0)
    run.evaluation = {
        "tasks": {"repeat 16 tokens": {"accuracy": 0.75, "loss": 1.5}},
        "sets": {"validation": {"loss": 2.0, "by_position": [{"from": 0, "loss": 3.0}, {"from": 64, "loss": 1.0}]}},
    }
    expected = {
        "loss/train": 3.0,
        "loss/train first": 5.0,
        "loss/train max": 5.0,
        "loss/train min": 2.0,
        "loss/train median": 3.0,
        "grad_norm": None,
        "recall/accuracy_16": 0.75,
        "recall/loss_16": 1.5,
        "recall/loss_64": None,
        "text/loss": 2.0,
        "text/loss_from_64": 1.0,
        "text/loss_from_32": None,
    }
    assert {text: measure(text).of(run) for text in expected} == expected


def test_cells_have_as_many_places_as_the_spread_allows() -> None:
    cell = module("results").cell
    assert cell({"mean": 2.31456, "spread": 0.00432}) == "2.3146 ± 0.0043"
    assert cell({"mean": 812345.0, "spread": 1234.5}) == "812,345 ± 1,234"
    assert cell({"mean": 2.31456, "spread": None}) == "2.315"
    assert cell({"mean": None, "spread": None}) == "–"


def test_results_replace_the_text_between_their_comments(tmp_path: Path) -> None:
    page, picture = tmp_path / "docs" / "evidence.md", tmp_path / "x.png"
    page.parent.mkdir()
    picture.write_bytes(b"a picture")
    begin, end = module("evidence").markers("x")
    page.write_text(f"before\n{begin}\nnot measured yet\n{end}\nafter\n")
    for text in ("| a |", "| b |"):
        module("evidence").fill("x", f"{text}\n", picture, page)
        assert page.read_text() == f"before\n{begin}\n{text}\n{end}\nafter\n"
    assert (page.parent / "evidence" / "x.png").read_bytes() == b"a picture"
    with pytest.raises(UserError, match="has no place for y"):
        module("evidence").fill("y", "", picture, page)


def a_trial(folder: Path, *arguments: str) -> Any:
    config = configure(["--config-name", "pretrain-tiny"])
    return module("recipe").Trial("usual", 1, folder / "usual-seed1", arguments, config, False)


def test_a_run_that_fails_is_a_result_and_stays_one(tmp_path: Path) -> None:
    trial = a_trial(tmp_path, "--config-name", "pretrain-tiny", "training.stesp=1")
    runner = module("runs").TrialRunner
    run = lambda *, retry=False: runner(1, False, retry).run([module("schedule").SharedTrial(trial)])
    run()
    outcome = module("outcomes").outcome_of(trial)
    assert (outcome["ended"], outcome["exit_code"]) == ("failed", 2)
    assert "Did you mean 'training.steps'" in outcome["message"]
    output = trial.run_dir / module("processes").OUTPUT
    once = output.read_text()
    run()
    assert output.read_text() == once
    run(retry=True)
    assert output.read_text() == 2 * once


def test_a_run_without_its_checkpoint_is_trained_again(tmp_path: Path) -> None:
    """Records only, from another machine, of a run that was trained and not evaluated yet."""
    trial = a_trial(tmp_path, "--config-name", "pretrain-tiny", "training.stesp=1")
    trial = dataclasses.replace(trial, is_evaluated=True)
    trial.run_dir.mkdir(parents=True)
    (trial.run_dir / "summary.json").write_text(json.dumps({"steps": trial.config.training.steps}))
    module("runs").TrialRunner(1, False, False).run([module("schedule").SharedTrial(trial)])
    outcome = module("outcomes").outcome_of(trial)
    assert outcome["ended"] == "failed", "that setting is refused, so the training was started"
    assert not (trial.run_dir / "summary.json").exists()


def test_no_run_starts_after_a_study_is_stopped(tmp_path: Path) -> None:
    runner = module("runs").TrialRunner(1, False, False)
    runner.stop()
    trial = a_trial(tmp_path, "--config-name", "pretrain-tiny")
    runner.run([module("schedule").SharedTrial(trial)])
    assert module("outcomes").outcome_of(trial) is None


def test_a_study_does_not_continue_with_other_settings(tmp_path: Path) -> None:
    record_arguments = module("outcomes").record_arguments
    record_arguments([a_trial(tmp_path, "--config-name", "pretrain-tiny")])
    record_arguments([a_trial(tmp_path, "--config-name", "pretrain-tiny")])
    with pytest.raises(UserError, match="Choose another --output"):
        record_arguments([a_trial(tmp_path, "--config-name", "pretrain-tiny", "training.steps=7")])


def all_trials() -> list[list[Any]]:
    recipe = module("recipe")
    return [recipe.trials(recipe.read(recipe.find(study)), Path("out") / study, 2, [], []) for study in STUDIES]


def test_every_studys_first_variants_come_first_with_all_their_seeds() -> None:
    studies = all_trials()
    queue = module("schedule").schedule(studies)
    runs = [{(t.run_dir, t.seed) for t in (shared.trial, *shared.copies)} for shared in queue]
    assert sum(map(len, runs)) == sum(map(len, studies)), "every run, once"
    for rank in (1, 2):
        early = set().union(*runs[: 2 * rank * len(studies)])
        for trials in studies:
            variants = list(dict.fromkeys(trial.variant for trial in trials))[:rank]
            assert {(t.run_dir, t.seed) for t in trials if t.variant in variants} <= early


def test_only_equal_runs_are_shared() -> None:
    for shared in module("schedule").schedule(all_trials()):
        for copy in shared.copies:
            assert copy.seed == shared.trial.seed
            assert shared.trial.is_evaluated or not copy.is_evaluated
            excluded = {"recipe", "run_dir", "evaluate"}
            assert copy.config.model_dump(exclude=excluded) == shared.trial.config.model_dump(exclude=excluded)
            assert not copy.is_evaluated or copy.config.evaluate == shared.trial.config.evaluate
    plain = next(
        shared
        for shared in module("schedule").schedule(all_trials())
        if "hybrid" in {trial.variant for trial in (shared.trial, *shared.copies)}
    )
    assert len(plain.copies) >= 5, "the baseline of most studies"


def test_a_shared_run_is_copied_into_the_other_study(tmp_path: Path) -> None:
    schedule, outcomes = module("schedule"), module("outcomes")
    source, copy = (a_trial(tmp_path / name, "--config-name", "pretrain-tiny") for name in "ab")
    copy = dataclasses.replace(copy, variant="plain")
    (source.run_dir / "checkpoints").mkdir(parents=True)
    (source.run_dir / "config.yaml").write_text("recipe: usual\nrun_dir: elsewhere\nstage: pretrain\n")
    (source.run_dir / "metrics.jsonl").write_text('{"step": 1, "loss/train": 2.0}\n')
    (source.run_dir / outcomes.OUTCOME).write_text('{"ended": "done"}')
    shared = schedule.SharedTrial(source, [copy])
    module("runs").TrialRunner(1, False, False).run([shared])
    assert outcomes.outcome_of(copy) == {"ended": "done", "shared_with": "a/usual-seed1"}
    run_files = module("results").load(copy.run_dir)
    assert run_files.config == {"recipe": "plain", "run_dir": str(copy.run_dir), "stage": "pretrain"}
    assert run_files.records[0]["loss/train"] == 2.0
    assert not (copy.run_dir / "checkpoints").exists()


def test_the_archive_has_records_and_no_weights(tmp_path: Path) -> None:
    study = tmp_path / "runs" / "ablation-x"
    for name in ("a-seed1/metrics.jsonl", "a-seed1/checkpoints/step_1/weights", "comparison.html", "results.json"):
        (study / name).parent.mkdir(parents=True, exist_ok=True)
        (study / name).write_text("{}")
    (study / "latest").symlink_to("a-seed1")
    size = module("archive").pack(tmp_path / "out" / "studies.tar.xz", [study, tmp_path / "absent"])
    assert size == (tmp_path / "out" / "studies.tar.xz").stat().st_size
    with tarfile.open(tmp_path / "out" / "studies.tar.xz") as archive:
        files = {member.name for member in archive if member.isfile()}
    assert files == {"ablation-x/a-seed1/metrics.jsonl", "ablation-x/results.json"}


@pytest.mark.parametrize("words", [[], ["ablation-gate", "--all"], ["--all", "--only", "decayed"]])
def test_a_command_line_without_a_study_or_with_exclusive_options_is_refused(words: list[str]) -> None:
    done = forked.run(ROOT / "tools/studies/ablation.py", *words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_complete_study(tmp_path: Path) -> None:
    """Two variants, one of which diverges; then the same command again, when no run is left."""
    output = tmp_path / "out"
    words = [written(tmp_path), "--seeds", "1", "--output", output]
    done = forked.run(ROOT / "tools/studies/ablation.py", *words, seconds=900)
    assert done.returncode == 0, done.stderr
    results = json.loads((output / "results.json").read_text())
    usual, wild = (results["variants"][name] for name in ("usual", "wild"))
    assert usual["ended"] == {"done": 1}
    assert wild["ended"] == {"diverged": 1}
    assert 4 < usual["measures"]["validation loss"]["mean"] < 8
    assert usual["measures"]["recall"]["mean"] > 1
    assert wild["measures"]["recall"]["mean"] is None, "a diverged run is not evaluated"
    assert wild["measures"]["spikes"]["mean"] >= 1
    assert usual["measures"]["spikes"]["mean"] == 0
    assert results["runs"]["wild-seed1"]["exit_code"] == 2, "stopped by the health checks"
    assert "not finite" in results["runs"]["wild-seed1"]["message"]
    assert "| usual | 1 done |" in (output / "results.md").read_text()
    page = (output / "comparison.html").read_text()
    assert all(name in page for name in ("usual", "wild"))
    assert (output / "ablation-small.png").stat().st_size > 1000
    assert not list(output.glob("*/checkpoints"))
    logs = {path: path.read_text() for path in output.glob("*-seed1/output.txt")}
    assert len(logs) == 2
    again = forked.run(ROOT / "tools/studies/ablation.py", *words)
    assert again.returncode == 0, again.stderr
    assert {path: path.read_text() for path in logs} == logs
