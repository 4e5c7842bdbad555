#!/usr/bin/env python3
"""Data preparation: text to a folder of tokens for training, and verification of such a folder.

torch is not imported: worker processes import this file, and wrong input must be refused immediately.
"""

import argparse
import sys
from pathlib import Path

from megatron_q3n.config import EXIT_BAD_INPUT, UserError
from megatron_q3n.data.manifest import Manifest, verify_prepared
from megatron_q3n.data.prepare import Preparation, prepare
from megatron_q3n.data.sources import FORMATS

EXAMPLES = """examples:
  tools/prepare_data.py corpus/*.jsonl.zst --output data/web --tokenizer Qwen3-tokenizer/
  tools/prepare_data.py notes/ book.txt.gz --output data/mine --train-tokenizer 4096
  tools/prepare_data.py part.parquet --column content --output data/code --tokenizer tokenizer.json
  tools/prepare_data.py notes/ --output data/notes --train-tokenizer 4096 --validation-percent 2
  tools/prepare_data.py saved_dataset/train --output data/train --tokenizer data/code
  tools/prepare_data.py verify data/web --full

Then train on it:
  python -m megatron_q3n.train --config-name pretrain-tiny data.source=blend \\
      'data.train=[{path: data/web, weight: 3}, {path: data/code}]' 'data.validation=[{path: data/held_out}]'
"""


def prepare_parser() -> argparse.ArgumentParser:
    """Return the parser of a preparation."""
    parser = argparse.ArgumentParser(
        prog="prepare_data.py",
        description="Tokenize text, JSONL, parquet and Hugging Face datasets (save_to_disk folders), text\n"
        "and JSONL also as .gz or .zst, into a folder for training. A text file, JSON line or\n"
        "table row is one document. `prepare_data.py verify FOLDER` checks such a folder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="file, folder or 'glob'; folders are searched")
    add("--output", type=Path, required=True, help="folder to write; created when complete")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", type=Path, help="tokenizer.json, or a folder that holds one")
    which.add_argument("--train-tokenizer", type=int, metavar="N", help="train a BPE of N tokens on the input")
    add(
        "--tokenizer-sample-mib",
        type=positive,
        default=256,
        metavar="MIB",
        help="with --train-tokenizer: text from the start of the input to train on (%(default)s)",
    )
    add("--eod-token", metavar="NAME", help="the token that ends a document, if it has an unknown name")
    add("--column", default="text", help="field of JSONL, parquet and datasets (%(default)s)")
    add("--format", choices=FORMATS, help="format of files with an unknown extension")
    add("--workers", type=positive, default=0, help="worker processes (one per core)")
    add(
        "--validation-percent",
        type=percent,
        default=0.0,
        metavar="P",
        help="hold out P %% of the documents, by the hash of their text: writes OUTPUT/train and OUTPUT/validation",
    )
    add(
        "--max-bad-lines",
        type=positive,
        default=0,
        metavar="N",
        help="skip up to N lines that cannot be read, and name them (the first one ends the preparation)",
    )
    add("--force", action="store_true", help="replace a prepared folder at --output")
    add("--quiet", action="store_true", help="no progress: neither bar nor, outside a terminal, lines")
    return parser


def verify_parser() -> argparse.ArgumentParser:
    """Return the parser of a verification."""
    parser = argparse.ArgumentParser(
        prog="prepare_data.py verify", description="Check a prepared folder against its manifest."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full", action="store_true", help="hash every byte, not only sizes and counts")
    return parser


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def percent(text: str) -> float:
    """Parse a number above 0 and below 50."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 50:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below 50")
    return value


def describe(folder: Path, manifest: Manifest) -> str:
    """Return a line that describes a prepared folder."""
    bad = f", {manifest.num_bad_lines} bad lines" if manifest.num_bad_lines else ""
    return (
        f"{folder}: {manifest.num_documents} documents, {manifest.num_tokens} tokens of "
        f"{manifest.text_bytes} bytes of text ({manifest.num_skipped_empty} empty ones{bad} left out), tokenizer "
        f"{manifest.tokenizer.fingerprint[:12]}… with {manifest.tokenizer.vocab_size} entries"
    )


def run(arguments: list[str]) -> str:
    """Run the command line and return the lines to print."""
    if arguments[:1] == ["verify"]:
        options = verify_parser().parse_args(arguments[1:])
        manifest = verify_prepared(options.folder, full_hash=options.full)
        return f"complete. {describe(options.folder, manifest)}"
    options = prepare_parser().parse_args(arguments)
    quiet = options.__dict__.pop("quiet")
    inputs = tuple(options.__dict__.pop("inputs"))
    prepared = prepare(Preparation(inputs=inputs, show_progress=not quiet, **vars(options)))
    folders = [describe(folder, manifest) for folder, manifest in prepared.manifests.items()]
    return "\n".join([*folders, *prepared.left_out.lines()])


def main() -> int:
    """Run; 0 when done, 2 with one message on stderr for bad input."""
    try:
        print(run(sys.argv[1:]))
    except UserError as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
