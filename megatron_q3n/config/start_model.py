"""Model of a run: which settings recipe and command line set themselves, and where the others come from.

With `checkpoint.load` they are the checkpoint's, so that a run continues the model that was trained, whatever part its
recipe begins with. Without it, the vocabulary is large enough for the tokenizer.
"""

from collections.abc import Collection, Mapping
from typing import Any

from megatron_q3n.config.model import ModelConfig
from megatron_q3n.config.run import RunConfig, validate

# a multiple of it is divisible by every usual tensor parallel size, and suits matrix products
VOCABULARY_MULTIPLE = 128
# how a model is run here, not what it is
_OF_THIS_RUN = ("backend",)


def own_settings(model: Mapping[str, Any], part: Mapping[str, Any], named: Collection[str]) -> list[str]:
    """Return the names of the model settings that a run sets itself.

    `model` is the composed section, `part` the recipe part it began with, `named` the settings on the command line.
    """
    below = {**_defaults(), **part}
    return sorted({name for name, value in model.items() if value != below.get(name)} | set(named))


def with_saved_model(config: RunConfig, saved: Mapping[str, Any]) -> RunConfig:
    """Return the configuration with a checkpoint's model, except for the settings that the run sets itself.

    Without a record of these (`own_model_settings`: null) they are the settings that differ from the defaults.
    Raises: UserError if model and configuration are not compatible.
    """
    current, defaults = config.model.model_dump(mode="json"), _defaults()
    own = config.own_model_settings
    names = [name for name in current if current[name] != defaults[name]] if own is None else own
    overrides = {name: current[name] for name in (*names, *_OF_THIS_RUN)}
    if "megatron" in overrides:
        overrides["megatron"] = {**saved.get("megatron", {}), **current["megatron"]}
    return validate(config.model_dump(mode="json") | {"model": {**defaults, **saved, **overrides}})


def vocabulary_for(model: Mapping[str, Any], own: Collection[str] | None, tokenizer_size: int) -> int:
    """Return `model.vocab_size`, raised to hold a tokenizer unless a part, a recipe or the command line set it."""
    size = int(model["vocab_size"])
    is_set = own is None or "vocab_size" in own or size != _defaults()["vocab_size"]
    return size if is_set or size >= tokenizer_size else -(-tokenizer_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _defaults() -> dict[str, Any]:
    return ModelConfig().model_dump(mode="json")
