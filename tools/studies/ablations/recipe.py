"""Recipe of a study, and its runs, all checked before the first one starts.

# recipes/ablation-gate.yaml
question: Does a gate behind attention keep it from sinking to the first token?
claim: First-token share 46.7 % → 4.8 %, no massive activations.
source: Gated Attention (arXiv 2505.06708), section 4.3
base: pretrain-mini                  # a recipe
common: [training.steps=500]         # settings of every run
variants:                            # the settings in which the runs differ
  none: [model.attention_gate=none]    # the most informative first: several studies run together in this order
  elementwise: []
seeds: 2
compare:                             # heading: "METRIC REDUCTION" (measures.py)
  validation loss: loss/validation
evaluate: true                       # evaluate each model after its training, with the settings evaluate.*
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from megatron_q3n.config import RunConfig, UserError, suggest
from megatron_q3n.config.override_text import override
from megatron_q3n.config.section import Section
from megatron_q3n.metrics.report.charts import NUM_COLORS
from megatron_q3n.recipe import RECIPES, configure
from tools.studies.ablations.measures import Measure, measure

PREFIX = "ablation-"
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
RESERVED = ("run_dir", "runs_dir", "recipe", "stage", "training.seed", "checkpoint.load")
QUIET = ("logging.progress=false", "logging.wandb.mode=disabled")


class AblationRecipe(Section):
    """A file recipes/ablation-*.yaml."""

    question: str = Field(min_length=1)
    claim: str = Field(min_length=1, description="the paper's claim")
    source: str = Field(min_length=1, description="paper and section")
    base: str = Field(description="the recipe of every run")
    common: list[str] = Field(default_factory=list, description="settings of every run")
    variants: dict[str, list[str]] = Field(min_length=2, max_length=NUM_COLORS)
    seeds: int = Field(2, gt=0)
    compare: dict[str, str] = Field(min_length=1)
    evaluate: bool = False

    @property
    def measures(self) -> dict[str, Measure]:
        """Return {heading: measure}."""
        return {heading: measure(text) for heading, text in self.compare.items()}


@dataclass(frozen=True)
class Trial:
    """One run: a variant with a seed."""

    variant: str
    seed: int
    run_dir: Path
    arguments: tuple[str, ...]
    config: RunConfig
    is_evaluated: bool

    @property
    def name(self) -> str:
        """Return the name, which is also that of the run directory."""
        return self.run_dir.name

    @property
    def training(self) -> list[str]:
        """Return the command line of the training."""
        seed = f"training.seed={self.seed}"
        own = (seed, f"recipe={self.variant}", override("run_dir", self.run_dir), *QUIET)
        return [*self.arguments, *own]

    @property
    def evaluation(self) -> list[str]:
        """Return the command line of the evaluation: the same settings in another stage."""
        return [*self.arguments, "stage=evaluate", override("checkpoint.load", self.run_dir), *QUIET]


def list_studies() -> list[str]:
    """Return the names of the studies in recipes/."""
    return sorted(path.stem for path in RECIPES.glob(f"{PREFIX}*.yaml"))


def find(name: str) -> Path:
    """Return the file of a study, by its name in recipes/ or by a path.

    Raises: UserError if there is no such study.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    inside = RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
    known = list_studies()
    if inside.stem not in known:
        raise UserError(
            f"{name}: no such study.{suggest(inside.stem, known)} There are: {', '.join(known)}; or give the path of a "
            ".yaml file."
        )
    return inside


def read(path: Path) -> AblationRecipe:
    """Read and check a study's file, except the settings of its runs.

    Raises: UserError with the wrong field.
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
            if setting.partition("=")[0].lstrip("+~") in RESERVED:
                yield f"{name}: {setting} is set by the study itself; omit it"
    settings_of_variants = [tuple(settings) for settings in recipe.variants.values()]
    if len(set(settings_of_variants)) < len(settings_of_variants):
        yield "two variants have the same settings"
    for heading, text in recipe.compare.items():
        try:
            parsed = measure(text)
        except UserError as error:
            yield f"compare: {heading}: {error}"
        else:
            if not (parsed.is_recorded or recipe.evaluate):
                yield f"compare: {heading}: {text} needs evaluate: true"


def trials(recipe: AblationRecipe, output: Path, seeds: int, only: list[str], settings: list[str]) -> list[Trial]:
    """Return the checked runs of a study, all variants of the first seed first.

    Raises: UserError for an unknown variant, or settings that are not legal.
    """
    for name in only:
        if name not in recipe.variants:
            raise UserError(
                f"--only {name}: no such variant.{suggest(name, recipe.variants)} There are: "
                f"{', '.join(recipe.variants)}."
            )
    for setting in settings:
        if setting.partition("=")[0].lstrip("+~") in RESERVED:
            raise UserError(f"{setting} is set by the study itself; omit it.")
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
