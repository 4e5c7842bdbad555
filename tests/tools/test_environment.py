"""Tests of the environment scripts: creation and update of .venv, the editable install, exit status of tools/test.

They run on simulated machines (simulated_machine.py). The environment is created by the real venv and pip, from an
empty requirements file, so that no network is needed. Not covered: pip with the project's own requirements, and
setuptools as the build backend; every tools/quickstart and tools/test from a fresh clone runs those.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.simulated_machine import PREPARE, PTH, ROOT, Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Return a simulated machine for one test."""
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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """Return a machine whose environment was created by a first call, with the real venv and pip."""
    machine = Machine(tmp_path_factory.mktemp("prepared"))
    result = machine.bash(PREPARE, PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    assert f"creating .venv with {sys.executable}: done in" in result.stderr
    assert "installing requirements.txt: done in" in result.stderr
    assert "installing the checkout (editable): done in" in result.stderr
    return machine


def test_a_second_call_does_nothing(prepared: Machine) -> None:
    """It does not even search for a Python: the one named here does not exist."""
    before = {p: p.stat().st_mtime_ns for p in (prepared.root / ".venv").iterdir()}
    result = prepared.bash(PREPARE, PYTHON="/nonexistent")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert {p: p.stat().st_mtime_ns for p in (prepared.root / ".venv").iterdir()} == before


def editable_path(machine: Machine) -> str:
    """Return the folder outside of .venv that its Python imports from, as a process elsewhere sees it."""
    program = "import sys; print(*(path for path in sys.path if 'site-packages' not in path and 'project' in path))"
    command = [machine.root / ".venv/bin/python", "-I", "-c", program]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=True).stdout.strip()


def test_the_checkout_is_installed_editable_without_its_requirements(prepared: Machine) -> None:
    """The stand-in project requires a package that does not exist: --no-deps must leave it out."""
    assert editable_path(prepared) == str(prepared.root)
    assert "--no-deps --no-build-isolation --editable" in (prepared.root / ".venv/install.log").read_text()


def test_a_missing_editable_install_is_made_alone(prepared: Machine) -> None:
    (installed,) = prepared.root.glob(".venv/lib/python*/site-packages/__editable__*.pth")
    installed.unlink()
    result = prepared.bash(PREPARE, PIP_NO_INDEX="1")
    assert result.returncode == 0, result.stderr
    assert "installing the checkout (editable): done in" in result.stderr
    assert "requirements.txt" not in result.stderr
    assert editable_path(prepared) == str(prepared.root)
    assert prepared.bash(PREPARE).stderr == ""


@pytest.mark.parametrize("is_moved", [True, False], ids=["moved", "copied"])
def test_an_environment_that_names_another_folder_is_corrected(
    prepared: Machine, tmp_path: Path, is_moved: bool
) -> None:
    """A checkout copied with its .venv, which still imports from the original, there or not."""
    copy = Machine(tmp_path)
    shutil.copytree(prepared.root / ".venv", copy.root / ".venv", symlinks=True)
    original = prepared.root
    if is_moved:
        (installed,) = copy.root.glob(".venv/lib/python*/site-packages/__editable__*.pth")
        installed.write_text(f"{original}-elsewhere\n")
    else:
        assert editable_path(copy) == str(original)
    result = copy.bash(PREPARE, PIP_NO_INDEX="1")
    assert result.returncode == 0, result.stderr
    assert "installing the checkout (editable): done in" in result.stderr
    assert "installing requirements" not in result.stderr
    assert (editable_path(copy), editable_path(prepared)) == (str(copy.root), str(original))
    assert copy.bash(PREPARE).stderr == ""


def test_an_editable_install_without_effect_is_an_error(machine: Machine) -> None:
    """An installer that succeeds and leaves no .pth file would otherwise be called at every start."""
    machine.fake_environment('case "$*" in *version_info*) echo 3.12 ;; esac')
    (machine.root / PTH).write_text("/another/folder\n")
    result = machine.bash(PREPARE)
    assert result.returncode == 1
    assert f"names {machine.root} after this" in result.stderr


