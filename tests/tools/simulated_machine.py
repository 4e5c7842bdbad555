"""Simulated machine for tests of the environment scripts: a checkout with the tools, a PATH and a HOME.

Its Pythons are small scripts that answer as a Python of some version would. Its checkout has its own build backend,
which stands for setuptools, so that a real pip can install it without a network.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# the only programs that the scripts may assume to exist
PROGRAMS = "awk bash cat cmp cp dirname env find flock git grep id mkdir rm sed sh sleep tail uname"
PREPARE = "source tools/environment.sh; prepare_environment requirements.txt"
# stands for pyproject.toml and setuptools: an editable install by a .pth file, as setuptools writes it
PYPROJECT = """
[project]
name = "megatron_q3n"
version = "0.1.0"
[build-system]
requires = []
build-backend = "editable_backend"
backend-path = ["."]
"""
BACKEND = """
import os, zipfile
def build_editable(folder, settings=None, metadata=None):
    name, info = "megatron_q3n-0.1.0-py3-none-any.whl", "megatron_q3n-0.1.0.dist-info"
    files = {
        "__editable__.megatron_q3n-0.1.0.pth": os.getcwd(),
        info + "/METADATA": "Metadata-Version: 2.1\\nName: megatron_q3n\\nVersion: 0.1.0\\nRequires-Dist: no-such-q3n",
        info + "/WHEEL": "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any",
    }
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text + "\\n")
        wheel.writestr(info + "/RECORD", "".join(path + ",,\\n" for path in [*files, info + "/RECORD"]))
    return name
"""
PTH = ".venv/lib/python3.12/site-packages/__editable__.megatron_q3n-0.1.0.pth"


class Machine:
    """A simulated machine: a checkout with the tools, the programs in `PROGRAMS`, and the Pythons that a test adds."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.home = folder / "project", folder / "bin", folder / "home"
        for directory in (self.root, self.bin, self.home):
            directory.mkdir(parents=True)
        for program in PROGRAMS.split():
            (self.bin / program).symlink_to(shutil.which(program) or pytest.fail(f"no {program}"))
        shutil.copytree(ROOT / "tools", self.root / "tools", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        for name in ("requirements.txt", "requirements-dev.txt"):
            (self.root / name).write_text("# nothing\n")
        (self.root / "pyproject.toml").write_text(PYPROJECT)
        (self.root / "editable_backend.py").write_text(BACKEND)

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command in the checkout, without this process's environment variables."""
        return subprocess.Popen(
            command,
            cwd=self.root,
            env={"PATH": str(self.bin), "HOME": str(self.home), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        process = self.start(*command, **environment)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def bash(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a line of bash."""
        return self.run("bash", "-c", script, **environment)

    def find_python(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the search for a Python."""
        return self.bash("source tools/environment.sh; find_python", **environment)

    def add(self, path: Path, script: str) -> Path:
        """Write an executable script to a path and return the path.

        A program that is there already is replaced: it is a symbolic link to this machine's own, which must stay.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def add_python(self, path: Path, version: str, has_venv: bool = True) -> Path:
        """Write a script that answers the search's queries as Python `version` does."""
        venv = "exit 0" if has_venv else "echo No module named ensurepip >&2; exit 1"
        return self.add(path, f'case "$2" in *version_info*) echo {version} ;; *ensurepip*) {venv} ;; esac')

    def fake_environment(self, script: str) -> None:
        """Create an up-to-date .venv whose Python is a script."""
        self.add(self.root / ".venv/bin/python", script)
        (self.root / PTH).parent.mkdir(parents=True, exist_ok=True)
        (self.root / PTH).write_text(f"{self.root}\n")
        for name in ("requirements.txt", "requirements-dev.txt"):
            shutil.copy(self.root / name, self.root / f".venv/{name}.installed")
