"""Code snapshot in the run directory, from which the job runs: later edits do not affect a queued job."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("megatron_q3n", "slurm", "recipes", "tools")


def take_snapshot(target: Path) -> None:
    """Copy the checkout's code to `target`, and write the commit and the changed files to `target`/COMMIT."""
    target.mkdir(parents=True)
    for name in _files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    commit = _git("rev-parse", "HEAD").strip() or "not a git checkout"
    (target / "COMMIT").write_text(f"{commit}\n{_git('status', '--short', '--', *FOLDERS)}")


def _files() -> list[str]:
    """Return the code files: those in git (tracked or not ignored), or without git all except caches."""
    output = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *FOLDERS)
    names = [name for name in output.split("\0") if name]
    if not names:
        paths = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
        names = [str(path.relative_to(ROOT)) for path in paths if "__pycache__" not in path.parts]
    return [name for name in names if (ROOT / name).is_file()]


def _git(*arguments: str) -> str:
    """Return the output of git, empty without git or outside a checkout."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "-c", "safe.directory=*", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
