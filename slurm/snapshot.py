"""The copy of the code that a run keeps and runs from: what is edited later does not reach a job in the queue."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("megatron_q3n", "slurm", "recipes", "tools")


def take_snapshot(target: Path) -> None:
    """Copy the checkout's code to `target`, and say in COMMIT which commit it is and what differs from it."""
    target.mkdir(parents=True)
    for name in _files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    commit = _git("rev-parse", "HEAD").strip() or "not a git checkout"
    (target / "COMMIT").write_text(f"{commit}\n{_git('status', '--short', '--', *FOLDERS)}")


def _files() -> list[str]:
    """List the code's files: those of git, tracked or not ignored, else all but caches."""
    listed = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *FOLDERS)
    names = [name for name in listed.split("\0") if name]
    if not names:
        every = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
        names = [str(path.relative_to(ROOT)) for path in every if "__pycache__" not in path.parts]
    return [name for name in names if (ROOT / name).is_file()]


def _git(*arguments: str) -> str:
    """Return what git says, nothing where there is no git or no checkout."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "-c", "safe.directory=*", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
