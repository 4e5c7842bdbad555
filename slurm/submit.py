"""Submit a recipe or a pipeline to Slurm: validate it, write what will run, submit, and say where to look.

    python -m slurm.submit --config-name pretrain-tiny --site my-cluster [setting=value …]
    python -m slurm.submit --config-name pipeline-tiny --site my-cluster [stage.setting=value …]
    python -m slurm.submit --resume runs/pipeline-tiny-…             go on after a failure, changed settings allowed
    … --dry-run     print the scripts, write and submit nothing
    … --local       run the same stages here, one after the other, without Slurm

Everything a job runs is in its run directory: config.yaml, code/, slurm/job.sbatch, slurm/job.json.
"""

import argparse
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import yaml

from megatron_q3n.config import EXIT_BAD_INPUT, RunConfig, UserError
from megatron_q3n.recipe import RECIPES, configure, register_defaults
from slurm import jobs, pipeline, progress, script
from slurm.checks import check_run
from slurm.pipeline import PREFIX, Stage
from slurm.site import Site, load_site
from slurm.snapshot import take_snapshot


def main() -> int:
    """Run the command line; 0 when submitted (with --local: done), 2 when refused."""
    given = parse(sys.argv[1:])
    register_defaults()
    try:
        site = load_site(given.site)
        if given.local:
            site = replace_python(site)
        elif not given.dry_run:
            jobs.require_slurm()
        folder, stages = _resumed(given, site) if given.resume else _new(given, site)
        waiting = [stage for stage in stages if not stage.is_done]
        if given.dry_run:
            return _show(waiting, site)
        if not waiting:
            print(f"{folder}: nothing is left to do")
            return 0
        _write(folder, given.config_name, stages, waiting, site, given)
        if given.local:
            return _run_here(folder, waiting)
        return _submit(folder, waiting)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--config-name", "-cn", metavar="RECIPE", help="a recipe or pipeline")
    start.add_argument("--resume", type=Path, metavar="DIR", help="a run or pipeline directory")
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="recipes of your own")
    parser.add_argument("--site", help="slurm/sites/SITE.yaml, or a path; else $Q3N_SITE")
    parser.add_argument("--run-dir", type=Path, help="the new directory (else runs/<recipe>-…)")
    parser.add_argument("--nodes", type=int, help="nodes of a recipe's job")
    parser.add_argument("--time", help="time limit of a recipe's job; the run may take many")
    parser.add_argument("--dry-run", action="store_true", help="only print the scripts")
    parser.add_argument("--local", action="store_true", help="run here, without Slurm")
    parser.add_argument("--update-code", action="store_true", help="with --resume: copy the code anew")
    parser.add_argument("overrides", nargs="*", metavar="setting=value")
    return parser.parse_intermixed_args(arguments)


def replace_python(site: Site) -> Site:
    """Return the site as this machine: the Python that runs this."""
    return site.model_copy(update={"python": sys.executable, "node_python": sys.executable})


def _new(given: argparse.Namespace, site: Site) -> tuple[Path, list[Stage]]:
    name = given.config_name.removesuffix(".yaml")
    folder = (given.run_dir or pipeline.new_folder("runs", name)).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--run-dir {folder} is not empty; to go on with it: --resume {folder}")
    if not name.startswith(PREFIX):
        stage = _recipe_stage(given, site, name, folder, given.overrides, nodes=given.nodes)
        return folder, [replace(stage, code=folder / "code", time=given.time)]
    return folder, _pipeline_stages(given, site, name, folder)


def _pipeline_stages(given: argparse.Namespace, site: Site, name: str, folder: Path) -> list[Stage]:
    home = Path(given.config_dir) if given.config_dir else RECIPES
    path = next((p for p in (home / f"{name}.yaml", RECIPES / f"{name}.yaml") if p.is_file()), None)
    if path is None:
        known = ", ".join(sorted(p.stem for p in RECIPES.glob(f"{PREFIX}*.yaml")))
        raise UserError(f"--config-name {name}: no such pipeline. There are: {known}.")
    recipe = pipeline.read_recipe(path)
    extra = pipeline.overrides_by_stage(given.overrides, list(recipe.stages))
    stages: list[Stage] = []
    for stage_name, wish in recipe.stages.items():
        run_dir, source = folder / stage_name, wish.begins_with and folder / wish.begins_with
        if wish.tool is not None:
            tool = [part.format_map({"from": source, "run_dir": run_dir}) for part in wish.tool]
            stage = Stage(stage_name, run_dir, folder / "code", tool=tool)
        else:
            overrides = [*wish.overrides, *extra[stage_name]]
            overrides += [f"checkpoint.load={source}"] if source else []
            before = next((s for s in stages if s.name == wish.begins_with), None)
            stage = _recipe_stage(given, site, wish.recipe or "", run_dir, overrides, nodes=wish.nodes, before=before)
        stages.append(
            replace(stage, name=stage_name, code=folder / "code", begins_with=wish.begins_with, time=wish.time)
        )
    return stages


def _recipe_stage(
    given: argparse.Namespace,
    site: Site,
    recipe: str,
    run_dir: Path,
    overrides: list[str],
    *,
    nodes: int | None,
    before: Stage | None = None,
) -> Stage:
    """Validate a recipe for this site."""
    arguments = ["--config-dir", given.config_dir] if given.config_dir else []
    arguments += ["--config-name", recipe, *overrides, f"run_dir={run_dir}"]
    if nodes:
        arguments.append(f"parallel.world_size={nodes * site.ranks_per_node}")
    config = configure(arguments)
    return _checked(Stage(recipe, run_dir, run_dir / "code", config), site, nodes, before)


