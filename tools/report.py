#!/usr/bin/env python
"""Rebuild of a run's report.html, or one page that compares several runs.

tools/report.py runs/latest --open
tools/report.py --compare runs/a runs/b --output comparison.html
"""

import argparse
import sys
import webbrowser
from pathlib import Path

from megatron_q3n.config import EXIT_BAD_INPUT, UserError
from megatron_q3n.metrics.report import write_comparison, write_report


def main() -> int:
    """Write the page and print its path."""
    arguments = _parse()
    try:
        if arguments.compare:
            path = write_comparison(arguments.run_dirs, arguments.output)
        else:
            path = write_report(arguments.run_dirs[0])
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    print(path)
    if arguments.open:
        webbrowser.open(path.resolve().as_uri())
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--compare", action="store_true", help="one page for several runs")
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), help="output of --compare")
    parser.add_argument("--open", action="store_true", help="show the page in the browser")
    arguments = parser.parse_args()
    if len(arguments.run_dirs) > 1 and not arguments.compare:
        parser.error("several run directories need --compare")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
