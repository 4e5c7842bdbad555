"""Pipelines: validation of the file, a chain on a Slurm cluster with a failing stage, the same chain without Slurm."""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_q3n.config import UserError
from slurm.pipeline import overrides_by_stage, read_recipe
from tests import forked
from tests.slurm.cluster import Cluster
from tests.slurm.runs import FAULTS, ROOT, SITE, numbers, run_logs, submit, submitted

SHORT = [
    "all.training.sequence_length=64",
    "all.validation.batches=1",
    "all.samples.count=0",
    "all.logging.wandb.mode=disabled",
    "all.checkpoint.interval_steps=2",
    "pretrain.training.steps=4",
    "pretrain.schedule.warmup_steps=1",
    "longcontext.training.steps=2",
    "longcontext.schedule.warmup_steps=1",
]
CHAIN = """
stages:
  pretrain:
    recipe: pretrain-tiny
    overrides: [validation.bigram_baseline=false]
  longcontext:
    recipe: longcontext-tiny
    from: pretrain
  export:
    tool: [tools/convert_hf.py, export, "{from}", --output, "{run_dir}/huggingface"]
    from: longcontext
"""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def status(cluster: Cluster, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "slurm.status", str(folder)],
        cwd=ROOT,
        env={**cluster.environment, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.slurm
@pytest.mark.multiprocess
def test_a_failed_stage_stops_the_chain_and_resume_continues_it(
    cluster: Cluster, site: Callable[..., str], tmp_path: Path
) -> None:
    """A NaN batch: the first stage skips it, the second stops (health.non_finite=stop) and is resumed with skip."""
    folder, recipes = tmp_path / "chain", tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "pipeline-chain.yaml").write_text(CHAIN)
    fault = {"PYTHONPATH": str(FAULTS), "Q3N_FAULT": "nan@1"}
    strict = "longcontext.health.non_finite=stop"
    recipe_arguments = ["--config-name", "pipeline-chain", "--config-dir", str(recipes)]
    site_arguments = ["--site", site(environment=SITE["environment"] | fault)]
    jobs = submitted(cluster, *recipe_arguments, *site_arguments, "--run-dir", str(folder), *SHORT, strict)
    assert len(jobs) == 3
    states = [cluster.wait(job, *ENDED) for job in jobs]
    assert states == ["COMPLETED", "FAILED", "CANCELLED"], run_logs(folder / "longcontext")
    shown = status(cluster, folder)
    assert "step 2: loss nan" in " ".join(shown.split()), shown
    assert "not started" in shown
    assert "longcontext failed" in shown
    assert not (folder / "export" / "slurm" / "attempts.jsonl").read_text().count('"begin"')

    before = (folder / "pretrain" / "metrics.jsonl").read_text()
    lenient = strict.replace("stop", "skip")
    again = submitted(cluster, "--resume", str(folder), *site_arguments, lenient)
    assert len(again) == 2, "completed stages are not repeated"
    assert [cluster.wait(job, *ENDED) for job in again] == ["COMPLETED"] * 2, run_logs(folder / "export")
    assert (folder / "pretrain" / "metrics.jsonl").read_text() == before
    numbers(folder / "longcontext", steps=2)
    assert f"weights from {folder}/pretrain" in run_logs(folder / "longcontext"), "the lineage"
    exported = json.loads((folder / "export" / "huggingface" / "config.json").read_text())
    assert exported["moe_intermediate_size"] == 64
    assert status(cluster, folder).count(" done ") == 3

    nothing = submit(cluster, "--resume", str(folder), *site_arguments)
    assert "nothing is left to do" in nothing.stdout


