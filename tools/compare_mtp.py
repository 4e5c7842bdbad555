#!/usr/bin/env python3
"""Train one model's draft layer in several ways from the same trunk and tokens, and say how many drafts each keeps.

    tools/compare_mtp.py runs/latest --config-name mtp-tiny --output comparison [setting=value …]

Ways: single-step, stock's teacher-forced depths, and as decoding drafts (mtp.method=inference), on labels or
distilled from the model. The trunk is frozen, so the model that judges is the same for all. Acceptance is the
evaluate stage's, on held-out text, by the model itself. Settings after the options go to the training of each.

Exit status: 0 done, else that of the run that failed.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEPTH = 4
SINGLE = ["model.mtp_num_layers=1", "model.mtp_use_repeated_layer=false"]
LABELS = ["mtp.label_weight=1", "mtp.distillation_weight=0"]
WAYS: dict[str, list[str]] = {
    "as the checkpoint has it": [],
    "single-step": ["mtp.method=stock", *LABELS, *SINGLE],
    "teacher-forced, as stock": ["mtp.method=stock", *LABELS],
    "as decoding drafts, all": ["mtp.method=inference", "mtp.after_wrong_draft=text", *LABELS],
    "as decoding drafts, right ones": ["mtp.method=inference", *LABELS],
    "as decoding drafts, distilled": [
        "mtp.method=inference", "mtp.label_weight=0", "mtp.distillation_weight=1",
    ],
    "single-step, distilled": [
        "mtp.method=inference", "mtp.label_weight=0", "mtp.distillation_weight=1", *SINGLE,
    ],
}  # fmt: skip
EVALUATION = ["model.mtp_num_layers=1", f"evaluate.draft_depth={DEPTH}"]


def main() -> int:
    """Train, evaluate and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a run directory or checkpoint: the trunk")
    parser.add_argument("--config-name", default="mtp-tiny", metavar="RECIPE")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for the runs")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument(
        "--evaluate", nargs="*", default=[], metavar="SETTING=VALUE", help="e.g. evaluate.rows=128"
    )
    options, settings = parser.parse_known_args()
    options.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    try:
        for number, way in enumerate(options.ways):
            source = options.checkpoint
            if WAYS[way]:
                source = str((options.output / f"run-{number}").resolve())
                train(options, source, [*WAYS[way], *settings])
            found[way] = evaluate(options, source, options.output / f"evaluation-{number}.json")
    except subprocess.CalledProcessError as error:
        return error.returncode
    (options.output / "comparison.json").write_text(json.dumps(found, indent=1))
    show(found)
    return 0


def train(options: argparse.Namespace, run_dir: str, settings: list[str]) -> None:
    """Train the draft layer one way."""
    start = [f"checkpoint.load={options.checkpoint}", f"run_dir={run_dir}"]
    call("--config-name", options.config_name, *start, *settings)


def evaluate(options: argparse.Namespace, source: str, output: Path) -> dict[str, Any]:
    """Draft and verify on held-out text. Returns: the first data set's results."""
    call(
        "--config-name", "evaluate", f"checkpoint.load={source}", f"evaluate.output={output}", *EVALUATION,
        *options.evaluate,
    )  # fmt: skip
    return next(iter(json.loads(output.read_text())["sets"].values()))


def call(*arguments: str) -> None:
    """Run `train` with what it prints going where this tool's output goes.

    Raises: subprocess.CalledProcessError.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    subprocess.run(
        [sys.executable, "-m", "megatron_q3n.train", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )


def show(found: dict[str, Any]) -> None:
    """Print a line for each way and kind of draft."""
    depths = "".join(f"{f'depth {depth}':>9}" for depth in range(1, DEPTH + 1))
    print(f"\n{'':<38}{'drafts':<8}{'per pass':>9}{depths}")
    for way, results in found.items():
        for kind in ("greedy", "drawn"):
            drafts = results["drafts"][kind]
            shares = "".join(
                f"{'–' if share is None else f'{share:.1%}':>9}" for share in drafts["acceptance"]
            )
            print(f"{way:<38}{kind:<8}{drafts['tokens_per_pass']:>9.3f}{shares}")


if __name__ == "__main__":
    sys.exit(main())
