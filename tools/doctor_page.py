"""Print what this machine has for training, and what each absence costs, in plain words.

    tools/doctor            a page, as wide as the terminal
    tools/doctor --json     the same for programs: {"ok": …, "findings": [{section, name, found, state, cost}]}

`+` is here, `~` in another version than the one tested, `-` is absent and costs what the line below it says,
`!` is required and missing or broken.
Installs and changes nothing. The Python looked at is $PYTHON, .venv's, or python3.

Exit status: 0 a run can start here, 1 something required is missing or broken, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from dataclasses import asdict

from machine import Finding, examine

MARKS = {"here": "+", "other": "~", "absent": "-", "broken": "!"}
NAME_COLUMNS = 27
WIDE_COLUMNS = 72
LEAST_COLUMNS = 30
MOST_COLUMNS = 120


def main() -> int:
    """Examine and print."""
    parser = argparse.ArgumentParser(
        prog="tools/doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    findings = examine()
    broken = [finding for finding in findings if finding.state == "broken"]
    if options.json:
        rows = [asdict(finding) for finding in findings]
        print(json.dumps({"ok": not broken, "findings": rows}, indent=1, ensure_ascii=False))
    else:
        columns = shutil.get_terminal_size((100, 24)).columns
        width = max(LEAST_COLUMNS, min(columns, MOST_COLUMNS))
        print("\n".join(page(findings, width)))
        print("\n".join(textwrap.wrap(verdict(broken), width)))
    return 1 if broken else 0


def page(findings: list[Finding], width: int) -> list[str]:
    """Lay the findings out, section by section, no line wider than `width`."""
    lines: list[str] = []
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", section] if lines else [section]
        lines += entry(finding, width)
    return [*lines, ""]


def entry(finding: Finding, width: int) -> list[str]:
    """Return a finding's lines: mark, name and what was found; below, what its absence costs."""
    name = f" {MARKS[finding.state]} {finding.name}"
    wide = width >= WIDE_COLUMNS
    indent = " " * (NAME_COLUMNS if wide else 5)
    first = f"{name:<{NAME_COLUMNS - 1}} " if wide else f"{name}: "
    lines = textwrap.wrap(finding.found, width, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)
    cost = textwrap.wrap(finding.cost, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return (lines or [name]) + cost


def verdict(broken: list[Finding]) -> str:
    """Say whether a run can start here."""
    if broken:
        names = ", ".join(finding.name for finding in broken)
        return f"A run cannot start here: {names}."
    return "A run can start here."


if __name__ == "__main__":
    sys.exit(main())