SHORT_LATER = [
    "sft.training.steps=4",
    "sft.schedule.warmup_steps=1",
    "rl.training.steps=2",
    "mtp.training.steps=2",
    "mtp.schedule.warmup_steps=1",
]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_same_pipeline_runs_without_slurm(tmp_path: Path) -> None:
    """All of pipeline-tiny, with shortened stages: every stage loads the previous one's checkpoint and runs once."""
    folder = tmp_path / "chain"
    name = ["--config-name", "pipeline-tiny", "--run-dir", folder]
    done = forked.run("slurm.submit", "--local", *name, *SHORT, *SHORT_LATER, seconds=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lineage = ["pretrain", "longcontext", "sft", "rl", "mtp", "export"]
    for before, stage in itertools.pairwise(lineage[:-1]):
        assert f"weights from {folder}/{before}/checkpoints/step_" in run_logs(folder / stage)
    exported = folder / "export" / "huggingface"
    assert json.loads((exported / "config.json").read_text())["vocab_size"] == 512
    assert list(exported.glob("*.safetensors"))
    again = forked.run("slurm.submit", "--local", "--resume", folder)
    assert "nothing is left to do" in again.stdout


def written(tmp_path: Path, text: str) -> Path:
    (path := tmp_path / "pipeline-x.yaml").write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("stages: {a: {recipe: x, tool: [y]}}", "stage a needs either a recipe or a tool"),
        ("stages: {a: {}}", "stage a needs either a recipe or a tool"),
        ("stages: {a: {recipe: x}, b: {recipe: x, from: c}}", "b is from c, which is not an earlier stage"),
        ("stages: {a: {recipe: x, from: a}}", "a is from a, which is not an earlier stage"),
        ("stages: {a: {recipe: x, nodse: 2}}", "stages.a.nodse: Extra inputs"),
        ("stages: {../x: {recipe: x}}", "'../x' cannot be the name of a stage"),
        ("stages: {code: {recipe: x}}", "'code' cannot be the name of a stage"),
        ("stages: {a.b: {recipe: x}}", "'a.b' cannot be the name of a stage"),
        ("stages: {a: {recipe: ../x}}", "'../x' is not the name of a recipe"),
        ("stages: {a: {recipe: x, time: soon}}", "stages.a.time: time: 'soon' is not a time limit"),
        ("stages: {a: {recipe: x, nodes: 0}}", "stages.a.nodes: Input should be greater than 0"),
        ("stages: {}", "stages: Dictionary should have at least 1 item"),
        ("stages:", "stages: Input should be a valid dictionary"),
        ("", "stages: Field required"),
        ("- stages", "holds a list"),
        ("5", "holds a int"),
        ("stages: [", "is not valid YAML"),
        ("stages: {a: {recipe: x}, a: {recipe: y}}", "'a' is given twice"),
        ("stages: {a: {tool: []}}", "stages.a.tool: List should have at least 1 item"),
        ("stages: {a: {tool: ['{x}']}}", "{x} in '{x}' is not one of {run_dir}"),
        ("stages: {a: {tool: ['{run_dir.parent}']}}", "{run_dir.parent} in"),
        ("stages: {a: {tool: ['{run_dir!r}']}}", "{run_dir!r} in"),
        ("stages: {a: {tool: ['{from}']}}", "because the stage has no `from`"),
        ("stages: {a: {tool: [x], overrides: [a=b]}}", "overrides are for recipes"),
        ('stages: {a: {tool: ["x\\ny"]}}', "contains the control character"),
    ],
)
def test_an_invalid_pipeline_file_is_rejected(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=re.escape(complaint)):
        read_recipe(written(tmp_path, text))


def test_a_binary_pipeline_file_is_rejected(tmp_path: Path) -> None:
    (path := tmp_path / "pipeline-x.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="is not valid YAML"):
        read_recipe(path)


def test_braces_that_name_no_directory_are_kept(tmp_path: Path) -> None:
    """JSON, shell variables and empty braces are arguments like any other."""
    recipe = read_recipe(
        written(tmp_path, """stages: {a: {tool: [t, '{"a": {}}', '${HOME}', '{', 'x/{run_dir}/y']}}""")
    )
    command = recipe.stages["a"].tool_command(None, Path("/r"))
    assert command == ["t", '{"a": {}}', "${HOME}", "{", "x//r/y"]


def test_overrides_are_for_a_stage_or_for_all() -> None:
    by_stage = overrides_by_stage(["a.training.steps=3", "all.model=tiny"], ["a", "b"])
    assert by_stage == {"a": ["training.steps=3", "model=tiny"], "b": ["model=tiny"]}
    with pytest.raises(UserError, match="starts with its stage, one of a, b, or all"):
        overrides_by_stage(["training.steps=3"], ["a", "b"])
