"""Recipes: composition by Hydra, validation into a RunConfig, and the configuration of a run to resume.

The only module that imports Hydra and OmegaConf; nothing here imports torch, so a wrong setting is refused at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_q3n.config import RunConfig, UserError, default_tree, known_settings, suggest, validate
from megatron_q3n.config.held_out import overrides_without_recipes_held_out
from megatron_q3n.config.override_text import hydra_quoted
from megatron_q3n.config.plain_yaml import read_mapping

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
# prefix of the files in recipes/ that chain recipes (slurm/submit.py)
PIPELINE = "pipeline-"
# prefix of those that compare runs of a recipe (tools/studies/ablation.py)
ABLATION = "ablation-"

HYDRA_FLAGS = (
    "--cfg",
    "-c",
    "--multirun",
    "-m",
    "--info",
    "-i",
    "--hydra-help",
    "--shell-completion",
    "-sc",
    "--resolve",
)


def has_hydra_flag(arguments: Sequence[str]) -> bool:
    """Return whether the command line uses one of Hydra's own flags, such as --cfg or --multirun."""
    return any(argument.split("=")[0] in HYDRA_FLAGS for argument in arguments)


def run_by_hydra(run: Callable[[RunConfig], int]) -> None:
    """Call `run` through Hydra's own command line, once per job of a sweep.

    Raises: SystemExit for a job's exit code other than 0, which Hydra does not pass on.
    """

    def run_composed(tree: DictConfig) -> None:
        code = run(validate(plain_tree(tree)))
        if code:
            raise SystemExit(code)

    sys.argv += overrides_without_recipes_held_out(sys.argv[1:])
    hydra.main(version_base="1.3", config_path=str(RECIPES))(run_composed)()


def register_defaults() -> None:
    """Register the tree of all defaults with Hydra, under the name that recipes begin with."""
    ConfigStore.instance().store("base", default_tree())


def configure(arguments: list[str]) -> RunConfig:
    """Return the checked configuration that command-line arguments describe.

    Raises: UserError for a wrong recipe, setting or value.
    """
    return validate(configured_tree(arguments))


def configured_tree(arguments: list[str]) -> dict[str, Any]:
    """Return the composed configuration that command-line arguments describe, unchecked.

    Raises: UserError for a wrong recipe or setting.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megatron_q3n.train",
        description="Train a Qwen3-Next-like model from a recipe.",
        epilog="recipes: " + ", ".join(_recipes()),
        allow_abbrev=False,
    )
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--config-name", "-cn", metavar="RECIPE", help="a file of recipes/, without .yaml")
    start.add_argument("--resume", metavar="RUN_DIR", help="continue the run in this directory")
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="a folder of recipes of your own")
    parser.add_argument("overrides", nargs="*", metavar="setting=value", help="e.g. training.steps=2000")
    options = parser.parse_args(arguments)
    if options.resume:
        return _resumed(Path(options.resume), options.overrides)
    return _composed(options.config_name, options.config_dir, options.overrides)


def _composed(recipe: str, config_dir: str | None, overrides: list[str]) -> dict[str, Any]:
    recipe = recipe.removesuffix(".yaml")
    if recipe.startswith(PIPELINE):
        raise UserError(
            f"--config-name {recipe}: a pipeline chains recipes; run it with python -m slurm.submit "
            f"--config-name {recipe} (--local: on this machine)."
        )
    if recipe.startswith(ABLATION):
        raise UserError(
            f"--config-name {recipe}: an ablation compares runs of a recipe; run it with "
            f"tools/studies/ablation.py {recipe}."
        )
    folders = [RECIPES] + ([Path(config_dir).resolve()] if config_dir else [])
    if not any((folder / f"{recipe}.yaml").is_file() for folder in folders):
        raise UserError(
            f"--config-name {recipe}: no such recipe.{suggest(recipe, _recipes())} There are: {', '.join(_recipes())}."
        )
    home = next(folder for folder in reversed(folders) if (folder / f"{recipe}.yaml").is_file())
    search = [f"hydra.searchpath=[{hydra_quoted(f'file://{folder}')}]" for folder in folders if folder != home]
    # the pass-through takes any field of TransformerConfig, so Hydra must not require a "+" for a new key
    prepared = [f"++{o}" if o.startswith("model.megatron.") else o for o in overrides]
    prepared += overrides_without_recipes_held_out(overrides)
    try:
        with initialize_config_dir(str(home), version_base="1.3"):
            return plain_tree(compose(recipe, [*prepared, *search]))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, overrides)) from None


def _resumed(run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"--resume {run_dir}: not a run directory (it has no config.yaml). Try --resume runs/latest.")
    try:
        tree = OmegaConf.create(read_mapping(path))
        OmegaConf.set_struct(tree, True)
        if isinstance(OmegaConf.select(tree, "model.megatron"), DictConfig):
            OmegaConf.set_struct(tree.model.megatron, False)
        for override in overrides:
            name, _, value = override.partition("=")
            OmegaConf.update(tree, name.lstrip("+"), OmegaConf.from_dotlist([f"x={value}"]).x, merge=False)
        plain = plain_tree(tree)
    except (OmegaConfBaseException, AttributeError, RecursionError) as error:
        raise UserError(_explain(error, overrides)) from None
    return plain | {"run_dir": str(run_dir.resolve())}


def plain_tree(tree: DictConfig) -> dict[str, Any]:
    """Return a composed configuration as plain dictionaries and lists, with interpolations resolved."""
    plain = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _explain(error: Exception, overrides: list[str]) -> str:
    """Return Hydra's message as one line, with the setting that was probably meant."""
    known = known_settings()
    for override in overrides:
        name = override.partition("=")[0].lstrip("+~")
        is_group = (RECIPES / name).is_dir()
        if (
            "=" in override
            and name not in known
            and not is_group
            and not name.startswith(("hydra.", "model.megatron."))
        ):
            return f"{name}: no such setting.{suggest(name, known)} config.yaml of any run lists them all."
        if is_group and isinstance(error, MissingConfigException):
            options = sorted(path.stem for path in (RECIPES / name).glob("*.yaml"))
            chosen = override.partition("=")[2]
            return (
                f"{override}: there is no recipes/{name}/{chosen}.yaml.{suggest(chosen, options)} "
                f"There are: {', '.join(options)}."
            )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) or type(error).__name__


def _recipes() -> list[str]:
    stems = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    return [stem for stem in stems if not stem.startswith((PIPELINE, ABLATION))]
