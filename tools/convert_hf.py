#!/usr/bin/env python3
"""Conversion between Hugging Face model folders and checkpoints."""

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_q3n.config import EXIT_BAD_INPUT, UserError
from megatron_q3n.config.override_text import shell_override
from megatron_q3n.conversion.malloc import return_freed_memory

EXAMPLES = """examples:
  tools/convert_hf.py import Qwen3-Next-80B-A3B-Instruct/ --output checkpoints/qwen3-next
  tools/convert_hf.py export runs/latest --output exported/ --like Qwen3-Next-80B-A3B-Instruct/
  tools/convert_hf.py export runs/latest --output exported/ --dtype fp32 --model-type qwen3_5_moe_text

Both directions convert tensor by tensor: memory is bounded by the largest one, whatever the model's size.
After an interruption the same command continues. The output is created when it is complete.
"""
# 128 + SIGINT, the convention of shells
EXIT_INTERRUPTED = 130
UNITS = {"": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="convert_hf.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    importer = directions.add_parser("import", help="Hugging Face folder -> checkpoint, for checkpoint.load")
    importer.add_argument("source", type=Path, metavar="MODEL_FOLDER")
    exporter = directions.add_parser("export", help="checkpoint or run directory -> Hugging Face folder")
    exporter.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT")
    exporter.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="(%(default)s)")
    exporter.add_argument(
        "--max-shard-size",
        type=size,
        default="4GB",
        metavar="SIZE",
        help="data per safetensors file, e.g. 4GB or 512MiB (%(default)s)",
    )
    exporter.add_argument(
        "--model-type",
        help="qwen3_next, qwen3_5_moe_text, or qwen3_5_moe with the vision tower of --like\n"
        "(default: the type of --like, or qwen3_next)",
    )
    exporter.add_argument(
        "--like",
        type=Path,
        metavar="MODEL_FOLDER",
        help="source of fields that the model does not determine, and of files beside the same tokenizer,\n"
        "e.g. the model that was imported, or huggingface/ in its checkpoint",
    )
    exporter.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="folder with a tokenizer.json (default: the tokenizer and chat template of the run)",
    )
    exporter.add_argument(
        "--verify",
        choices=["full", "sizes"],
        default="full",
        help="how to check the checkpoint's files first (%(default)s)",
    )
    for direction in (importer, exporter):
        direction.add_argument("--output", type=Path, required=True, help="folder to write")
    return parser.parse_args(arguments)


def size(text: str) -> int:
    """Parse a number of bytes with a unit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not match or match[2] not in UNITS or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write e.g. 4GB or 512MiB")
    return int(float(match[1]) * UNITS[match[2]])


def run_import(options: argparse.Namespace, console: Console) -> None:
    """Import, and print how to train from the result."""
    # late: torch takes seconds, and a wrong command line must be refused immediately
    from megatron_q3n.conversion.importing import MODEL_PART, import_weights

    with progress(console) as (note, advance):
        imported = import_weights(options.source, options.output, note, advance)
    if imported.num_left_out:
        console.print(f"omitted: {imported.num_left_out} tensors of the vision tower")
    checkpoint = imported.checkpoint.resolve()
    load = shell_override("checkpoint.load", checkpoint)
    print(
        f"checkpoint {checkpoint} (published configuration and tokenizer in its huggingface/)\n"
        "train from it, with any recipe whose model has the same dimensions, by one override:\n"
        f"  {load}\n"
        "or with any other recipe and the imported model's own dimensions:\n"
        "  python -m megatron_q3n.train --config-name pretrain-tiny "
        f"--config-dir {shlex.quote(str(checkpoint))} model={MODEL_PART} {load}"
    )


def run_export(options: argparse.Namespace, console: Console) -> None:
    """Export, and print the source checkpoint."""
    import torch  # late, as above

    from megatron_q3n.conversion.exporting import Export, export_weights
    from megatron_q3n.conversion.run_tokenizer import tokenizer_at
    from megatron_q3n.hf.model_config import family_of

    family = family_of(options.model_type, options.like)
    export = Export(
        options.source,
        options.output,
        family,
        {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype],
        options.max_shard_size,
        options.like,
        tokenizer_at(options.tokenizer) if options.tokenizer else None,
        options.verify,
    )
    with progress(console) as (note, advance):
        checkpoint = export_weights(export, note, advance)
    print(f"{options.output}: {family.architecture}, from {checkpoint}")


@contextmanager
def progress(console: Console) -> Iterator[tuple]:
    """Show a progress bar on a terminal; elsewhere print notes only."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("converting", total=None)
        yield (
            lambda text: console.print(text, soft_wrap=True),
            lambda done, total: bar.update(task, completed=done, total=total),
        )


def main() -> int:
    """Run; 0 when done, 2 with one message on stderr for bad input."""
    options = parse(sys.argv[1:])
    return_freed_memory()
    try:
        {"import": run_import, "export": run_export}[options.direction](options, Console(stderr=True))
    # messages of OSError contain the file name
    except (UserError, OSError) as error:
        print(f"convert_hf.py: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("convert_hf.py: stopped; the same command continues", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
