"""Definitions of users, named by import path: found in their source without importing it.

A user's module may take long to import, and is none of this process's business: scoring functions run in processes of
their own. So a wrong name is found by reading the source.
"""

import ast
import importlib.machinery
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from megatron_q3n.config.errors import UserError, suggest

_WHERE = "in a package that is installed, on PYTHONPATH, or in the working folder"


def check_definition(setting: str, module: str, name: str) -> None:
    """Check that a module exists and that its source defines a name, as far as that can be read.

    Raises: UserError naming the setting, for a module that is not found, that does not parse, or that lacks the name.
    """
    spec = _find(module)
    if spec is None:
        raise UserError(f"{setting}: there is no module {module}. Give the name of a module {_WHERE}.")
    if not spec.has_location or spec.origin is None or not spec.origin.endswith(".py"):
        return
    try:
        tree = ast.parse(Path(spec.origin).read_bytes(), spec.origin)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{setting}: {spec.origin} is not Python: {error}. Correct the file.") from None
    names = set(_names(tree.body))
    # "*" and __getattr__ may define any name
    if name not in names and not names & {"*", "__getattr__"}:
        raise UserError(f"{setting}: {spec.origin} defines no {name}.{suggest(name, sorted(names))}")


def _find(module: str) -> importlib.machinery.ModuleSpec | None:
    """Return where a module is, without importing it or the packages that hold it."""
    first, *rest = module.split(".")
    # the working folder, as for `python -m`; then every finder of this process, installed packages among them
    finder = importlib.machinery.PathFinder
    spec = finder.find_spec(first, [str(Path.cwd())]) or importlib.util.find_spec(first)
    for index, part in enumerate(rest, 1):
        if spec is None or spec.submodule_search_locations is None:
            return None
        prefix = ".".join([first, *rest[: index - 1]])
        spec = finder.find_spec(f"{prefix}.{part}", spec.submodule_search_locations)
    return spec


def _names(body: list[ast.stmt]) -> Iterator[str]:
    """Yield the names that statements define at the level of the module, in branches too."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in statement.names)
        else:
            yield from (
                node.id
                for node in ast.walk(statement)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            )
            for inner in ("body", "orelse", "finalbody"):
                yield from _names(getattr(statement, inner, []))
            for handler in getattr(statement, "handlers", []):
                yield from _names(handler.body)
