"""Recipes: composition by Hydra, validation into a RunConfig, and the configuration of a run to resume.

The only module that imports Hydra and OmegaConf; nothing here imports torch, so a wrong setting is refused at once.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from megatron_q3n.config import RunConfig, UserError, default_tree, known_settings, suggest, validate
from megatron_q3n.config.held_out import overrides_without_recipes_held_out
from megatron_q3n.config.override_text import hydra_quoted
from megatron_q3n.config.paths import absolute
from megatron_q3n.config.plain_yaml import read_mapping
from megatron_q3n.config.start_model import own_settings, vocabulary_for

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
# prefix of the files in recipes/ that chain recipes (slurm/submit.py)
PIPELINE = "pipeline-"
# prefix of those that compare runs of a recipe (tools/studies/ablation.py)
ABLATION = "ablation-"

# name under which the configuration of a run to resume is registered with Hydra
RESUMED = "resumed"

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
        return _resumed(Path(absolute(options.resume)), options.overrides)
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
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"--config-dir {config_dir}: no such folder. Give the folder that holds your recipes.")
    folders = [RECIPES] + ([Path(config_dir).resolve()] if config_dir else [])
    if not any((folder / f"{recipe}.yaml").is_file() for folder in folders):
        raise UserError(
            f"--config-name {recipe}: no such recipe.{suggest(recipe, _recipes())} There are: {', '.join(_recipes())}."
        )
    home = next(folder for folder in reversed(folders) if (folder / f"{recipe}.yaml").is_file())
    if "defaults" not in read_mapping(home / f"{recipe}.yaml"):
        raise UserError(
            f"--config-name {recipe}: {home / recipe}.yaml is a part of recipes, not a recipe: it has no `defaults:`. "
            f"Choose it in a recipe, e.g. --config-name pretrain-tiny {recipe.replace('/', '=')}."
        )
    search = [f"hydra.searchpath=[{hydra_quoted(f'file://{folder}')}]" for folder in folders if folder != home]
    groups = {path.name for folder in folders for path in folder.iterdir() if path.is_dir()}
    _check_overrides(overrides, groups, is_start=True)
    tree, parts = _compose(recipe, home, [*overrides, *overrides_without_recipes_held_out(overrides)], search)
    part = next((folder for folder in folders[::-1] if (folder / f"model/{parts.get('model')}.yaml").is_file()), None)
    settings = read_mapping(part / f"model/{parts['model']}.yaml") if part is not None else {}
    named = _named_model_settings(overrides)
    if any(override.startswith("model=") for override in overrides):
        named |= set(settings)
    tree["own_model_settings"] = own = own_settings(tree["model"], settings, named)
    if isinstance(tree["model"].get("vocab_size"), int):
        tree["model"]["vocab_size"] = vocabulary_for(tree["model"], own, _tokenizer_size(tree))
    return tree


def _named_model_settings(overrides: list[str]) -> set[str]:
    """Return the names of the model settings that overrides set, e.g. "hidden_size", or "megatron"."""
    names = (override.partition("=")[0].lstrip("+") for override in overrides)
    return {name.split(".")[1] for name in names if name.startswith("model.")}


def _tokenizer_size(tree: dict[str, Any]) -> int:
    """Return the size of the tokenizers that this run will train, 0 if it trains none."""
    sizes = [tree["sft"].get("tokenizer_vocab_size")]
    sizes += [tree["data"].get("stdlib_vocab_size")] if tree["data"].get("source") == "stdlib" else []
    return max((size for size in sizes if isinstance(size, int)), default=0)


def _compose(
    name: str, home: Path, overrides: list[str], search: list[str]
) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Compose a recipe in the folder `home`, or registered by name, with overrides.

    Returns: the tree, and the chosen part of each group.
    """
    # the pass-through takes any field of TransformerConfig, so Hydra must not require a "+" for a new key
    additions = ("model.megatron.", "model.megatron=")
    prepared = [f"++{o}" if o.startswith(additions) else o for o in map(_quote_home, overrides)]
    try:
        with initialize_config_dir(str(home), version_base="1.3"):
            tree = compose(name, [*prepared, *search], return_hydra_config=True)
        parts = {str(group): str(part) for group, part in tree.hydra.runtime.choices.items()}
        return plain_tree(OmegaConf.masked_copy(tree, [str(key) for key in tree if key != "hydra"])), parts
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, overrides)) from None


