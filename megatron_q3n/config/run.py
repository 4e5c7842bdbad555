"""RunConfig: the checked configuration of a run, its defaults, and the messages for wrong settings."""

import re
from typing import Any

from pydantic import ValidationError, model_validator

from megatron_q3n.config.credentials import refuse_credentials
from megatron_q3n.config.errors import UserError, suggest
from megatron_q3n.config.run_sections import RunSections
from megatron_q3n.config.section import Section
from megatron_q3n.config.stage_rules import check_evaluate, check_mtp, check_rl, check_sft, check_start
from megatron_q3n.config.training_rules import check_training


class RunConfig(RunSections):
    """The sections of a run's configuration, checked against each other."""

    @model_validator(mode="after")
    def _legal(self) -> "RunConfig":
        self.parallel.check_against(self.model, self.training.sequence_length, self.world_size)
        check_start(self)
        if self.stage == "evaluate":
            check_evaluate(self)
        if self.stage in ("generate", "serve", "evaluate"):
            # the remaining rules are about training
            return self
        check_training(self)
        check_mtp(self)
        if self.stage == "sft" or (self.stage == "mtp" and self.sft.train):
            check_sft(self)
        if self.stage == "rl":
            check_rl(self)
        return self


def default_tree() -> dict[str, Any]:
    """Return all defaults as a plain tree, unchecked: a recipe may be valid for a number of processes for which the
    defaults are not."""
    return RunConfig.model_construct().model_dump(mode="json")


def known_settings(section: type[Section] = RunConfig, prefix: str = "") -> list[str]:
    """Return every dotted setting name, e.g. "training.steps"."""
    names = []
    for name, field in section.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            names += known_settings(field.annotation, f"{prefix}{name}.")
    return names


def validate(tree: dict[str, Any]) -> RunConfig:
    """Turn a composed plain tree into a frozen RunConfig.

    Raises: UserError with one line per problem: where, what was found, what is allowed.
    """
    refuse_credentials(tree)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(problem) for problem in error.errors())) from None


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    original = problem.get("ctx", {}).get("error")
    if isinstance(original, UserError):
        return str(original)
    if problem["type"] == "extra_forbidden":
        return f"{where}: no such setting.{suggest(where, known_settings())}"
    reason = re.sub(r"^Value error, ", "", problem["msg"])
    return f"{where}={problem['input']!r}: {reason[0].lower()}{reason[1:]}."
