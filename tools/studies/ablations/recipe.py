"""A study as its file says it, and the runs that come of it, all checked before the first one starts.

# recipes/ablation-gate.yaml
question: Does a gate behind attention keep it from sinking to the first token?
claim: First-token share 46.7 % → 4.8 %, no massive activations.
source: Gated Attention (arXiv 2505.06708), section 4.3
base: pretrain-mini                  # a recipe
common: [training.steps=500]         # settings of every run
variants:                            # the settings in which the runs differ; compared with each other
  none: [model.attention_gate=none]    # the most telling first: several studies run together in this order
  elementwise: []
seeds: 2
compare:                             # heading: "METRIC HOW" (measures.py)
  validation loss: loss/validation
evaluate: true                       # and evaluate each model after its training, by the settings evaluate.*
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from megatron_q3n.config import RunConfig, UserError, suggest
from megatron_q3n.config.section import Section
from megatron_q3n.metrics.report.charts import NUM_COLOURS
from megatron_q3n.recipe import RECIPES, configure
from tools.studies.ablations.measures import Measure, measure

PREFIX = "ablation-"
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
OURS = ("run_dir", "runs_dir", "recipe", "stage", "training.seed", "checkpoint.load")
QUIET = ("logging.progress=false", "logging.wandb.mode=disabled")


class AblationRecipe(Section):
    """A file recipes/ablation-*.yaml."""

    question: str = Field(min_length=1)
    claim: str = Field(min_length=1, description="what the paper says")
    source: str = Field(min_length=1, description="which paper, where in it")
    base: str = Field(description="the recipe that every run begins with")
    common: list[str] = Field(default_factory=list, description="settings of every run")
    variants: dict[str, list[str]] = Field(min_length=2, max_length=NUM_COLOURS)
    seeds: int = Field(2, gt=0)
    compare: dict[str, str] = Field(min_length=1)
    evaluate: bool = False

    @property
    def measures(self) -> dict[str, Measure]:
        """What is compared, under its heading."""
        return {heading: measure(text) for heading, text in self.compare.items()}


@dataclass(frozen=True)
class Trial:
    """A variant with a seed: one run."""

    variant: str
    seed: int
    run_dir: Path
    arguments: tuple[str, ...]
    config: RunConfig
    is_evaluated: bool

    @property
    def name(self) -> str:
        """What it is called, and its run directory too."""
        return self.run_dir.name

    @property
    def training(self) -> list[str]:
        """The command line of its training."""
        seed = f"training.seed={self.seed}"
        own = (seed, f"recipe={self.variant}", f"run_dir={self.run_dir}", *QUIET)
        return [*self.arguments, *own]

    @property
    def evaluation(self) -> list[str]:
        """The command line of its evaluation: the same settings in another stage."""
        return [*self.arguments, "stage=evaluate", f"checkpoint.load={self.run_dir}", *QUIET]


def every_study() -> list[str]:
    """Return the names of the studies in recipes/."""
    return sorted(path.stem for path in RECIPES.glob(f"{PREFIX}*.yaml"))


def find(name: str) -> Path:
    """Return the file of a study, by its name in recipes/ or by a path.

    Raises: UserError if there is none.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    inside = RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
    known = every_study()
    if inside.stem not in known:
        raise UserError(
            f"{name}: no such study.{suggest(inside.stem, known)} There are: {', '.join(known)}; or give the path of a "
            ".yaml file."
        )
    return inside


def read(path: Path) -> AblationRecipe:
    """Read and check a study's file, all but the settings of its runs.

    Raises: UserError naming what is wrong.
    """
    try:
        recipe = AblationRecipe.model_validate(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise UserError(f"{path}: {'; '.join(wrong)}") from None
    for problem in _problems(recipe):
        raise UserError(f"{path}: {problem}")
    return recipe


def _problems(recipe: AblationRecipe) -> Iterator[str]:
    for name, settings in {"common": recipe.common, **recipe.variants}.items():
        if not NAME.fullmatch(name):
            yield f"variant {name!r}: a name has a-z, 0-9, _, . and - only; it becomes a directory"
        for setting in settings:
            if setting.partition("=")[0].lstrip("+~") in OURS:
                yield f"{name}: {setting} is set by the study itself; leave it out"
    described = [tuple(settings) for settings in recipe.variants.values()]
    if len(set(described)) < len(described):
        yield "two variants have the same settings"
    for heading, text in recipe.compare.items():
        try:
            found = measure(text)
        except UserError as error:
            yield f"compare: {heading}: {error}"
        else:
            if not (found.is_recorded or recipe.evaluate):
                yield f"compare: {heading}: {text} needs evaluate: true"


def trials(recipe: AblationRecipe, output: Path, seeds: int, only: list[str], settings: list[str]) -> list[Trial]:
    """Return the runs of a study, checked, the variants of the first seed first.

    Raises: UserError for a variant that does not exist, or settings of one that cannot run.
    """
    for name in only:
        if name not in recipe.variants:
            raise UserError(
                f"--only {name}: no such variant.{suggest(name, recipe.variants)} There are: "
                f"{', '.join(recipe.variants)}."
            )
    for setting in settings:
        if setting.partition("=")[0].lstrip("+~") in OURS:
            raise UserError(f"{setting} is set by the study itself; leave it out.")
    chosen = {v: s for v, s in recipe.variants.items() if v in only or not only}
    checked = {
        variant: _checked(variant, ("--config-name", recipe.base, *recipe.common, *own, *settings))
        for variant, own in chosen.items()
    }
    return [
        Trial(variant, seed, output / f"{variant}-seed{seed}", arguments, config, recipe.evaluate)
        for seed in range(1, seeds + 1)
        for variant, (arguments, config) in checked.items()
    ]


def _checked(variant: str, arguments: tuple[str, ...]) -> tuple[tuple[str, ...], RunConfig]:
    try:
        config = configure([*arguments, *QUIET])
        configure([*arguments, "stage=evaluate", "checkpoint.load=RUN_DIR"])
    except UserError as error:
        raise UserError(f"variant {variant}: {error}") from None
    return arguments, config
