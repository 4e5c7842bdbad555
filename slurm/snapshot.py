"""Code snapshot in the run directory, from which the job runs: later edits do not affect a queued job.

Tracked files are copied; of the untracked ones only Python modules, which tracked code may import. What git ignores and
what looks like credentials (credential_rules.py) is never copied.
"""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from slurm.credential_rules import is_secret_file

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("megatron_q3n", "slurm", "recipes", "tools")


def take_snapshot(target: Path) -> list[str]:
    """Copy the checkout's code to `target`, and write the commit and the changed files to `target`/COMMIT.

    Returns: the untracked files that were left out.
    """
    target.mkdir(parents=True)
    names, left_out = _files()
    for name in names:
        _copy(ROOT / name, target / name)
    commit = _git("rev-parse", "HEAD").strip() or "not a git checkout"
    (target / "COMMIT").write_text(f"{commit}\n{_git('status', '--short', '--', *FOLDERS)}")
    return left_out


def add_files(target: Path, files: Mapping[str, Path]) -> None:
    """Copy files of the user (name in the snapshot -> file) that the snapshot does not have yet."""
    for name, file in files.items():
        if not (target / name).exists():
            _copy(file, target / name)


def _files() -> tuple[list[str], list[str]]:
    """Return the files to copy and the untracked ones to leave out; without git all but caches count as untracked."""
    tracked = _listed("--cached")
    if tracked:
        untracked = _listed("--others", "--exclude-standard")
        taken = [name for name in untracked if name.endswith(".py") and _is_safe(name)]
    else:
        paths = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
        untracked = [str(path.relative_to(ROOT)) for path in paths if "__pycache__" not in path.parts]
        taken = [name for name in untracked if _is_safe(name)]
    existing = [name for name in [*tracked, *taken] if (ROOT / name).is_file()]
    return existing, sorted(name for name in set(untracked) - set(taken) if not (ROOT / name).is_dir())


def _is_safe(name: str) -> bool:
    return not is_secret_file(name) and not (ROOT / name).is_symlink()


def _listed(*options: str) -> list[str]:
    return [name for name in _git("ls-files", "-z", *options, "--", *FOLDERS).split("\0") if name]


def _copy(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(file, target)


def _git(*arguments: str) -> str:
    """Return the output of git, empty without git or outside a checkout."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "-c", "safe.directory=*", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
