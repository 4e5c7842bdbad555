"""Export of a checkpoint of any parallel layout to a Hugging Face folder for transformers, vLLM and SGLang.

A bf16 export writes the parameters that training holds in fp32 (A_log, dt_bias, DeltaNet's norm) in fp32, unless bf16
represents them exactly, as after an import of bf16 weights: inference with a rounded A_log differs from training.
transformers, vLLM and SGLang load both dtypes.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_q3n.checkpoint.folders import find
from megatron_q3n.checkpoint.integrity import Verify, find_damage, read_manifest
from megatron_q3n.config import ModelConfig, UserError
from megatron_q3n.conversion.importing import Advance
from megatron_q3n.conversion.published_tokenizer import PublishedTokenizer, has_tokenizer, published_tokenizer
from megatron_q3n.conversion.resumable_output import Note, ResumableOutput, plan_digest
from megatron_q3n.conversion.run_tokenizer import TokenizerSource, published_folders, run_tokenizer
from megatron_q3n.conversion.tensor_chunks import ChunkedMapping, chunked_mappings
from megatron_q3n.conversion.torch_dist import SavedTensors
from megatron_q3n.data.tokenizer import TOKENIZER_FILE
from megatron_q3n.hf import Family, param_mappings
from megatron_q3n.hf.param_mapping import Shape
from megatron_q3n.hf.published_config import to_published
from megatron_q3n.hf.weights import (
    CONFIG,
    INDEX,
    VISION,
    PublishedWeights,
    Shard,
    ShardWriter,
    expert_slice,
    index_of,
    plan_shards,
    read_json,
)


@dataclass(frozen=True)
class Export:
    """Options of an export.

    source: a checkpoint or a run directory. like: a model folder whose values of config.json that the model does not
    determine are used. tokenizer: None exports the tokenizer that the run trained with, or, of a checkpoint without a
    run directory, that of `like`.
    """

    source: Path
    output: Path
    family: Family
    dtype: torch.dtype = torch.bfloat16
    max_shard_bytes: int = 4_000_000_000
    like: Path | None = None
    tokenizer: TokenizerSource | None = None
    verify: Verify = "full"


def export_weights(export: Export, note: Note, advance: Advance) -> Path:
    """Write the folder, resuming an interrupted export of the same checkpoint; return the checkpoint's path.

    Raises: UserError if the checkpoint is damaged, transformers does not support its model, or the output exists or
        exceeds the free disk space.
    """
    checkpoint = find(export.source)
    model = _model(checkpoint)
    tokenizer = _tokenizer(export, checkpoint, model, note)
    config = _config(export, model, tokenizer)
    if problems := find_damage(checkpoint, export.verify):
        raise UserError("\n".join([*problems, "The checkpoint is damaged; export another checkpoint."]))
    saved, chunked_model = SavedTensors(checkpoint), list(chunked_mappings(model, export.family))
    for chunked in chunked_model:
        for chunk in chunked.chunks:
            saved.check(chunk)
    vision = _vision_tensors(export)
    tensors = _published(model, chunked_model, saved, export)
    tensors |= {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in vision.items()}
    shards = plan_shards(tensors, export.max_shard_bytes)
    total = sum(shard.num_bytes for shard in shards)
    task = {
        "export": str(checkpoint),
        "saved_at": read_manifest(checkpoint)["saved_at"],
        "config": config,
        "plan": plan_digest(shards),
    }
    with ResumableOutput(export.output, task, note) as output_files:
        output_files.require_space(total + total // 100)
        done = 0
        for shard in shards:
            if output_files.finished(shard.name) is None:
                with output_files.writing(shard.name) as (path, _):
                    for written in _write_shard(path, shard, chunked_model, saved, vision):
                        advance(done + written, total)
            done += shard.num_bytes
            advance(done, total)
        _write_companions(output_files.folder, config, shards, tokenizer)
        output_files.publish()
    return checkpoint


def _model(checkpoint: Path) -> ModelConfig:
    section = read_manifest(checkpoint)["model"]
    try:
        return ModelConfig.model_validate(section)
    except ValueError as error:
        raise UserError(f"{checkpoint}: its model section is invalid: {error}") from None


def _tokenizer(export: Export, checkpoint: Path, model: ModelConfig, note: Note) -> PublishedTokenizer | None:
    """Return the tokenizer to export: the given one, the run's, or that of `like`; None if there is none."""
    source = export.tokenizer or _run_tokenizer(checkpoint)
    if source is None and export.like and (export.like / TOKENIZER_FILE).is_file():
        source = TokenizerSource(export.like)
    if source is None:
        note(f"{checkpoint} is not in a run directory: exporting without a tokenizer; --tokenizer FOLDER adds one")
        return None
    companions = [*([export.like] if export.like else []), *published_folders(checkpoint)]
    tokenizer = published_tokenizer(source, companions, model.max_position_embeddings)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"tokenizer {source.path} has {tokenizer.vocab_size} tokens, more than the model's vocabulary of "
            f"{model.vocab_size}; give --tokenizer with the one that the model was trained with."
        )
    return tokenizer


