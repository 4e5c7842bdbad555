"""Python files of the user that a recipe names (a reward function, callbacks), for the code snapshot.

A module is looked for where `python -m megatron_q3n.train` would find it: in the working folder, then on PYTHONPATH.
The modules that it imports from the same places are part of it; installed packages are not.
"""

import ast
import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from megatron_q3n.config import RunConfig, UserError
from slurm.credential_rules import is_secret_file
from slurm.site import Site
from slurm.snapshot import FOLDERS, ROOT


def user_files(config: RunConfig, site: Site) -> dict[str, Path]:
    """Return {name in the snapshot: file} of the user's modules that the configuration names.

    Raises: UserError for a module that is in none of the places where the job could import it.
    """
    files: dict[str, Path] = {}
    for setting, module in _named_modules(config):
        top = module.split(".")[0]
        if top in FOLDERS:
            if not any((ROOT / f"{module.replace('.', '/')}{end}").is_file() for end in (".py", "/__init__.py")):
                raise UserError(
                    f"{setting}: {module} would be in this project's {top}/, which has no such module. Rename the "
                    f"package, because a job imports the project's {top}/."
                )
        elif not _holds(files, module):
            is_of_user = _add(top, files)
            if not _holds(files, module) and (is_of_user or not _is_installed(top, site)):
                raise UserError(
                    f"{setting}: there is no module {module} in {', '.join(map(str, _folders()))}, and no such package "
                    "is installed. Submit from the folder that holds it, or add that folder to PYTHONPATH."
                )
    return files


def _holds(files: dict[str, Path], module: str) -> bool:
    return any(f"{module.replace('.', '/')}{end}" in files for end in (".py", "/__init__.py"))


def _named_modules(config: RunConfig) -> Iterator[tuple[str, str]]:
    if config.stage == "rl" and config.rl.reward.function is not None:
        yield "rl.reward.function", config.rl.reward.function.partition(":")[0]
    for callback in config.callbacks:
        yield "callbacks", callback.path.rpartition(".")[0]


def _folders() -> list[Path]:
    """Return the folders of users' modules: the working folder, and those on PYTHONPATH but of installed packages."""
    named = [name for name in os.environ.get("PYTHONPATH", "").split(os.pathsep) if name]
    folders = dict.fromkeys(Path(name).resolve() for name in [".", *named])
    return [folder for folder in folders if folder.name not in ("site-packages", "dist-packages")]


def _add(top: str, files: dict[str, Path]) -> bool:
    """Add a top-level module or package, and what it imports from the same folders; return whether it is there."""
    spec = PathFinder.find_spec(top, [str(folder) for folder in _folders()])
    if spec is None:
        return False
    if spec.submodule_search_locations:
        roots = [Path(location) for location in spec.submodule_search_locations]
        paths = {f"{top}/{path.relative_to(root)}": path for root in roots for path in sorted(root.rglob("*.py"))}
    else:
        assert spec.origin is not None
        paths = {Path(spec.origin).name: Path(spec.origin)}
    new = {name: path for name, path in paths.items() if name not in files and not is_secret_file(name)}
    files |= new
    for path in new.values():
        for imported in sorted(_imports(path) - set(FOLDERS) - sys.stdlib_module_names):
            _add(imported, files)
    return True


def _imports(path: Path) -> set[str]:
    """Return the top-level names that a Python file imports."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not Python: {error}.") from None
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def _is_installed(top: str, site: Site) -> bool:
    """Return whether the module is a package of this Python, or may be one of the site's own."""
    other_places = "PYTHONPATH" in site.environment or site.python != sys.executable
    return other_places or importlib.util.find_spec(top) is not None
