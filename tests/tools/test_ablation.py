"""Studies: their files, what is read of a run, how runs end, and one whole small study on a CPU.

Not covered: that a study's size shows its effect. The report over several runs: tests/metrics.
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
    "source": "nobody",
    "base": "pretrain-mini",
    "common": [
        *TINY,
        "schedule.style=constant",
        "schedule.min_lr=0",
        "samples.count=0",
        "validation.batches=1",
        "evaluate.rows=2",
        "evaluate.context_tokens=64",
        "evaluate.recall_lengths=[4]",
        "evaluate.recall_rows=3",
    ],
    "variants": {"usual": ["schedule.lr=1.0e-3"], "wild": ["schedule.lr=1.0e+6"]},
    "compare": {"validation loss": "loss/validation", "recall": "recall/loss_4", "spikes": "loss/train spikes"},
    "evaluate": True,
}


@pytest.fixture(autouse=True)
def registered_defaults() -> None:
    """Register the settings' defaults with Hydra, as the command does."""
    register_defaults()


def room(name: str) -> Any:
    """Import a file of tools/ablations/."""
    return importlib.import_module(f"tools.studies.ablations.{name}")


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "ablation-small.yaml"
    path.write_text(yaml.safe_dump({**SMALL_STUDY, **changes}, allow_unicode=True))
    return path


@pytest.mark.parametrize("study", STUDIES)
def test_study_is_legal_at_its_size_and_at_a_tiny_one_and_has_its_place(study: str) -> None:
    recipe = room("recipe").read(room("recipe").find(study))
    assert recipe.seeds >= 2
    for settings in ([], [*TINY, "evaluate.context_tokens=64"]):
        trials = room("recipe").trials(recipe, Path("out"), recipe.seeds, [], settings)
        assert len(trials) == recipe.seeds * len(recipe.variants)
        obstacles = {trial.config.graph_obstacle() for trial in trials}
        assert settings or obstacles == {None}, "without a CUDA graph a run takes four times as long"
        assert trials[0].config.training.steps == (8 if settings else trials[0].config.training.steps)
    page = room("evidence").PAGE.read_text()
    assert all(page.count(comment) == 1 for comment in room("evidence").place(study))
    assert f"`tools/studies/ablation.py {study}" in page


STATUSES = ("reproduced", "not at this size", "opposite", "not measured yet", "step 0 measured below")


def test_every_study_answers_a_claim_and_every_claim_has_a_status() -> None:
    page = room("evidence").PAGE.read_text()
    table = page.partition("## Claims")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    claims = rows[1:]
    assert len(claims) == 16, "15 of Qwen3-Next's description and the papers behind it, and a question of our own"
    for claim, source, asked, status in claims:
        assert claim.strip()
        assert source.strip()
        assert status.strip().strip("*").startswith(STATUSES), claim
        for study, section in re.findall(r"\[(ablation-[a-z-]+)\]\(#([a-z-]+)\)", asked):
            heading = page.partition(room("evidence").place(study)[0])[0].rpartition("\n## ")[2]
            named = re.sub(r"[^a-z -]", "", heading.splitlines()[0].lower()).replace(" ", "-")
            assert (study in STUDIES, named) == (True, section)
    assert {*re.findall(r"\[(ablation-[a-z-]+)\]", table)} == {*STUDIES}


