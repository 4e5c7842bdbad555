"""YAML files read as plain data: config.yaml of a run, and recipes before Hydra reads them.

Plain means: no interpolation of `${…}`, and no expansion of aliases beyond a bound, which a few lines of YAML could
otherwise exceed by any factor.
"""

from pathlib import Path
from typing import Any

import yaml

from megatron_q3n.config.errors import UserError

# values of a file with its aliases expanded; the largest of our own recipes has about 150
MAX_VALUES = 100_000
# one expression, shown after the problem
_ALLOWED = "It must be YAML text whose top level is a mapping (setting: value)."


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises: UserError if it cannot be read, is no YAML, is no mapping with names as keys, or expands beyond MAX_VALUES.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _num_values(node, {}) > MAX_VALUES:
            raise UserError(f"{path}: its aliases expand to more than {MAX_VALUES:,} values. Write them out.")
        tree = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}. {_ALLOWED}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        problem = " ".join(str(error).split()) or "nested too deeply"
        raise UserError(f"{path} is not YAML: {problem}. {_ALLOWED}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: found {_kind(tree)}. {_ALLOWED}")
    if not all(isinstance(name, str) for name in tree):
        found = next(name for name in tree if not isinstance(name, str))
        raise UserError(f"{path}: {found!r} is no name of a setting. {_ALLOWED}")
    return tree


def _num_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of values of a node with its aliases expanded; a node that contains itself has too many."""
    if id(node) not in known:
        # while its children are counted
        known[id(node)] = MAX_VALUES + 1
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_num_values(child, known) for child in children)
    return known[id(node)]


def _kind(tree: object) -> str:
    """Return what a file contains instead of a mapping."""
    if tree is None:
        return "nothing"
    return "a list" if isinstance(tree, list) else f"the single value {str(tree)[:40]!r}"
