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
the code folder instead of a recipe; {from} and {run_dir} in its arguments are replaced by those directories, other
braces are kept. A stage may set `nodes` and `time`. On the command line `stage.setting=value` overrides a setting of
one stage, and `all.setting=value` of every recipe.
"""

import json
import re
import secrets
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from megatron_q3n.config import RunConfig, UserError, suggest
from megatron_q3n.config.section import Section
from slurm import progress
from slurm.directives import check_line, check_time
from slurm.yaml_files import read_mapping

PREFIX = "pipeline-"
FILE = "pipeline.json"
CODE = "code"
# a stage's name is a folder, a job's name, and the first part of stage.setting=value
STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
RESERVED_NAMES = ("all", CODE, progress.SLURM_FOLDER)
_PLACEHOLDER = re.compile(r"(?<!\$)\{(\w+)[^{}\s]*\}")


class StageRecipe(Section):
    """One stage of a pipeline file."""

    recipe: str | None = None
    tool: list[str] | None = Field(None, min_length=1)
    begins_with: str | None = Field(None, alias="from")
    overrides: list[str] = Field(default_factory=list)
    nodes: int | None = Field(None, gt=0)
    time: str | None = None

    @field_validator("recipe")
    @classmethod
    def _names_a_file(cls, recipe: str | None) -> str | None:
        return None if recipe is None else check_recipe_name(recipe, "recipe")

    @field_validator("tool")
    @classmethod
    def _has_lines(cls, tool: list[str] | None) -> list[str] | None:
        for part in tool or []:
            check_line(part, "tool")
        return tool

    @field_validator("time")
    @classmethod
    def _is_time(cls, time: str | None) -> str | None:
        return None if time is None else check_time(time, "time")

    def tool_command(self, source: Path | None, run_dir: Path) -> list[str]:
        """Return the command of a tool, with its directories in the places of {from} and {run_dir}."""
        directories = {"run_dir": str(run_dir)} | ({"from": str(source)} if source else {})
        return [_PLACEHOLDER.sub(lambda match: directories[match[1]], part) for part in self.tool or []]


class PipelineRecipe(Section):
    """A file recipes/pipeline-*.yaml."""

    stages: dict[str, StageRecipe] = Field(min_length=1)


class SubmittedStage(BaseModel):
    """One stage in pipeline.json; its run directory is the folder of its name beside that file."""

    model_config = ConfigDict(frozen=True)

    name: str
    begins_with: str | None = Field(None, alias="from")
    tool: list[str] = Field(default_factory=list)
    nodes: int = Field(1, gt=0)
    time: str | None = None

    @field_validator("name")
    @classmethod
    def _is_folder(cls, name: str) -> str:
        return check_stage_name(name, FILE)


class SubmittedPipeline(BaseModel):
    """A file pipeline.json."""

    stages: list[SubmittedStage] = Field(min_length=1)


class SubmittedJob(BaseModel):
    """What is read of a job.json here; the supervisor reads all of it."""

    model_config = ConfigDict(frozen=True)

    steps: int | None = None
    time: str | None = None


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
    # why it would be refused, and files of the user for the snapshot (name there -> file)
    problem: str | None = None
    user_files: dict[str, Path] = field(default_factory=dict)

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


def check_recipe_name(name: str, where: str) -> str:
    """Check that a recipe's name is one, without folders; return it without .yaml.

    Raises: UserError that names `where`.
    """
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise UserError(
            f"{where}: {name!r} is not the name of a recipe (letters, digits, _, - and .); name its folder with "
            "--config-dir."
        )
    return name.removesuffix(".yaml")


def check_stage_name(name: str, where: str) -> str:
    """Check the name of a stage; return it.

    Raises: UserError that names `where`.
    """
    if not STAGE_NAME.fullmatch(name) or name in RESERVED_NAMES:
        raise UserError(
            f"{where}: {name!r} cannot be the name of a stage, because it becomes a folder: letters, digits, _ and -, "
            f"but not {', '.join(RESERVED_NAMES)}."
        )
    return name


def read_recipe(path: Path) -> PipelineRecipe:
    """Read and check a pipeline file.

    Raises: UserError that names the stage and the problem.
    """
    try:
        recipe = PipelineRecipe.model_validate(read_mapping(path))
    except ValidationError as error:
        raise UserError(f"{path}: {_problems(error)}") from None
    before: list[str] = []
    for name, stage in recipe.stages.items():
        check_stage_name(name, str(path))
        if (stage.recipe is None) == (stage.tool is None):
            raise UserError(f"{path}: stage {name} needs either a recipe or a tool.")
        if stage.tool is not None and stage.overrides:
            raise UserError(f"{path}: stage {name}: overrides are for recipes; give a tool its options in `tool`.")
        if stage.tool is not None and stage.nodes is not None:
            raise UserError(f"{path}: stage {name}: a tool runs as one process; leave out nodes.")
        if stage.begins_with is not None and stage.begins_with not in before:
            raise UserError(
                f"{path}: stage {name} is from {stage.begins_with}, which is not an earlier stage"
                f"{suggest(stage.begins_with, before)} (earlier stages: {', '.join(before) or 'none'})."
            )
        _check_placeholders(path, name, stage)
        before.append(name)
    return recipe


def _check_placeholders(path: Path, name: str, stage: StageRecipe) -> None:
    allowed = ["{run_dir}", *(["{from}"] if stage.begins_with else [])]
    for part in stage.tool or []:
        for match in _PLACEHOLDER.finditer(part):
            if match[0] not in allowed:
                reason = "" if stage.begins_with or match[0] != "{from}" else ", because the stage has no `from`"
                raise UserError(
                    f"{path}: stage {name}: tool: {match[0]} in {part!r} is not one of {', '.join(allowed)}{reason}."
                )


def _problems(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, p['loc']))}: {p['msg'].removeprefix('Value error, ')}" for p in error.errors()
    )


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


def is_pipeline(folder: Path) -> bool:
    """Return whether a folder is the directory of a pipeline."""
    return (folder / FILE).is_file()


def read_lineage(folder: Path) -> list[Stage]:
    """Return the stages of a pipeline directory, in order, or the single stage of a run directory, without settings.

    Raises: UserError if it is neither, or its files are damaged.
    """
    folder = folder.resolve()
    if is_pipeline(folder):
        submitted = _read_json(folder / FILE, SubmittedPipeline)
        return [
            Stage(
                stage.name,
                folder / stage.name,
                folder / CODE,
                tool=stage.tool,
                begins_with=stage.begins_with,
                num_nodes=stage.nodes,
                time=stage.time,
            )
            for stage in submitted.stages
        ]
    stage = Stage(folder.name, folder, folder / CODE)
    if stage.job_file.is_file():
        return [replace(stage, time=read_job(stage).time)]
    raise UserError(
        f"{folder} was not written by slurm.submit (no {FILE}, no slurm/{progress.JOB}). Give the directory that it "
        "printed."
    )


def read_job(stage: Stage) -> SubmittedJob:
    """Return what the job.json of a stage says; a stage that was not written yet has none.

    Raises: UserError if it is damaged.
    """
    return _read_json(stage.job_file, SubmittedJob) if stage.job_file.exists() else SubmittedJob()


def _read_json[Model: BaseModel](path: Path, model: type[Model]) -> Model:
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path} is damaged: {_problems(error)}. Restore it, or submit to a new directory.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


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
