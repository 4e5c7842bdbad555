"""Hugging Face folder -> a checkpoint that any layout loads.

The checkpoint is of step 0 and without optimizer state: training starts from it with
`checkpoint.load`. Formats are kept as published (bf16 as a rule), but for what checkpoints keep in
fp32 always. Beside the weights lie `model/imported.yaml`, the matching model section as a recipe
part, and `huggingface/`, the published configuration and tokenizer, for the way back.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from megatron_q3n.checkpoint.integrity import seal
from megatron_q3n.config import ModelConfig
from megatron_q3n.conversion.pieces import Box, Piece, fresh_state, pieces
from megatron_q3n.conversion.torch_dist import Record, write_data, write_metadata
from megatron_q3n.conversion.unfinished import Note, Unfinished, plan_digest
from megatron_q3n.hf import QWEN3_5_MOE, QWEN3_NEXT, Family, rules
from megatron_q3n.hf.model_config import from_published
from megatron_q3n.hf.weights import CONFIG, VISION, PublishedWeights, read_json

FILE_BYTES = 2 * 2**30  # of a data file: what an interruption costs at most
KEPT, MODEL_PART = "huggingface", "imported"
# what a model folder holds beside weights and config.json, and an export can hand on
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
Advance = Callable[[int, int], None]  # bytes done, of


@dataclass(frozen=True)
class Imported:
    """What came of an import."""

    checkpoint: Path
    model: ModelConfig
    num_left_out: int  # tensors of the vision tower


def import_weights(source: Path, output: Path, note: Note, advance: Advance) -> Imported:
    """Write the checkpoint, continuing an interrupted import of the same source.

    Raises: UserError if the source is incomplete, damaged, or a model that ours cannot represent,
    or if the output exists or does not fit the disk.
    """
    weights = PublishedWeights(source)
    model, family = from_published(read_json(source / CONFIG), has_mtp="mtp.fc.weight" in weights)
    family = _as_named(family, weights)
    weights.check(rules(model, family))
    groups = _groups(list(pieces(model, family)), weights)
    total = sum(size for group in groups for _, size in group)
    task = {
        "import": str(source.resolve()),
        "files": weights.sizes_bytes(),
        "changed": {name: (source / name).stat().st_mtime_ns for name in weights.sizes_bytes()},
        "model": model.model_dump(mode="json"),
        "plan": plan_digest([box for piece, _ in group for box in piece.boxes] for group in groups),
    }
    with Unfinished(output, task, note) as unfinished:
        unfinished.require_space(total + total // 100)
        files: dict[str, list[Record]] = {}
        done = 0
        for number, group in enumerate(groups):
            name = f"__{number}_0.distcp"
            if unfinished.finished(name) is None:
                with unfinished.writing(name) as (path, facts):
                    boxes = _boxes(group, weights, partial(_advance_from, advance, done, total))
                    facts["records"] = [record.as_json() for record in write_data(path, boxes)]
            noted = unfinished.finished(name) or {}
            files[name] = [Record.from_json(record) for record in noted["records"]]
            done += sum(size for _, size in group)
            advance(done, total)
        state = "__state_0.distcp"
        files[state] = write_data(unfinished.folder / state, fresh_state(model, family))
        write_metadata(unfinished.folder, files)
        _write_companions(source, unfinished.folder, model)
        seal(unfinished.folder, _description(source, model), known=unfinished.digests)
        unfinished.publish()
    left_out = sum(name.startswith(VISION) for name in weights)
    return Imported(output, model, left_out)


def _as_named(family: Family, weights: PublishedWeights) -> Family:
    """Take the prefix that this folder uses: text-only copies keep or lose the multimodal one."""
    prefixes = (QWEN3_5_MOE.prefix, QWEN3_NEXT.prefix)
    used = [prefix for prefix in prefixes if any(name.startswith(prefix) for name in weights)]
    return replace(family, prefix=used[0]) if used else family


def _groups(model: list[Piece], weights: PublishedWeights) -> list[list[tuple[Piece, int]]]:
    """Share the pieces out over data files, in order, each with its size in bytes."""
    groups: list[list[tuple[Piece, int]]] = [[]]
    filled = 0
    for piece in model:
        size = sum(weights[name].nbytes for name in piece.rule.hf)
        if groups[-1] and filled + size > FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append((piece, size))
        filled += size
    return groups


def _advance_from(advance: Advance, base: int, total: int, done: int) -> None:
    advance(base + done, total)


def _boxes(
    group: list[tuple[Piece, int]], weights: PublishedWeights, advance: Callable[[int], None]
) -> Iterator[tuple[Box, Tensor]]:
    done = 0
    for piece, size in group:
        tensor = piece.rule.to_megatron({name: weights[name] for name in piece.rule.hf})
        yield from piece.cut(tensor.float() if piece.is_float32 else tensor)
        done += size
        advance(done)


def _write_companions(source: Path, folder: Path, model: ModelConfig) -> None:
    """Write the model section as a recipe part, and keep what an export will want back."""
    (folder / "model").mkdir(exist_ok=True)
    defaults = ModelConfig().model_dump(mode="json")
    section = {k: v for k, v in model.model_dump(mode="json").items() if v != defaults[k]}
    text = yaml.safe_dump(section, sort_keys=False)
    (folder / "model" / f"{MODEL_PART}.yaml").write_text(f"# The model of {source.name}.\n{text}")
    (folder / KEPT).mkdir(exist_ok=True)
    for name in (CONFIG, *SIDE_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / KEPT / name)


def _description(source: Path, model: ModelConfig) -> dict[str, Any]:
    return {
        "step": 0,
        "tokens": 0,
        "skipped_steps": 0,
        "world_size": 1,
        "saved_at": time.time(),
        "model": model.model_dump(mode="json"),
        "imported_from": str(source.resolve()),
    }
