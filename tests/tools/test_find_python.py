"""Search for a Python (tools/environment.sh): which one is used, and the message where there is none.

The search runs against simulated machines (simulated_machine.py).
"""

from pathlib import Path

import pytest

from tests.tools.simulated_machine import PREPARE, Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Return a simulated machine for one test."""
    return Machine(tmp_path)


def test_finder_takes_312_under_any_name_before_313(machine: Machine) -> None:
    machine.add_python(machine.bin / "python3.13", "3.13")
    expected = machine.add_python(machine.bin / "python", "3.12")
    assert machine.find_python().stdout == f"{expected}\n"


def test_finder_accepts_313(machine: Machine) -> None:
    machine.add_python(machine.bin / "python3", "3.11")
    expected = machine.add_python(machine.bin / "python3.13", "3.13")
    assert machine.find_python().stdout == f"{expected}\n"


@pytest.mark.parametrize("where", ["home", "PYENV_ROOT"])
def test_finder_sees_through_pyenv_shims(machine: Machine, where: str) -> None:
    """On PATH are a shim that fails and a default that is too old; the real one is only in versions/."""
    machine.add(machine.bin / "python3.12", "echo pyenv: python3.12: command not found >&2; exit 127")
    machine.add_python(machine.bin / "python3", "3.11")
    pyenv = machine.home / ".pyenv" if where == "home" else machine.home / "elsewhere"
    machine.add_python(pyenv / "versions/3.11.7/bin/python", "3.11")
    expected = machine.add_python(pyenv / "versions/3.12.1/bin/python", "3.12")
    environment = {} if where == "home" else {"PYENV_ROOT": str(pyenv)}
    assert machine.find_python(**environment).stdout == f"{expected}\n"


def test_finder_uses_the_python_named_by_the_variable(machine: Machine) -> None:
    machine.add_python(machine.bin / "python3.12", "3.12")
    chosen = machine.add_python(machine.home / "mine", "3.13")
    assert machine.find_python(PYTHON=str(chosen)).stdout == f"{chosen}\n"


@pytest.mark.parametrize(("version", "reason"), [("3.11", "is Python 3.11"), (None, "is not a program")])
def test_finder_refuses_a_named_python_that_is_unusable(machine: Machine, version: str | None, reason: str) -> None:
    """It must not use another one instead."""
    machine.add_python(machine.bin / "python3.12", "3.12")
    chosen = machine.home / "mine"
    if version:
        machine.add_python(chosen, version)
    result = machine.find_python(PYTHON=str(chosen))
    assert (result.returncode, result.stdout) == (2, "")
    assert f"PYTHON={chosen} {reason}. Required: Python 3.12 or 3.13" in result.stderr


def test_finder_lists_what_it_checked_and_what_to_do_when_there_is_none(machine: Machine) -> None:
    machine.add(machine.bin / "python3.13", "echo pyenv: python3.13: command not found >&2; exit 127")
    machine.add_python(machine.bin / "python3.12", "3.12", has_venv=False)
    machine.add_python(machine.bin / "python3", "3.14")
    # the free-threaded build needs other wheels
    machine.add_python(machine.bin / "python", "3.13t")
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


def test_finder_installs_one_with_uv(machine: Machine) -> None:
    """This uv finds no Python until `uv python install` was called."""
    fetched = machine.add_python(machine.home / "uv/python", "3.12")
    flag = machine.home / "installed"
    machine.add(
        machine.bin / "uv", f'[ "$2" = install ] && : > {flag}; [ -e {flag} ] && [ "$4" != 3.13 ] && echo {fetched}'
    )
    result = machine.find_python()
    assert result.stdout.splitlines()[-1] == str(fetched)
    assert "installing Python 3.12 with uv" in result.stderr
    result = machine.find_python()
    assert (result.stdout, result.stderr) == (f"{fetched}\n", "")
