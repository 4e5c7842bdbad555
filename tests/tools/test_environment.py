"""The command-line tools around the project: the Python finder, the environment, and what tools/test makes of failures.

The finder runs against made-up machines: a PATH and a HOME holding little scripts that answer as a Python of some
version would. The environment is made for real, from a requirements file that asks for nothing. What pip does with the
project's own requirements is not covered here; every tools/quickstart and tools/test from a fresh clone shows it.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# All that the scripts may assume of a machine.
PROGRAMS = "awk bash cat cmp cp dirname env find flock git grep id mkdir rm sed sh sleep tail uname"
PREPARE = "source tools/environment.sh; prepare_environment requirements.txt"


class Machine:
    """A checkout of the tools on a machine that has `PROGRAMS`, and the Pythons a test gives it."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.home = folder / "project", folder / "bin", folder / "home"
        for made in (self.root, self.bin, self.home):
            made.mkdir(parents=True)
        for program in PROGRAMS.split():
            (self.bin / program).symlink_to(shutil.which(program) or pytest.fail(f"no {program}"))
        shutil.copytree(ROOT / "tools", self.root / "tools", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        for name in ("requirements.txt", "requirements-dev.txt"):
            (self.root / name).write_text("# nothing\n")

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command in the checkout with nothing of this process's environment."""
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
        """Ask the finder for a Python."""
        return self.bash("source tools/environment.sh; find_python", **environment)

    def add(self, path: Path, script: str) -> Path:
        """Put an executable script somewhere."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def add_python(self, path: Path, version: str, has_venv: bool = True) -> Path:
        """Put something that answers the finder's questions as Python `version` does."""
        venv = "exit 0" if has_venv else "echo No module named ensurepip >&2; exit 1"
        return self.add(path, f'case "$2" in *version_info*) echo {version} ;; *ensurepip*) {venv} ;; esac')

    def fake_environment(self, script: str) -> None:
        """Put an up-to-date .venv whose Python is a script."""
        self.add(self.root / ".venv/bin/python", script)
        for name in ("requirements.txt", "requirements-dev.txt"):
            shutil.copy(self.root / name, self.root / f".venv/{name}.installed")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine of its own."""
    return Machine(tmp_path)


def shell_scripts() -> list[Path]:
    """List the project's bash scripts."""
    files = [path for folder in ("tools", ".ci", "slurm") for path in (ROOT / folder).glob("*")]
    return [p for p in files if p.is_file() and p.read_bytes().startswith(b"#!/usr/bin/env bash\n")]


@pytest.mark.parametrize("path", shell_scripts(), ids=lambda path: path.name)
def test_shell_script_parses_is_executable_and_stops_at_errors(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)
    assert "\nset -euo pipefail\n" in path.read_text()


def test_finder_takes_312_under_any_name_before_313(machine: Machine) -> None:
    machine.add_python(machine.bin / "python3.13", "3.13")
    expected = machine.add_python(machine.bin / "python", "3.12")
    assert machine.find_python().stdout == f"{expected}\n"


def test_finder_settles_for_313(machine: Machine) -> None:
    machine.add_python(machine.bin / "python3", "3.11")
    expected = machine.add_python(machine.bin / "python3.13", "3.13")
    assert machine.find_python().stdout == f"{expected}\n"


@pytest.mark.parametrize("where", ["home", "PYENV_ROOT"])
def test_finder_sees_through_pyenv_shims(machine: Machine, where: str) -> None:
    """A shim that fails and a default that is too old stand on PATH; the real one only in versions/."""
    machine.add(machine.bin / "python3.12", "echo pyenv: python3.12: command not found >&2; exit 127")
    machine.add_python(machine.bin / "python3", "3.11")
    pyenv = machine.home / ".pyenv" if where == "home" else machine.home / "elsewhere"
    machine.add_python(pyenv / "versions/3.11.7/bin/python", "3.11")
    expected = machine.add_python(pyenv / "versions/3.12.1/bin/python", "3.12")
    environment = {} if where == "home" else {"PYENV_ROOT": str(pyenv)}
    assert machine.find_python(**environment).stdout == f"{expected}\n"


def test_finder_takes_the_python_it_is_given(machine: Machine) -> None:
    machine.add_python(machine.bin / "python3.12", "3.12")
    given = machine.add_python(machine.home / "mine", "3.13")
    assert machine.find_python(PYTHON=str(given)).stdout == f"{given}\n"


@pytest.mark.parametrize(("version", "reason"), [("3.11", "is Python 3.11"), (None, "is not a program")])
def test_finder_refuses_a_given_python_that_will_not_do(machine: Machine, version: str | None, reason: str) -> None:
    """It must not go and use another one than it was told to."""
    machine.add_python(machine.bin / "python3.12", "3.12")
    given = machine.home / "mine"
    if version:
        machine.add_python(given, version)
    result = machine.find_python(PYTHON=str(given))
    assert (result.returncode, result.stdout) == (2, "")
    assert f"PYTHON={given} {reason}. Needed is Python 3.12 or 3.13" in result.stderr


def test_finder_says_what_it_saw_and_what_to_do_when_there_is_none(machine: Machine) -> None:
    machine.add(machine.bin / "python3.13", "echo pyenv: python3.13: command not found >&2; exit 127")
    machine.add_python(machine.bin / "python3.12", "3.12", has_venv=False)
    machine.add_python(machine.bin / "python3", "3.14")
    machine.add_python(machine.bin / "python", "3.13t")  # the free-threaded build has wheels of its own
    result = machine.bash(PREPARE)
    assert (result.returncode, result.stdout) == (2, "")
    for line in (
        "No Python 3.12 or 3.13 found on this machine",
        f"{machine.bin}/python3.13 does not run: pyenv: python3.13: command not found",
        f"{machine.bin}/python3.12 lacks the venv module (Debian, Ubuntu: apt-get install python3.12-venv)",
        f"{machine.bin}/python3 is Python 3.14",
        f"{machine.bin}/python is Python 3.13t",
        "pyenv install 3.12",
        "uv python install 3.12",
        "PYTHON=/path/to/python3.12",
    ):
        assert result.stderr.count(line) == 1, result.stderr


def test_finder_asks_uv_and_has_it_fetch_one(machine: Machine) -> None:
    """A uv that knows of no Python until told to install one."""
    fetched = machine.add_python(machine.home / "uv/python", "3.12")
    flag = machine.home / "installed"
    machine.add(
        machine.bin / "uv", f'[ "$2" = install ] && : > {flag}; [ -e {flag} ] && [ "$4" != 3.13 ] && echo {fetched}'
    )
    result = machine.find_python()
    assert result.stdout.splitlines()[-1] == str(fetched)
    assert "fetching Python 3.12 with uv" in result.stderr
    result = machine.find_python()
    assert (result.stdout, result.stderr) == (f"{fetched}\n", "")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine whose environment was made, for real, by a first call."""
    machine = Machine(tmp_path_factory.mktemp("prepared"))
    result = machine.bash(PREPARE, PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    assert f"making .venv with {sys.executable}: done in" in result.stderr
    assert "installing requirements.txt: done in" in result.stderr
    return machine


def test_a_second_call_does_nothing(prepared: Machine) -> None:
    """Not even look for a Python: one that could not be used is named."""
    before = {p: p.stat().st_mtime_ns for p in (prepared.root / ".venv").iterdir()}
    result = prepared.bash(PREPARE, PYTHON="/nonexistent")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert {p: p.stat().st_mtime_ns for p in (prepared.root / ".venv").iterdir()} == before


def test_a_failed_install_says_what_failed_and_is_tried_again(prepared: Machine) -> None:
    requirements = prepared.root / "requirements.txt"
    installed = requirements.read_text()
    requirements.write_text("no-such-package-of-q3n==1\n")
    for _ in range(2):
        result = prepared.bash(PREPARE, PIP_NO_INDEX="1")
        assert result.returncode == 1
        assert "No matching distribution found for no-such-package-of-q3n==1" in result.stderr
        assert f"--progress-bar off -r {requirements}" in result.stderr
        assert str(prepared.root / ".venv/install.log") in result.stderr
    requirements.write_text(installed)
    assert prepared.bash(PREPARE).stderr == ""


def test_development_tools_are_a_second_step(prepared: Machine) -> None:
    """tools/quickstart's environment is not enough for tools/test, and stays good afterwards."""
    both = f"{PREPARE} requirements-dev.txt"
    assert "installing requirements.txt requirements-dev.txt: done" in prepared.bash(both).stderr
    assert prepared.bash(both).stderr == ""
    assert prepared.bash(PREPARE).stderr == ""


@pytest.mark.parametrize(
    ("settings", "installer"),
    [({}, "uv pip install --python"), ({"PIP_INDEX_URL": "file:///packages"}, "-m pip install")],
)
def test_uv_installs_unless_pip_is_told_where_packages_are(
    prepared: Machine, settings: dict[str, str], installer: str
) -> None:
    """uv does not read pip's settings; on a machine with a mirror of its own it would look in the wrong place."""
    uv = prepared.add(prepared.bin / "uv", "exit 0")
    (prepared.root / ".venv/requirements.txt.installed").unlink()
    # The null device keeps out what the machine that runs this test tells pip.
    result = prepared.bash(PREPARE, PIP_CONFIG_FILE=os.devnull, **settings)
    uv.unlink()
    assert result.returncode == 0
    assert f"{installer} " in (prepared.root / ".venv/install.log").read_text()


def test_an_environment_whose_python_is_gone_is_made_anew(prepared: Machine) -> None:
    python = prepared.root / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/nonexistent/python3.12")
    result = prepared.bash(PREPARE, PYTHON=sys.executable)
    assert "does not run any more: making .venv anew" in result.stderr
    assert result.returncode == 0
    subprocess.run([python, "-c", "import pip"], check=True)


def test_an_environment_of_another_python_is_refused_and_left_alone(machine: Machine) -> None:
    python = machine.add_python(machine.root / ".venv/bin/python", "3.11")
    machine.add_python(machine.bin / "python3.12", "3.12")
    result = machine.bash(PREPARE)
    assert result.returncode == 2
    assert f"{python} is Python 3.11. Needed is Python 3.12 or 3.13: remove" in result.stderr
    assert python.exists()


def test_of_two_calls_one_waits(machine: Machine) -> None:
    """The waiting call finds the other's work and does nothing; here the test is the other call."""
    venv = machine.root / ".venv"
    venv.mkdir()
    with open(venv / "install.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = machine.start("bash", "-c", PREPARE)
        assert waiting.stderr is not None
        assert "another call is preparing" in waiting.stderr.readline()
        machine.fake_environment("exit 1")
    _, rest = waiting.communicate(timeout=60)
    assert (waiting.returncode, rest) == (0, "")


@pytest.mark.parametrize("tool", ["quickstart", "test"])
def test_help_needs_no_environment(machine: Machine, tool: str) -> None:
    result = machine.run(f"tools/{tool}", "--help")
    assert result.returncode == 0
    assert f"Usage: tools/{tool}" in result.stdout
    assert not (machine.root / ".venv").exists()


SLURM_SUITE = "-m not gpu and slurm --numprocesses 2 --dist loadfile|"
REPORT = 'echo "$*|$PWD|$PYTHONPATH|$OMP_NUM_THREADS|${CI:-}"'


def test_quickstart_hands_its_overrides_to_the_recipe(machine: Machine) -> None:
    machine.fake_environment(f"{REPORT}; exit 75")
    command = ["bash", "-c", 'cd / && "$0" training.steps=7', f"{machine.root}/tools/quickstart"]
    result = machine.run(*command)
    assert result.returncode == 75
    arguments = "-m megatron_q3n.train --config-name pretrain-tiny training.steps=7"
    assert result.stdout == f"{arguments}|{machine.root}|{machine.root}|1|\n"


@pytest.mark.parametrize(
    ("failing", "status"), [({}, 0), ({"ruff": 1}, 1), ({"mypy": 2}, 1), ({"pytest": 5, "ruff": 1}, 5)]
)
def test_test_runs_every_check_and_fails_with_any(machine: Machine, failing: dict[str, int], status: int) -> None:
    cases = "".join(f"{module}) exit {code} ;; " for module, code in failing.items())
    machine.fake_environment(f'{REPORT}; case "$2" in {cases} esac')
    result = machine.run("tools/test", "tests/x.py", "-k", "a b")
    ran = [line.split("|")[0] for line in result.stdout.splitlines() if line.startswith("-m")]
    assert [line.split()[1] for line in ran] == ["ruff", "ruff", "mypy", "pytest"]
    assert ran[-1].endswith("-m not slow and not gpu and not slurm tests/x.py -k a b")
    assert result.returncode == status
    assert ("FAILED: " in result.stdout) == bool(failing.keys() - {"pytest"})
    assert result.stdout.splitlines()[-1].startswith("tools/test took ")


def test_all_leaves_slurm_out_only_where_there_is_none(machine: Machine) -> None:
    machine.fake_environment(REPORT)
    result = machine.run("tools/test", "--all")
    assert "-m not gpu and not slurm --numprocesses auto" in result.stdout
    assert "not gpu and slurm" not in result.stdout
    assert "tests marked slurm are left out" in result.stderr
    assert SLURM_SUITE in machine.run("tools/test", "--all", CI="true").stdout
    machine.add(machine.bin / "sbatch", "exit 0")
    assert SLURM_SUITE in machine.run("tools/test", "--all").stdout


def test_a_failure_of_either_half_of_all_is_its_exit_status(machine: Machine) -> None:
    machine.add(machine.bin / "sbatch", "exit 0")
    for half in ("not slurm", "gpu and slurm"):
        machine.fake_environment(f'case "$*" in *pytest*"{half}"*) exit 1 ;; esac')
        assert machine.run("tools/test", "--all").returncode == 1


def test_ci_runs_every_test(machine: Machine) -> None:
    machine.fake_environment(REPORT)
    asked = machine.home / "asked"
    for program in ("apt-get", "sudo", "id"):  # this machine's root, and what it would install
        machine.add(machine.bin / program, f'echo {program} "$@" >> {asked}; echo 0')
    result = machine.run("bash", "-c", "cd / && bash $0", f"{machine.root}/.ci/run")
    assert result.returncode == 0
    assert f"{SLURM_SUITE}{machine.root}|{machine.root}|1|true\n" in result.stdout
    assert re.search(r"apt-get install .*slurm-wlm munge", asked.read_text())
