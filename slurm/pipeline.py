"""Pipelines: ordered stages, each loading the checkpoint of an earlier one; a single recipe is a pipeline of one stage.

    # recipes/pipeline-tiny.yaml
    stages:
      pretrain:
        recipe: pretrain-tiny
        overrides: [training.steps=60]
      longcontext:
        recipe: longcontext-tiny
        from: pretrain              # checkpoint.load = the run directory of that stage
      export:
        tool: [tools/convert_hf.py, export, "{from}", --output, "{run_dir}/huggingface"]
        from: longcontext

A stage runs after the stage named in `from`. Its run directory is PIPELINE_DIR/<stage>. A `tool` is a command run in
the code folder instead of a recipe. A stage may set `nodes` and `time`. On the command line `stage.setting=value`
overrides a setting of one stage, and `all.setting=value` of every recipe.
"""

import json
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from megatron_q3n.config import RunConfig, UserError, suggest
from megatron_q3n.config.section import Section
from slurm import progress

PREFIX = "pipeline-"
FILE = "pipeline.json"


class StageRecipe(Section):
    """One stage of a pipeline file."""

    recipe: str | None = None
    tool: list[str] | None = None
    begins_with: str | None = Field(None, alias="from")
    overrides: list[str] = Field(default_factory=list)
    nodes: int | None = Field(None, gt=0)
    time: str | None = None


class PipelineRecipe(Section):
    """A file recipes/pipeline-*.yaml."""

    stages: dict[str, StageRecipe]


@dataclass
class Stage:
    """A validated stage with its run directory, ready to be written and run."""

    name: str
    run_dir: Path
    code: Path
    config: RunConfig | None = None
    tool: list[str] = field(default_factory=list)
    begins_with: str | None = None
    num_nodes: int = 1
    time: str | None = None

    @property
    def job_file(self) -> Path:
        """Path of the job description that the supervisor reads."""
        return self.run_dir / progress.SLURM_FOLDER / progress.JOB

    @property
    def script_file(self) -> Path:
        """Path of the sbatch script."""
        return self.run_dir / progress.SLURM_FOLDER / "job.sbatch"

    @property
    def is_done(self) -> bool:
        """Whether the stage is complete."""
        steps = self.config.training.steps if self.config else None
        return progress.is_concluded(self.run_dir, steps)


def read_recipe(path: Path) -> PipelineRecipe:
    """Read and check a pipeline file.

    Raises: UserError that names the stage and the problem.
    """
    try:
        recipe = PipelineRecipe.model_validate(yaml.safe_load(path.read_text()))
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise UserError(f"{path}: {'; '.join(problems)}") from None
    before: list[str] = []
    for name, stage in recipe.stages.items():
        if (stage.recipe is None) == (stage.tool is None):
            raise UserError(f"{path}: stage {name} needs either a recipe or a tool.")
        if stage.begins_with is not None and stage.begins_with not in before:
            raise UserError(
                f"{path}: stage {name} is from {stage.begins_with}, which is not an earlier stage"
                f"{suggest(stage.begins_with, before)} (earlier stages: {', '.join(before) or 'none'})."
            )
        before.append(name)
    return recipe


def overrides_by_stage(overrides: list[str], stages: list[str]) -> dict[str, list[str]]:
    """Group overrides `stage.setting=value` by stage; `all.` applies to every stage.

    Raises: UserError for an override that does not start with a stage.
    """
    by_stage: dict[str, list[str]] = {name: [] for name in stages}
    for override in overrides:
        stage, _, setting = override.partition(".")
        if stage != "all" and stage not in stages:
            raise UserError(
                f"{override}: in a pipeline a setting starts with its stage, one of {', '.join(stages)}, or all."
            )
        for name in stages if stage == "all" else [stage]:
            by_stage[name].append(setting)
    return by_stage


def new_folder(parent: str | Path, recipe: str) -> Path:
    """Return an unused path for a run or pipeline directory."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return Path(parent).resolve() / f"{recipe}-{stamp}-{secrets.token_hex(2)}"


def write_lineage(folder: Path, recipe: str, stages: list[Stage]) -> None:
    """Write pipeline.json: the stages, their run directories, and the stage that each loads from."""
    descriptions = [_describe(stage) for stage in stages]
    text = json.dumps({"recipe": recipe, "stages": descriptions}, indent=1)
    (folder / FILE).write_text(text + "\n")


def read_lineage(folder: Path) -> list[dict[str, Any]]:
    """Return the stages of a pipeline directory, in order, or the single stage of a run directory.

    Raises: UserError if it is neither.
    """
    if (folder / FILE).is_file():
        return json.loads((folder / FILE).read_text())["stages"]
    if (folder / progress.SLURM_FOLDER / progress.JOB).is_file():
        return [{"name": folder.name, "run_dir": str(folder.resolve()), "from": None}]
    raise UserError(
        f"{folder} was not written by slurm.submit (no {FILE}, no slurm/{progress.JOB}). Give the directory that it "
        "printed."
    )


def _describe(stage: Stage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "run_dir": str(stage.run_dir),
        "from": stage.begins_with,
        "tool": stage.tool,
        "nodes": stage.num_nodes,
        "time": stage.time,
        "steps": stage.config.training.steps if stage.config else None,
    }