def _run_tokenizer(checkpoint: Path) -> TokenizerSource | None:
    try:
        return run_tokenizer(checkpoint)
    except UserError as error:
        raise UserError(
            f"the tokenizer of the run cannot be read: {error} Or give its tokenizer with --tokenizer FOLDER."
        ) from None


def _config(export: Export, model: ModelConfig, tokenizer: PublishedTokenizer | None) -> dict[str, Any]:
    """Return the content of config.json."""
    like = read_json(export.like / CONFIG) if export.like else None
    token_ids = tokenizer.token_ids if tokenizer else None
    if tokenizer and export.like and not tokenizer.is_chat_format and has_tokenizer(export.like, tokenizer.fingerprint):
        # the released values, which may stop at fewer tokens than generation_config.json
        token_ids = None
    config = to_published(model, export.family, like, token_ids)
    return config | {"dtype": _name(export.dtype)}


def _published(
    model: ModelConfig, chunked_model: list[ChunkedMapping], saved: SavedTensors, export: Export
) -> dict[str, tuple[Shape, torch.dtype]]:
    """Return the shape and dtype of every tensor to write."""
    fp32_names = {
        name
        for chunked in chunked_model
        if chunked.is_float32 and export.dtype is not torch.float32
        for name in chunked.mapping.hf
        if name.endswith(export.family.float32) or not _is_exact(chunked, saved, export.dtype)
    }
    tensors: dict[str, tuple[Shape, torch.dtype]] = {}
    for mapping in param_mappings(model, export.family):
        in_trunk = mapping.stacked is not None and mapping.stacked.startswith(export.family.prefix)
        if mapping.stacked is not None and export.family.stacked_experts and in_trunk:
            tensors[mapping.stacked] = mapping.shape, export.dtype
        else:
            tensors |= {
                name: (shape, torch.float32 if name in fp32_names else export.dtype)
                for name, shape in mapping.hf.items()
            }
    return tensors


def _vision_tensors(export: Export) -> dict[str, Tensor]:
    """Return the vision part of a multimodal model, as views of the files of `export.like`."""
    if not export.family.multimodal:
        return {}
    assert export.like is not None, "checked by to_published"
    weights = PublishedWeights(export.like)
    return {name: weights[name] for name in weights if name.startswith(VISION)}


def _is_exact(chunked: ChunkedMapping, saved: SavedTensors, dtype: torch.dtype) -> bool:
    """Return whether the mapping's tensors have an exact representation in `dtype`."""
    tensors = chunked.mapping.to_hf(chunked.join([saved.read(chunk) for chunk in chunked.chunks])).values()
    return all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in tensors)


def _write_shard(
    path: Path, shard: Shard, chunked_model: list[ChunkedMapping], saved: SavedTensors, vision: Mapping[str, Tensor]
) -> Iterator[int]:
    """Write a shard, yielding the bytes written so far."""
    writer = ShardWriter(path, shard)
    for name, tensor in vision.items():
        writer.put(name, tensor)
    for chunked in chunked_model:
        if not any(_is_in(shard, name) for name in chunked.mapping.hf):
            continue
        for name, tensor in chunked.mapping.to_hf(
            chunked.join([saved.read(chunk) for chunk in chunked.chunks])
        ).items():
            writer.put(name, tensor)
        yield writer.num_written
    writer.close()


def _is_in(shard: Shard, name: str) -> bool:
    expert = expert_slice(name)
    return name in shard.slots or (expert is not None and expert.stack in shard.slots)


def _write_companions(
    folder: Path, config: dict[str, Any], shards: list[Shard], tokenizer: PublishedTokenizer | None
) -> None:
    """Write config.json, the index, and the tokenizer files."""
    for name, content in ((CONFIG, config), (INDEX, index_of(shards))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.write(folder)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
