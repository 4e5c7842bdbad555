#!/usr/bin/env python
"""Inspection of a checkpoint: origin, contents, integrity, and differences from another one.

tools/inspect_checkpoint.py runs/latest
tools/inspect_checkpoint.py runs/latest/checkpoints/step_0000200 --tensors --verify
tools/inspect_checkpoint.py runs/a --diff runs/b
"""

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_q3n.checkpoint import find, integrity
from megatron_q3n.checkpoint.saved_tensors import CheckpointTensors, TensorEntry
from megatron_q3n.config import EXIT_BAD_INPUT, UserError

PARALLEL = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "virtual_pipeline_model_parallel_size": "VPP",
    "context_parallel_size": "CP",
    "expert_model_parallel_size": "EP",
    "expert_tensor_parallel_size": "expert TP",
}


def main() -> int:
    """Print the requested parts. Returns: 0, or 2 for a path that is not an intact checkpoint."""
    arguments = _parse()
    console = Console(highlight=False)
    try:
        checkpoint = find(arguments.path)
        description = integrity.read_manifest(checkpoint)
        # before anything is unpickled
        verdict = verified(checkpoint, description) if arguments.verify else ""
        tensors = CheckpointTensors(checkpoint)
        console.print(summary(checkpoint, description, tensors))
        if verdict:
            console.print(verdict)
        if arguments.tensors:
            show_tensors(console, tensors)
        if arguments.diff:
            other = find(arguments.diff)
            compare(console, description, tensors, integrity.read_manifest(other), CheckpointTensors(other))
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def summary(checkpoint: Path, description: dict[str, Any], tensors: CheckpointTensors) -> Table:
    """Return a table of the checkpoint's description."""
    model, entries = description["model"], tensors.entries.values()
    weights = [entry for entry in entries if not entry.is_optimizer]
    optimizer = [entry for entry in entries if entry.is_optimizer]
    table = Table.grid(padding=(0, 2))
    rows = {
        "checkpoint": str(checkpoint),
        "step": f"{description['step']:,}, after {description.get('tokens', 0):,} tokens",
        "saved": _date(description.get("saved_at", 0)),
        "model": f"{model.get('name')}: {model.get('num_layers')} layers, width {model.get('hidden_size')}, "
        f"{model.get('num_moe_experts')} experts, vocabulary {model.get('vocab_size')}",
        "written by": _layout(description),
        "weights": _amount(weights),
        "optimizer": _amount(optimizer) if optimizer else "none: weights only",
        "files": f"{len(description['files']) + 1}, {_size(sum(description['files'].values()))}",
        "digests": f"{description['digest_algorithm']} of every file; --verify compares them"
        if integrity.has_digests(description)
        else "none: only sizes can be verified",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def verified(checkpoint: Path, description: dict[str, Any]) -> str:
    """Read every byte and return a line that confirms it.

    Raises: UserError with the damaged files.
    """
    started = time.perf_counter()
    problems = integrity.find_damage(checkpoint, "full")
    seconds = time.perf_counter() - started
    if problems:
        raise UserError("damaged: " + "\n".join(problems))
    size = sum(description["files"].values())
    checked = "contents" if integrity.has_digests(description) else "sizes"
    return f"\nverified: the {checked} of all files are as saved ({_size(size)} in {seconds:.1f} s)"


def show_tensors(console: Console, tensors: CheckpointTensors) -> None:
    """Print two lines for each tensor, as it is read."""
    for entry in tensors.entries.values():
        statistics = tensors.statistics(entry.name)
        console.print(
            f"\n{entry.name}\n  {_kind(entry):<30} min {statistics.minimum:<11.4g} max {statistics.maximum:<11.4g} "
            f"norm {statistics.norm:.5g}{'' if statistics.finite else '  NOT FINITE'}",
            soft_wrap=True,
        )


def compare(
    console: Console,
    description: dict[str, Any],
    tensors: CheckpointTensors,
    other_description: dict[str, Any],
    other: CheckpointTensors,
) -> None:
    """Print the differences: settings, names, shapes, and values with the relative norm of their difference."""
    console.print(f"\nagainst step {other_description['step']:,}, {_layout(other_description)}")
    here, there = description["model"], other_description["model"]
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            console.print(f"  model.{name}: {here.get(name)} here, {there.get(name)} there")
    equal = 0
    for name in sorted(tensors.entries.keys() | other.entries.keys()):
        verdict = _difference(name, tensors, other)
        equal += not verdict
        if verdict:
            console.print(f"\n{name}\n  {verdict}", soft_wrap=True)
    console.print(f"\n{equal} of {len(tensors.entries.keys() | other.entries.keys())} tensors are equal bit for bit")


def _difference(name: str, tensors: CheckpointTensors, other: CheckpointTensors) -> str:
    """Return how a tensor differs; an empty string if all bits are equal."""
    here, there = tensors.entries.get(name), other.entries.get(name)
    if here is None or there is None:
        return "only " + ("there" if here is None else "here")
    if (here.shape, here.dtype) != (there.shape, there.dtype):
        return f"{_kind(here)} here, {_kind(there)} there"
    a, b = tensors.read(name), other.read(name)
    if a.equal(b):
        return ""
    gap = a.double() - b.double()
    relative = (gap.norm() / a.double().norm().clamp_min(1e-300)).item()
    return f"{_kind(here):<30} max |difference| {gap.abs().max().item():<11.4g} relative norm {relative:.3g}"


def _date(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):
        return f"{seconds} seconds after 1970: no date"


def _kind(entry: TensorEntry) -> str:
    shape = "×".join(map(str, entry.shape)) or "scalar"
    return f"{str(entry.dtype).removeprefix('torch.')} {shape}"


def _layout(description: dict[str, Any]) -> str:
    """Return the parallel layout that wrote the checkpoint; any other layout can read it."""
    sizes = description.get("layout", {})
    known = {name: size for name, size in sizes.items() if isinstance(size, int) and size > 1}
    parts = [f"{short} {known[name]}" for name, short in PARALLEL.items() if name in known]
    precision = description.get("precision", {}).get("compute")
    return ", ".join([f"{description['world_size']} process(es)", *parts, *([str(precision)] if precision else [])])


def _amount(entries: list[TensorEntry]) -> str:
    total = sum(entry.numel for entry in entries)
    return f"{len(entries)} tensors, {total / 1e6:,.2f} M numbers, {_size(sum(e.size_bytes for e in entries))}"


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path, help="a checkpoint, or a run directory for its newest")
    parser.add_argument("--tensors", action="store_true", help="print every tensor: shape, extremes, norm")
    parser.add_argument("--verify", action="store_true", help="read every byte, compare the digests")
    parser.add_argument("--diff", type=Path, metavar="OTHER", help="print the differences from this checkpoint")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
