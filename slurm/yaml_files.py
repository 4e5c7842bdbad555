"""YAML files that people write for this folder, sites and pipelines: one mapping, in which no name is given twice."""

from pathlib import Path
from typing import Any

import yaml

from megatron_q3n.config import UserError

MAX_BYTES = 2**20


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that rejects a repeated key, of which YAML's own loader silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node."""
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names and key.value != "<<":
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            names.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; an empty file holds an empty one.

    Raises: UserError if the file cannot be read, is not YAML, or holds something else.
    """
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: a file of at most {MAX_BYTES // 2**20} MiB is needed.")
        tree = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}; it must hold settings, one `name: value` a line.")
    return tree
