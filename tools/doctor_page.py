"""Report of this machine's hardware and software for training, with the consequence of each missing part.

    tools/doctor            a page, as wide as the terminal
    tools/doctor --json     the same for programs: {"ok": …, "findings": [{section, name, found, state, cost}]}

`+` is present, `~` is present in another version than the tested one, `-` is absent, with the consequence in the line
below, `!` is required and missing or broken.
Installs and changes nothing. The checked Python is $PYTHON, .venv's, or python3.

Exit status: 0 a run can start here, 1 something required is missing or broken, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from dataclasses import asdict

# found in this file's own folder: the report must run where the checkout is not installed
from machine import Finding, collect_findings

MARKS = {"here": "+", "other": "~", "absent": "-", "broken": "!"}
NAME_COLUMNS = 27
TWO_COLUMN_WIDTH = 72
MIN_COLUMNS = 30
MAX_COLUMNS = 120


def main() -> int:
    """Collect the findings and print them."""
    parser = argparse.ArgumentParser(
        prog="tools/doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    findings = collect_findings()
    broken = [finding for finding in findings if finding.state == "broken"]
    if options.json:
        records = [asdict(finding) for finding in findings]
        print(json.dumps({"ok": not broken, "findings": records}, indent=1, ensure_ascii=False))
    else:
        columns = shutil.get_terminal_size((100, 24)).columns
        width = max(MIN_COLUMNS, min(columns, MAX_COLUMNS))
        print("\n".join(page(findings, width)))
        print("\n".join(textwrap.wrap(verdict(broken), width)))
    return 1 if broken else 0


def page(findings: list[Finding], width: int) -> list[str]:
    """Return the lines of the page, section by section, no line longer than `width`."""
    lines: list[str] = []
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", section] if lines else [section]
        lines += entry(finding, width)
    return [*lines, ""]


def entry(finding: Finding, width: int) -> list[str]:
    """Return a finding's lines: mark, name and what was found; below it the consequence of its absence."""
    name = f" {MARKS[finding.state]} {finding.name}"
    is_wide = width >= TWO_COLUMN_WIDTH
    indent = " " * (NAME_COLUMNS if is_wide else 5)
    first = f"{name:<{NAME_COLUMNS - 1}} " if is_wide else f"{name}: "
    lines = textwrap.wrap(finding.found, width, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)
    cost = textwrap.wrap(finding.cost, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return (lines or [name]) + cost


def verdict(broken: list[Finding]) -> str:
    """Return whether a run can start on this machine, as a sentence."""
    if broken:
        names = ", ".join(finding.name for finding in broken)
        return f"A run cannot start here: {names}."
    return "A run can start here."


if __name__ == "__main__":
    sys.exit(main())
