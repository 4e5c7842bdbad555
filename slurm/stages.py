"""Stages of a submission: a new recipe or pipeline, or what is left of a directory, validated for the site.

A stage that a check refuses keeps the reason in `Stage.problem`, so that a dry run can show the script beside it.
"""

import argparse
import math
import shlex
from dataclasses import replace
from pathlib import Path

from megatron_q3n.config import RunConfig, UserError, validate
from megatron_q3n.config.override_text import override
from megatron_q3n.config.run_sections import RunSections
from megatron_q3n.recipe import RECIPES, configured_tree
from slurm import jobs, pipeline, progress
from slurm.checks import check_run, check_tool
from slurm.directives import check_folder
from slurm.pipeline import CODE, PREFIX, Stage
from slurm.site import Site
from slurm.user_code import user_files


def new_stages(arguments: argparse.Namespace, site: Site) -> tuple[Path, list[Stage]]:
    """Return the directory and the stages of a new run or pipeline.

    Raises: UserError if settings are unknown, or the directory is not empty.
    """
    name = pipeline.check_recipe_name(arguments.config_name, "--config-name")
    if name.startswith(PREFIX):
        return _new_pipeline(arguments, site, name)
    command_line = _command_line(arguments, name, [*arguments.overrides, *_world_size(arguments.nodes, site)])
    stage = _configured(Stage(name, Path(), Path(), time=arguments.time), command_line)
    assert stage.config is not None
    folder = _new_folder(arguments, name, stage.config.run_dir, stage.config.runs_dir)
    return folder, [_checked(_placed(stage, folder, folder), site, arguments.nodes, None)]


def resumed_stages(arguments: argparse.Namespace, site: Site) -> tuple[Path, list[Stage]]:
    """Return an existing directory and its stages, with changed settings for those that are not done.

    Raises: UserError for a directory that was not written by this command or is in the queue, or unknown settings.
    """
    folder = check_folder(arguments.resume.resolve(), "--resume")
    lineage = pipeline.read_lineage(folder)
    names = [stage.name for stage in lineage]
    is_single = not pipeline.is_pipeline(folder)
    extra = {names[0]: arguments.overrides} if is_single else pipeline.overrides_by_stage(arguments.overrides, names)
    stages: list[Stage] = []
    for stage in lineage:
        before = next((s for s in stages if s.name == stage.begins_with), None)
        stage = replace(stage, time=arguments.time or stage.time)
        if stage.tool:
            _refuse_settings_of_tool(stage.name, arguments.overrides)
            if not stage.is_done:
                stage = _checked_tool(stage, before)
        else:
            _refuse_folders(extra[stage.name], "--resume continues the run where it is")
            settings = [*extra[stage.name], *_world_size(arguments.nodes, site)]
            stage = _configured(stage, ["--resume", str(stage.run_dir), *settings])
            if not stage.is_done:
                stage = _checked(stage, site, arguments.nodes, before)
        _check_not_queued(stage)
        stages.append(stage)
    return folder, stages


def _new_pipeline(arguments: argparse.Namespace, site: Site, name: str) -> tuple[Path, list[Stage]]:
    config_dir = Path(arguments.config_dir) if arguments.config_dir else RECIPES
    path = next((p for p in (config_dir / f"{name}.yaml", RECIPES / f"{name}.yaml") if p.exists()), None)
    if path is None:
        available = ", ".join(sorted(p.stem for p in RECIPES.glob(f"{PREFIX}*.yaml")))
        raise UserError(f"--config-name {name}: no such pipeline. Available: {available}.")
    recipe = pipeline.read_recipe(path)
    overrides, parents = _without_parent(arguments.overrides)
    extra = pipeline.overrides_by_stage(overrides, list(recipe.stages))
    folder = _new_folder(arguments, name, None, parents[-1] if parents else "runs")
    stages: list[Stage] = []
    for stage_name, spec in recipe.stages.items():
        run_dir, source = folder / stage_name, folder / spec.begins_with if spec.begins_with else None
        before = next((s for s in stages if s.name == spec.begins_with), None)
        if spec.tool is not None:
            _refuse_settings_of_tool(stage_name, overrides)
            tool = spec.tool_command(source, run_dir)
            stage = _checked_tool(Stage(stage_name, run_dir, folder / CODE, tool=tool), before)
        else:
            settings = [*spec.overrides, *extra[stage_name]]
            _refuse_folders(settings, f"a stage's directory is {folder.parent}/…/{stage_name}; use all.runs_dir=…")
            settings += [override("checkpoint.load", source)] if source else []
            nodes = arguments.nodes or spec.nodes
            command_line = _command_line(arguments, spec.recipe or "", [*settings, *_world_size(nodes, site)])
            stage = _configured(Stage(stage_name, run_dir, folder / CODE), command_line)
            stage = _checked(_placed(stage, run_dir, folder), site, nodes, before)
        stages.append(replace(stage, begins_with=spec.begins_with, time=arguments.time or spec.time))
    return folder, stages