def _resumed(run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """Return the configuration of a run directory, changed by overrides with the meaning that they have at a start."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"--resume {run_dir}: not a run directory (it has no config.yaml). Try --resume runs/latest.")
    tree = merged(default_tree(), read_mapping(path))
    _check_overrides(overrides, {path.name for path in RECIPES.iterdir() if path.is_dir()}, is_start=False)
    ConfigStore.instance().store(RESUMED, literal(tree))
    changed, _ = _compose(RESUMED, RECIPES, overrides, [])
    own = changed["own_model_settings"]
    # null, and a damaged value that validation refuses, stay as they are
    if isinstance(own, list):
        named = sorted(name for name in _named_model_settings(overrides) if name not in own)
        changed["own_model_settings"] = own + named
    return changed | {"run_dir": str(run_dir.resolve())}


def _quote_home(override: str) -> str:
    """Quote a value that begins with ~, which Hydra's grammar does not know."""
    name, equals, value = override.partition("=")
    return f"{name}='{value}'" if equals and value.startswith("~") and "'" not in value else override


def _check_overrides(overrides: list[str], groups: set[str], *, is_start: bool) -> None:
    """Refuse what Hydra's grammar allows and what has no meaning here. `groups`: folders of parts.

    Raises: UserError naming the override.
    """
    try:
        parsed = OverridesParser.create().parse_overrides([_quote_home(override) for override in overrides])
    except HydraException as error:
        raise UserError(_explain(error, overrides)) from None
    for text, override in zip(overrides, parsed, strict=True):
        name = override.key_or_group
        if not name:
            raise UserError(f"{text}: the name of a setting is missing; write setting=value.")
        if name.startswith("hydra"):
            raise UserError(f"{text} has no effect: run directories are set with run_dir=… and runs_dir=….")
        if override.is_delete():
            raise UserError(f"{text}: a setting cannot be removed. Set it to the value you want, e.g. {name}=…")
        if override.is_sweep_override():
            raise UserError(f"{text}: several values; run one at a time, or all of them with --multirun.")
        if not is_start and name in ("run_dir", "runs_dir"):
            raise UserError(
                f"{text} has no effect with --resume, which continues the run where it is. Leave it out, or start a "
                "new run from its weights: --config-name RECIPE checkpoint.load=RUN_DIR."
            )
        if name in groups:
            _check_part(text, override, is_start=is_start)
        elif _is_section(name) and not isinstance(override.value(), dict):
            raise UserError(f"{text}: {name} is a section; set its settings, e.g. {_first_setting(name)}=…")


def _check_part(text: str, override: Override, *, is_start: bool) -> None:
    """Refuse a value that names no part, and a choice of parts where nothing is composed from parts."""
    group, value = override.key_or_group, override.value()
    if override.is_add() or override.is_force_add():
        raise UserError(f"{text}: every recipe chooses one part of {group} already; leave out the +.")
    if not isinstance(value, str):
        options = ", ".join(sorted(path.stem for path in (RECIPES / group).glob("*.yaml")))
        raise UserError(
            f"{text}: {group} is chosen by the name of a part, one of {options}. Set single settings with "
            f"{group}.setting=value."
        )
    if not is_start:
        raise UserError(
            f"{text}: parts are chosen when a run starts; with --resume set single settings: {group}.setting=value."
        )


def _is_section(name: str) -> bool:
    return any(known.startswith(f"{name}.") for known in known_settings())


def _first_setting(section: str) -> str:
    return next(known for known in known_settings() if known.startswith(f"{section}."))


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return `below` with the values of `above`; sections are merged, other values replaced."""
    both = {
        name: merged(below[name], value) if isinstance(value, dict) and isinstance(below.get(name), dict) else value
        for name, value in above.items()
    }
    return below | both


def literal(value: Any) -> Any:
    """Return a plain tree in which every string stands for itself when OmegaConf resolves it: `${` is escaped."""
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    # backslashes before ${ are escaped too
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


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
        is_group = any(path.name == name for path in RECIPES.iterdir() if path.is_dir())
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
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, InterpolationResolutionError):
        return f"{message}. ${{…}} takes another setting's value; for these characters themselves write \\${{…}}."
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: {message.partition(' See https')[0]}. Write setting=value; text with one of "
            """( ) [ ] { } , : = ' " goes into quotes: 'setting="text"'."""
        )
    return message


def _recipes() -> list[str]:
    stems = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    return [stem for stem in stems if not stem.startswith((PIPELINE, ABLATION))]