def test_the_patterns_compared_have_equally_many_parameters() -> None:
    recipe = room("recipe").read(room("recipe").find("ablation-pattern"))
    count = importlib.import_module("megatron_q3n.config.sizes").parameters
    trials = room("recipe").trials(recipe, Path("out"), 1, [], [])
    totals = [count(trial.config.model).total_with_mtp for trial in trials]
    assert max(totals) < 1.002 * min(totals)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a name nobody knows": ({"colour": "red"}, "colour: Extra inputs are not permitted"),
    "no question": ({"question": ""}, "question: String should have at least 1"),
    "one variant": ({"variants": {"a": []}}, "variants: Dictionary should have at least 2"),
    "more than colours": ({"variants": {f"v{i}": [f"x={i}"] for i in range(9)}}, "at most 8"),
    "same variants": ({"variants": {"a": [], "b": []}}, "two variants have the same settings"),
    "not a folder's name": ({"variants": {"a/b": [], "c": ["x=1"]}}, "variant 'a/b': a name has"),
    "the study's own": ({"common": ["training.seed=3"]}, "common: training.seed=3 is set by the study itself"),
    "no metric": ({"compare": {"loss": "loss/validatoin"}}, "Did you mean 'loss/validation'"),
    "no such reading": ({"compare": {"loss": "loss/train best"}}, "'best' is none of last, first"),
    "spikes of another": ({"compare": {"x": "grad_norm spikes"}}, "spikes are counted of loss/train alone"),
    "recall over time": ({"compare": {"x": "recall/loss_4 max"}}, "measured once, at the end"),
    "recall without a look": ({"evaluate": False}, "recall/loss_4 needs evaluate: true"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_study_is_refused(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(UserError) as refused:
        room("recipe").read(written(tmp_path, **changes))
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
def test_wrong_runs_are_refused_before_any_begins(case: str, tmp_path: Path) -> None:
    changes, only, settings, message = WRONG_RUNS[case]
    recipe = room("recipe").read(written(tmp_path, **changes))
    with pytest.raises(UserError) as refused:
        room("recipe").trials(recipe, tmp_path / "out", 1, only, settings)
    assert message in str(refused.value)


def test_an_ablation_is_no_recipe_and_a_recipe_no_ablation() -> None:
    with pytest.raises(UserError, match=r"run it with tools/ablation\.py ablation-gate"):
        configure(["--config-name", "ablation-gate"])
    with pytest.raises(UserError, match="no such study"):
        room("recipe").find("pretrain-small")


def losses(*values: float) -> Any:
    records = [{"step": step, "loss/train": value} for step, value in enumerate(values, start=1)]
    return SimpleNamespace(records=records, evaluation=None)


def test_what_is_divergence() -> None:
    diverged = room("measures").has_diverged
    falling = [6 - 0.03 * step for step in range(100)]
    assert not diverged(losses(*falling))
    assert not diverged(losses(*falling[:60], 9.0, *falling[60:])), "one spike is none"
    assert diverged(losses(*falling, *[4.0] * 20))
    assert not diverged(losses(*falling, *[3.4] * 20))
    assert diverged(losses(*falling, float("nan")))
    assert diverged(losses(float("nan")))
    assert not diverged(losses())


def test_spikes_are_counted_step_by_step() -> None:
    steady = [3.0 + 0.01 * (step % 5) for step in range(60)]
    run = losses(*steady, 8.0, 8.0, *steady, float("nan"))
    assert room("measures").measure("loss/train spikes").of(run) == 3
    assert room("measures").measure("loss/train spikes").of(losses(*steady)) == 0


def test_measures_read_records_and_the_evaluation() -> None:
    measure = room("measures").measure
    run = losses(5.0, 2.0, float("nan"), 3.0)
    run.evaluation = {
        "tasks": {"repeat 16 tokens": {"accuracy": 0.75, "loss": 1.5}},
        "sets": {"validation": {"loss": 2.0, "by_position": [{"from": 0, "loss": 3.0}, {"from": 64, "loss": 1.0}]}},
    }
    found = {
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
    assert {text: measure(text).of(run) for text in found} == found


def test_cells_have_as_many_places_as_the_spread_allows() -> None:
    cell = room("results").cell
    assert cell({"mean": 2.31456, "spread": 0.00432}) == "2.3146 ± 0.0043"
    assert cell({"mean": 812345.0, "spread": 1234.5}) == "812,345 ± 1,234"
    assert cell({"mean": 2.31456, "spread": None}) == "2.315"
    assert cell({"mean": None, "spread": None}) == "–"


def test_results_take_their_place_in_the_page(tmp_path: Path) -> None:
    page, picture = tmp_path / "docs" / "evidence.md", tmp_path / "x.png"
    page.parent.mkdir()
    picture.write_bytes(b"a picture")
    begin, end = room("evidence").place("x")
    page.write_text(f"before\n{begin}\nnot measured yet\n{end}\nafter\n")
    for text in ("| a |", "| b |"):
        room("evidence").fill("x", f"{text}\n", picture, page)
        assert page.read_text() == f"before\n{begin}\n{text}\n{end}\nafter\n"
    assert (page.parent / "evidence" / "x.png").read_bytes() == b"a picture"
    with pytest.raises(UserError, match="has no place for y"):
        room("evidence").fill("y", "", picture, page)


def a_trial(folder: Path, *arguments: str) -> Any:
    config = configure(["--config-name", "pretrain-tiny"])
    return room("recipe").Trial("usual", 1, folder / "usual-seed1", arguments, config, False)


def test_a_run_that_fails_is_a_result_and_stays_one(tmp_path: Path) -> None:
    trial = a_trial(tmp_path, "--config-name", "pretrain-tiny", "training.stesp=1")
    bench = room("runs").Bench
    run = lambda *, retry=False: bench(1, False, retry).run([room("schedule").Shared(trial)])
    run()
    outcome = room("outcomes").outcome_of(trial)
    assert (outcome["ended"], outcome["exit_code"]) == ("failed", 2)
    assert "Did you mean 'training.steps'" in outcome["message"]
    output = trial.run_dir / room("processes").OUTPUT
    once = output.read_text()
    run()
    assert output.read_text() == once
    run(retry=True)
    assert output.read_text() == 2 * once


def test_a_run_whose_model_is_gone_is_made_anew(tmp_path: Path) -> None:
    """Records alone, from another machine, of a run that was trained and not evaluated yet."""
    trial = a_trial(tmp_path, "--config-name", "pretrain-tiny", "training.stesp=1")
    trial = dataclasses.replace(trial, is_evaluated=True)
    trial.run_dir.mkdir(parents=True)
    (trial.run_dir / "summary.json").write_text(json.dumps({"steps": trial.config.training.steps}))
    room("runs").Bench(1, False, False).run([room("schedule").Shared(trial)])
    outcome = room("outcomes").outcome_of(trial)
    assert outcome["ended"] == "failed", "that setting is refused: so it was trained again"
    assert not (trial.run_dir / "summary.json").exists()


def test_nothing_begins_once_a_study_stops(tmp_path: Path) -> None:
    bench = room("runs").Bench(1, False, False)
    bench.stop()
    trial = a_trial(tmp_path, "--config-name", "pretrain-tiny")
    bench.run([room("schedule").Shared(trial)])
    assert room("outcomes").outcome_of(trial) is None


def test_a_study_does_not_go_on_with_other_settings(tmp_path: Path) -> None:
    remember = room("outcomes").remember
    remember([a_trial(tmp_path, "--config-name", "pretrain-tiny")])
    remember([a_trial(tmp_path, "--config-name", "pretrain-tiny")])
    with pytest.raises(UserError, match="Choose another --output"):
        remember([a_trial(tmp_path, "--config-name", "pretrain-tiny", "training.steps=7")])


def all_trials() -> list[list[Any]]:
    recipe = room("recipe")
    return [recipe.trials(recipe.read(recipe.find(study)), Path("out") / study, 2, [], []) for study in STUDIES]


def test_every_studys_first_variants_come_first_with_all_their_seeds() -> None:
    studies = all_trials()
    queue = room("schedule").schedule(studies)
    made = [{(t.run_dir, t.seed) for t in (shared.trial, *shared.twins)} for shared in queue]
    assert sum(map(len, made)) == sum(map(len, studies)), "every run, once"
    for rank in (1, 2):
        early = set().union(*made[: 2 * rank * len(studies)])
        for trials in studies:
            variants = list(dict.fromkeys(trial.variant for trial in trials))[:rank]
            assert {(t.run_dir, t.seed) for t in trials if t.variant in variants} <= early


def test_only_what_is_the_same_run_is_shared() -> None:
    for shared in room("schedule").schedule(all_trials()):
        for twin in shared.twins:
            assert twin.seed == shared.trial.seed
            assert shared.trial.is_evaluated or not twin.is_evaluated
            own = {"recipe", "run_dir", "evaluate"}
            assert twin.config.model_dump(exclude=own) == shared.trial.config.model_dump(exclude=own)
            assert not twin.is_evaluated or twin.config.evaluate == shared.trial.config.evaluate
    plain = next(
        shared
        for shared in room("schedule").schedule(all_trials())
        if "hybrid" in {trial.variant for trial in (shared.trial, *shared.twins)}
    )
    assert len(plain.twins) >= 5, "the plain model of most studies"


def test_a_shared_run_becomes_a_run_of_the_other_study(tmp_path: Path) -> None:
    schedule, outcomes = room("schedule"), room("outcomes")
    source, twin = (a_trial(tmp_path / name, "--config-name", "pretrain-tiny") for name in "ab")
    twin = dataclasses.replace(twin, variant="plain")
    (source.run_dir / "checkpoints").mkdir(parents=True)
    (source.run_dir / "config.yaml").write_text("recipe: usual\nrun_dir: elsewhere\nstage: pretrain\n")
    (source.run_dir / "metrics.jsonl").write_text('{"step": 1, "loss/train": 2.0}\n')
    (source.run_dir / outcomes.OUTCOME).write_text('{"ended": "done"}')
    shared = schedule.Shared(source, [twin])
    room("runs").Bench(1, False, False).run([shared])
    assert outcomes.outcome_of(twin) == {"ended": "done", "shared_with": "a/usual-seed1"}
    found = room("results").load(twin.run_dir)
    assert found.config == {"recipe": "plain", "run_dir": str(twin.run_dir), "stage": "pretrain"}
    assert found.records[0]["loss/train"] == 2.0
    assert not (twin.run_dir / "checkpoints").exists()


def test_the_archive_has_records_and_no_weights(tmp_path: Path) -> None:
    study = tmp_path / "runs" / "ablation-x"
    for name in ("a-seed1/metrics.jsonl", "a-seed1/checkpoints/step_1/weights", "comparison.html", "results.json"):
        (study / name).parent.mkdir(parents=True, exist_ok=True)
        (study / name).write_text("{}")
    (study / "latest").symlink_to("a-seed1")
    size = room("archive").pack(tmp_path / "out" / "studies.tar.xz", [study, tmp_path / "absent"])
    assert size == (tmp_path / "out" / "studies.tar.xz").stat().st_size
    with tarfile.open(tmp_path / "out" / "studies.tar.xz") as archive:
        files = {member.name for member in archive if member.isfile()}
    assert files == {"ablation-x/a-seed1/metrics.jsonl", "ablation-x/results.json"}


@pytest.mark.parametrize("words", [[], ["ablation-gate", "--all"], ["--all", "--only", "decayed"]])
def test_a_command_line_that_says_no_study_or_too_much_is_refused(words: list[str]) -> None:
    done = forked.run(ROOT / "tools/studies/ablation.py", *words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_whole_study(tmp_path: Path) -> None:
    """Two variants, one of which diverges; then again, when nothing is left to run; then published."""
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
    assert wild["measures"]["recall"]["mean"] is None, "what diverged is not evaluated"
    assert wild["measures"]["spikes"]["mean"] >= 1
    assert usual["measures"]["spikes"]["mean"] == 0
    assert results["runs"]["wild-seed1"]["exit_code"] == 2, "health ended it"
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