def _new_folder(arguments: argparse.Namespace, name: str, run_dir: str | None, runs_dir: str) -> Path:
    """Return the new directory: --run-dir, the setting run_dir, or a new name below runs_dir."""
    if arguments.run_dir and run_dir:
        raise UserError(f"--run-dir {arguments.run_dir} and the setting run_dir, {run_dir}: give one of them.")
    chosen = arguments.run_dir or (Path(run_dir) if run_dir else None)
    folder = check_folder((chosen or pipeline.new_folder(runs_dir, name)).expanduser().resolve(), "run directory")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--run-dir {folder} is not empty; to resume it: --resume {shlex.quote(str(folder))}")
    return folder


def _without_parent(overrides: list[str]) -> tuple[list[str], list[str]]:
    """Return a pipeline's overrides without all.runs_dir=…, and its values."""
    name = "all.runs_dir="
    rest = [text for text in overrides if not text.startswith(name)]
    return rest, [text.removeprefix(name).strip("'\"") for text in overrides if text.startswith(name)]


def _refuse_folders(settings: list[str], reason: str) -> None:
    for setting in settings:
        if setting.partition("=")[0].lstrip("+") in ("run_dir", "runs_dir"):
            raise UserError(f"{setting} has no effect here: {reason}.")


def _refuse_settings_of_tool(stage: str, overrides: list[str]) -> None:
    for text in overrides:
        if text.startswith(f"{stage}."):
            raise UserError(f"{text}: stage {stage} is a tool and has no settings; change `tool` in the pipeline file.")


def _command_line(arguments: argparse.Namespace, recipe: str, overrides: list[str]) -> list[str]:
    config_dir = ["--config-dir", arguments.config_dir] if arguments.config_dir else []
    return [*config_dir, "--config-name", recipe, "--", *overrides]


def _world_size(nodes: int | None, site: Site) -> list[str]:
    return [f"parallel.world_size={nodes * site.ranks_per_node}"] if nodes else []


def _configured(stage: Stage, command_line: list[str]) -> Stage:
    """Return the stage with its configuration, and as its problem the rule between settings that it breaks.

    Raises: UserError for unknown settings and values, without which there is no job to show.
    """
    tree = configured_tree(command_line)
    try:
        return replace(stage, config=validate(tree))
    except UserError as error:
        try:
            sections = RunSections.model_validate(tree)
        except ValueError:
            raise error from None
        return replace(stage, config=RunConfig.model_construct(**dict(sections)), problem=str(error))


def _checked(stage: Stage, site: Site, nodes: int | None, before: Stage | None) -> Stage:
    """Return the stage with its number of nodes and the user's files, and the first reason why it could not run."""
    assert stage.config is not None
    stage = replace(stage, num_nodes=nodes or math.ceil(stage.config.world_size / site.ranks_per_node))
    if stage.problem is not None:
        return stage
    try:
        before_config = before.config if before is not None else None
        check_run(stage.config, site, stage.num_nodes, before_config, loads_later=before is not None)
        return replace(stage, user_files=user_files(stage.config, site))
    except UserError as error:
        return replace(stage, problem=str(error))


def _checked_tool(stage: Stage, before: Stage | None) -> Stage:
    """Return the stage of a tool, and the reason why it could not run on the model of the stage before it."""
    config = before.config if before is not None and before.problem is None else None
    try:
        check_tool(stage.name, stage.tool, config)
    except UserError as error:
        return replace(stage, problem=str(error))
    return stage


def _placed(stage: Stage, run_dir: Path, folder: Path) -> Stage:
    """Return the stage in its run directory, which its configuration names too."""
    config = stage.config and stage.config.model_copy(update={"run_dir": str(run_dir)})
    return replace(stage, run_dir=run_dir, code=folder / CODE, config=config)


def _check_not_queued(stage: Stage) -> None:
    ids = [str(line["job"]) for line in progress.attempts(stage.run_dir) if line.get("job")]
    for job_id, (state, _) in jobs.states(ids[-1:]).items():
        if jobs.is_active(state):
            raise UserError(f"{stage.name} is already job {job_id} ({state}); run scancel {job_id} first.")
