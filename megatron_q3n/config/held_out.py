"""Held-out sets of recipes: dropped where the command line sets another training source.

A recipe's held-out set is made for the recipe's own training data. Kept with other data it would measure another task.
"""

import re
from collections.abc import Sequence

# training source -> held-out set
_HELD_OUT = {"sft.train": "sft.validation", "rl.prompts": "rl.held_out"}


def overrides_without_recipes_held_out(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that empty the recipe's held-out sets, if others set the training source but no such set."""
    named = dict(_named(override) for override in overrides)
    return [
        f"{held_out}=[]"
        for source, held_out in _HELD_OUT.items()
        if _is_set(source, named) and not _is_set(held_out, named)
    ]


def _named(override: str) -> tuple[str, str]:
    name, _, value = override.lstrip("+~").partition("=")
    return name, value


def _is_set(setting: str, named: dict[str, str]) -> bool:
    """Return whether an override sets a setting, by its name or as a key of its section's mapping."""
    section, _, key = setting.partition(".")
    in_mapping = re.search(rf"[{{,\s]{key}\s*:", named.get(section, "")) is not None
    return in_mapping or any(name == setting or name.startswith(f"{setting}.") for name in named)