def _checked(stage: Stage, site: Site, nodes: int | None, before: Stage | None) -> Stage:
    """Refuse a stage that cannot run; say how many nodes it takes."""
    assert stage.config is not None
    num_nodes = nodes or math.ceil(stage.config.world_size / site.ranks_per_node)
    made_by = before.config if before is not None else None
    check_run(stage.config, site, num_nodes, made_by, loads_later=before is not None)
    return replace(stage, num_nodes=num_nodes)


def _resumed(given: argparse.Namespace, site: Site) -> tuple[Path, list[Stage]]:
    """Take up the stages of a directory as they were written, with changed settings for those not done."""
    folder = given.resume.resolve()
    lineage = pipeline.read_lineage(folder)
    single = not (folder / pipeline.FILE).is_file()
    names = [entry["name"] for entry in lineage]
    extra = {names[0]: given.overrides} if single else pipeline.overrides_by_stage(given.overrides, names)
    stages: list[Stage] = []
    for entry in lineage:
        run_dir = Path(entry["run_dir"])
        stage = Stage(
            entry["name"],
            run_dir,
            folder / "code",
            tool=entry.get("tool") or [],
            begins_with=entry["from"],
            num_nodes=entry.get("nodes", 1),
            time=given.time or entry.get("time"),
        )
        if not stage.tool:
            settings = list(extra[stage.name])
            if given.nodes:
                settings.append(f"parallel.world_size={given.nodes * site.ranks_per_node}")
            config = configure(["--resume", str(run_dir), *settings])
            stage = replace(stage, config=config)
            if not stage.is_done:
                before = next((s for s in stages if s.name == entry["from"]), None)
                stage = _checked(stage, site, given.nodes, before)
        _refuse_if_queued(stage)
        stages.append(stage)
    return folder, stages


def _refuse_if_queued(stage: Stage) -> None:
    ids = [str(line["job"]) for line in progress.attempts(stage.run_dir) if line.get("job")]
    for job_id, (state, _) in jobs.states(ids[-1:]).items():
        if jobs.is_waiting_or_running(state):
            raise UserError(f"{stage.name} is job {job_id}, {state}: scancel {job_id} first, or let it be.")


def _show(stages: list[Stage], site: Site) -> int:
    for stage in stages:
        after = f", after {stage.begins_with} ended well" if stage.begins_with else ""
        print(f"# ---- {stage.name}: {stage.script_file}{after}")
        print(script.sbatch_script(stage, site))
        print(f"# {stage.job_file}\n{script.job_json(stage, site, local=False)}")
    print("dry run: nothing was written, nothing submitted")
    return 0


def _write(
    folder: Path, recipe: str | None, stages: list[Stage], waiting: list[Stage], site: Site, given: argparse.Namespace
) -> None:
    """Write code, lineage, and of each stage to come the configuration, job.json and script."""
    try:
        if given.update_code:
            shutil.rmtree(folder / "code")
        if not (folder / "code").is_dir():
            take_snapshot(folder / "code")
        if recipe is not None and recipe.startswith(PREFIX):
            pipeline.write_lineage(folder, recipe.removesuffix(".yaml"), stages)
        for stage in waiting:
            for name in ("logs", progress.SLURM_FOLDER):
                (stage.run_dir / name).mkdir(parents=True, exist_ok=True)
            if stage.config is not None:
                (stage.run_dir / "config.yaml").write_text(_config_text(stage.config))
            stage.job_file.write_text(script.job_json(stage, site, local=given.local))
            stage.script_file.write_text(script.sbatch_script(stage, site))
            if given.resume:
                progress.begin_anew(stage.run_dir)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}. Choose another with --run-dir.") from None


def _config_text(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json") | {"run_dir": None}, sort_keys=False)


def _submit(folder: Path, stages: list[Stage]) -> int:
    """Submit each stage to begin after the one it begins with; those that are done need not be waited for."""
    job_of: dict[str, str] = {}
    for stage in stages:
        job_of[stage.name] = jobs.submit(stage.script_file, job_of.get(stage.begins_with or ""))
        progress.add_attempt_line(stage.run_dir, event="submitted", job=job_of[stage.name])
        print(f"job {job_of[stage.name]}  {stage.name}  {stage.run_dir}/logs/slurm-{job_of[stage.name]}.out")
    print(f"\ndirectory {folder}\nstatus    python -m slurm.status {folder}")
    return 0


def _run_here(folder: Path, stages: list[Stage]) -> int:
    for place, stage in enumerate(stages):
        print(f"---- {stage.name}", flush=True)
        command = [sys.executable, "-m", "slurm.supervise", str(stage.job_file)]
        code = subprocess.run(command, cwd=stage.code, check=False).returncode
        if code:
            left = ", ".join(later.name for later in stages[place + 1 :])
            print(
                f"{stage.name} ended with code {code}"
                + (f"; not started: {left}" if left else "")
                + f"\ngo on with: python -m slurm.submit --local --resume {folder}"
            )
            return code
    print(f"\ndirectory {folder}\nstatus    python -m slurm.status {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
