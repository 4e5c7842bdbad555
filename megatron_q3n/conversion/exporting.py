"""A checkpoint of any layout -> a Hugging Face folder that transformers, vLLM and SGLang load.

In bf16 nothing is rounded that training keeps in fp32 (A_log, dt_bias, the DeltaNet's norm) unless
bf16 holds it exactly, as it does after an import of bf16 weights: inference that reads a rounded
A_log disagrees with training. Readers take either format.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_q3n.checkpoint.folders import find
from megatron_q3n.checkpoint.integrity import Verify, damage, read
from megatron_q3n.config import ModelConfig, UserError
from megatron_q3n.conversion.importing import SIDE_FILES, Advance
from megatron_q3n.conversion.pieces import Piece, pieces
from megatron_q3n.conversion.torch_dist import SavedTensors
from megatron_q3n.conversion.unfinished import Note, Unfinished, plan_digest
from megatron_q3n.hf import Family, rules
from megatron_q3n.hf.model_config import to_published
from megatron_q3n.hf.rule import Shape
from megatron_q3n.hf.weights import (
    CONFIG,
    INDEX,
    VISION,
    PublishedWeights,
    Shard,
    ShardWriter,
    index_of,
    placed,
    plan_shards,
    read_json,
)


@dataclass(frozen=True)
class Export:
    """What to export, and how."""

    source: Path  # a checkpoint or a run directory
    output: Path
    family: Family
    dtype: torch.dtype = torch.bfloat16
    max_shard_bytes: int = 4_000_000_000
    like: Path | None = None  # a model folder to take tokenizer files and undecided fields from
    tokenizer: Path | None = None  # a folder to take tokenizer files from instead
    verify: Verify = "full"


def export_weights(export: Export, note: Note, advance: Advance) -> Path:
    """Write the folder, continuing an interrupted export of the same checkpoint; return the checkpoint.

    Raises: UserError if the checkpoint is damaged, if transformers has no form of its model, or if
    the output exists or does not fit the disk.
    """
    if export.tokenizer and not any((export.tokenizer / name).is_file() for name in SIDE_FILES):
        raise UserError(f"--tokenizer {export.tokenizer}: no tokenizer files (tokenizer.json, …) there.")
    checkpoint = find(export.source)
    model = _model(checkpoint)
    like = read_json(export.like / CONFIG) if export.like else None
    config = to_published(model, export.family, like) | {"dtype": _name(export.dtype)}
    if problems := damage(checkpoint, export.verify):
        raise UserError("\n".join([*problems, "The checkpoint is damaged; export another."]))
    saved, model_pieces = SavedTensors(checkpoint), list(pieces(model, export.family))
    for piece in model_pieces:
        for box in piece.boxes:
            saved.check(box)
    others = _others(export)
    tensors = _published(model, model_pieces, saved, export)
    tensors |= {name: (tuple(other.shape), other.dtype) for name, other in others.items()}
    shards = plan_shards(tensors, export.max_shard_bytes)
    total = sum(shard.num_bytes for shard in shards)
    task = {
        "export": str(checkpoint),
        "saved_at": read(checkpoint)["saved_at"],
        "config": config,
        "plan": plan_digest(shards),
    }
    with Unfinished(export.output, task, note) as unfinished:
        unfinished.require_space(total + total // 100)
        done = 0
        for shard in shards:
            if unfinished.finished(shard.name) is None:
                with unfinished.writing(shard.name) as (path, _):
                    for written in _write_shard(path, shard, model_pieces, saved, others):
                        advance(done + written, total)
            done += shard.num_bytes
            advance(done, total)
        _write_companions(unfinished.folder, config, shards, export)
        unfinished.publish()
    return checkpoint


def _model(checkpoint: Path) -> ModelConfig:
    section = read(checkpoint)["model"]
    try:
        return ModelConfig.model_validate(section)
    except ValueError as error:
        raise UserError(f"{checkpoint}: its model section is not understood: {error}") from None


def _published(
    model: ModelConfig, model_pieces: list[Piece], saved: SavedTensors, export: Export
) -> dict[str, tuple[Shape, torch.dtype]]:
    """Return every tensor to publish, with its shape and format."""
    wide = {
        name
        for piece in model_pieces
        if piece.is_float32 and export.dtype is not torch.float32
        for name in piece.rule.hf
        if name.endswith(export.family.float32) or not _fits(piece, saved, export.dtype)
    }
    tensors: dict[str, tuple[Shape, torch.dtype]] = {}
    for rule in rules(model, export.family):
        in_trunk = rule.stacked is not None and rule.stacked.startswith(export.family.prefix)
        if rule.stacked is not None and export.family.stacked_experts and in_trunk:
            tensors[rule.stacked] = rule.shape, export.dtype
        else:
            tensors |= {
                name: (shape, torch.float32 if name in wide else export.dtype) for name, shape in rule.hf.items()
            }
    return tensors


def _others(export: Export) -> dict[str, Tensor]:
    """Return the tensors of a multimodal model that are not ours, as views of the files to be like."""
    if not export.family.multimodal:
        return {}
    assert export.like is not None, "to_published refuses this"
    weights = PublishedWeights(export.like)
    return {name: weights[name] for name in weights if name.startswith(VISION)}


def _fits(piece: Piece, saved: SavedTensors, dtype: torch.dtype) -> bool:
    tensors = piece.rule.to_hf(piece.join([saved.read(box) for box in piece.boxes])).values()
    return all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in tensors)


def _write_shard(
    path: Path, shard: Shard, model_pieces: list[Piece], saved: SavedTensors, others: Mapping[str, Tensor]
) -> Iterator[int]:
    """Write a shard, yielding the bytes written so far."""
    writer = ShardWriter(path, shard)
    for name, tensor in others.items():
        writer.put(name, tensor)
    for piece in model_pieces:
        if not any(_is_in(shard, name) for name in piece.rule.hf):
            continue
        for name, tensor in piece.rule.to_hf(piece.join([saved.read(box) for box in piece.boxes])).items():
            writer.put(name, tensor)
        yield writer.num_written
    writer.close()


def _is_in(shard: Shard, name: str) -> bool:
    place = placed(name)
    return name in shard.slots or (place is not None and place.stack in shard.slots)


def _write_companions(folder: Path, config: dict[str, Any], shards: list[Shard], export: Export) -> None:
    """Write config.json and the index, and hand on the tokenizer's files."""
    for name, content in ((CONFIG, config), (INDEX, index_of(shards))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    for source in (export.like, export.tokenizer):
        for name in SIDE_FILES if source else ():
            if source and (source / name).is_file():
                shutil.copyfile(source / name, folder / name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
