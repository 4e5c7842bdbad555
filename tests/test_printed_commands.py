"""Printed commands: a path in a command that a user pastes into a shell is quoted."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("megatron_q3n", "slurm", "tools")
# an option, program or path setting, directly before a value; at the beginning of a text it is what the user gave
PATHS = "resume|output|tokenizer|compare|config-dir|like|local --resume"
BEFORE_VALUE = re.compile(
    rf"\S.*(?:(?<=[ \n])--(?:{PATHS})[ =]|slurm\.status |tools/\w+\.py |wandb sync |checkpoint\.load=|run_dir=)$",
    re.DOTALL,
)
QUOTING = {"quote", "join", "shell_override"}


def unquoted(source: str) -> list[str]:
    """Return the values in commands of a module's texts that are written without quoting, as line:expression."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.JoinedStr):
            continue
        before = ""
        for part in node.values:
            if isinstance(part, ast.Constant):
                before += str(part.value)
                continue
            assert isinstance(part, ast.FormattedValue)
            call = part.value.func if isinstance(part.value, ast.Call) else None
            name = getattr(call, "attr", getattr(call, "id", None))
            if BEFORE_VALUE.search(before) and name not in QUOTING:
                found.append(f"{node.lineno}:{ast.unparse(part.value)}")
            before += "…"
    return found


def test_every_path_in_a_printed_command_is_quoted() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{value}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for value in unquoted(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ('print(f"to continue: python -m megatron_q3n.train --resume {run_dir}")', 1),
        ('print(f"create it with " f"tools/prepare_data.py --output {folder}.")', 1),
        ('print(f"load it: checkpoint.load={path}")', 1),
        ('print(f"upload: wandb sync {path}/wandb")', 1),
        ('print(f"python -m slurm.status {shlex.quote(str(folder))}")', 0),
        ("print(f\"load it: {shell_override('checkpoint.load', path)}\")", 0),
        ('print(f"--output {output} exists")', 0),
        ('command = [f"run_dir={run_dir}"]', 0),
    ],
)
def test_the_rule_finds_unquoted_values(source: str, number: int) -> None:
    assert len(unquoted(source)) == number