def test_a_failed_install_names_the_command_and_is_tried_again(prepared: Machine) -> None:
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
    """tools/quickstart's environment lacks tools/test's packages, and remains up to date afterwards."""
    both = f"{PREPARE} requirements-dev.txt"
    assert "installing requirements.txt requirements-dev.txt: done" in prepared.bash(both).stderr
    assert prepared.bash(both).stderr == ""
    assert prepared.bash(PREPARE).stderr == ""


@pytest.mark.parametrize(
    ("settings", "installer"),
    [({}, "uv pip install --python"), ({"PIP_INDEX_URL": "file:///packages"}, "-m pip install")],
)
def test_uv_installs_unless_pip_has_settings_for_an_index(
    prepared: Machine, settings: dict[str, str], installer: str
) -> None:
    """uv does not read pip's settings; on a machine with a package mirror it would use the wrong index."""
    (installed,) = prepared.root.glob(".venv/lib/python*/site-packages/__editable__*.pth")
    # what uv does, as far as the scripts see it
    uv = prepared.add(
        prepared.bin / "uv", f'case "$*" in *--no-deps*--editable*) echo "{prepared.root}" > {installed} ;; esac'
    )
    (prepared.root / ".venv/requirements.txt.installed").unlink()
    installed.unlink()
    # the null device excludes the pip settings of the machine that runs this test
    result = prepared.bash(PREPARE, PIP_CONFIG_FILE=os.devnull, **settings)
    uv.unlink()
    assert result.returncode == 0, result.stderr
    commands = [line for line in (prepared.root / ".venv/install.log").read_text().splitlines() if line[:2] == "+ "]
    assert [installer in command for command in commands] == [True, True]
    assert commands[1].endswith(f"--no-deps --no-build-isolation --editable {prepared.root}")


def test_an_environment_whose_python_was_removed_is_created_again(prepared: Machine) -> None:
    python = prepared.root / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/nonexistent/python3.12")
    result = prepared.bash(PREPARE, PYTHON=sys.executable)
    assert "does not run: creating .venv again" in result.stderr
    assert result.returncode == 0, result.stderr
    assert editable_path(prepared) == str(prepared.root)
    subprocess.run([python, "-c", "import pip"], check=True)


def test_an_environment_of_another_python_is_refused_and_left_alone(machine: Machine) -> None:
    python = machine.add_python(machine.root / ".venv/bin/python", "3.11")
    machine.add_python(machine.bin / "python3.12", "3.12")
    result = machine.bash(PREPARE)
    assert result.returncode == 2
    assert f"{python} is Python 3.11. Required: Python 3.12 or 3.13. Remove" in result.stderr
    assert python.exists()


def test_the_second_of_two_calls_waits(machine: Machine) -> None:
    """The second call then finds a current environment and does nothing; here the test is the first call."""
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
REPORT = 'echo "$*|$PWD|${PYTHONPATH:-}|$OMP_NUM_THREADS|${CI:-}"'


def test_quickstart_passes_its_overrides_to_the_recipe(machine: Machine) -> None:
    machine.fake_environment(f"{REPORT}; exit 75")
    command = ["bash", "-c", 'cd / && "$0" training.steps=7', f"{machine.root}/tools/quickstart"]
    result = machine.run(*command)
    assert result.returncode == 75
    arguments = "-m megatron_q3n.train --config-name pretrain-tiny training.steps=7"
    assert result.stdout == f"{arguments}|{machine.root}||1|\n"


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


def test_all_omits_slurm_only_where_it_is_not_installed(machine: Machine) -> None:
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
    calls = machine.home / "calls"
    # stand-ins: the test must not install packages
    for program in ("apt-get", "sudo", "id"):
        machine.add(machine.bin / program, f'echo {program} "$@" >> {calls}; echo 0')
    result = machine.run("bash", "-c", "cd / && bash $0", f"{machine.root}/.ci/run")
    assert result.returncode == 0
    assert f"{SLURM_SUITE}{machine.root}||1|true\n" in result.stdout
    assert re.search(r"apt-get install .*slurm-wlm munge", calls.read_text())
