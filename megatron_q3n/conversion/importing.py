"""Import of a Hugging Face folder into a checkpoint that every parallel layout loads.

The checkpoint has step 0 and no optimizer state: training starts from it with `checkpoint.load`. Dtypes are those of
the source (usually bf16), except for parameters that checkpoints always hold in fp32. The checkpoint also contains
`model/imported.yaml`, the matching model section as a recipe part, and `huggingface/`, the source's configuration and
tokenizer files, for a later export.
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

from megatron_q3n.checkpoint.integrity import write_manifest
from megatron_q3n.config import ModelConfig, UserError
from megatron_q3n.conversion.resumable_output import Note, ResumableOutput, plan_digest
from megatron_q3n.conversion.tensor_chunks import ChunkedMapping, TensorChunk, chunked_mappings, initial_router_state
from megatron_q3n.conversion.torch_dist import Record, write_data, write_metadata
from megatron_q3n.hf import QWEN3_5_MOE, QWEN3_NEXT, Family, param_mappings
from megatron_q3n.hf.model_config import from_published
from megatron_q3n.hf.model_mapping import HEAD
from megatron_q3n.hf.weights import CONFIG, VISION, PublishedWeights, read_json

# size of a data file: the work that an interruption loses at most
FILE_BYTES = 2 * 2**30
KEPT, MODEL_PART = "huggingface", "imported"
# files of a model folder besides weights and config.json, copied by imports and exports
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
# progress callback: bytes done, bytes in total
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Imported:
    """Result of an import; `num_left_out` counts the tensors of the vision part, which are not imported."""

    checkpoint: Path
    model: ModelConfig
    num_left_out: int


def import_weights(source: Path, output: Path, note: Note, advance: Advance) -> Imported:
    """Write the checkpoint, resuming an interrupted import of the same source.

    Raises: UserError if the source is incomplete, damaged, or an unsupported model, or if the output exists or exceeds
        the free disk space.
    """
    weights = PublishedWeights(source)
    model, family = from_published(read_json(source / CONFIG), has_mtp="mtp.fc.weight" in weights)
    family = _with_prefix_of(family, weights)
    _check_counts(model, weights)
    weights.check(param_mappings(model, family), ignored={HEAD} if family.tied_embeddings else ())
    if family.tied_embeddings:
        note("the source has one tensor for embedding and head; here the head is a copy, which training changes")
    groups = _groups(list(chunked_mappings(model, family)), weights)
    total = sum(size for group in groups for _, size in group)
    task = {
        "import": str(source.resolve()),
        "files": weights.sizes_bytes(),
        "changed": {name: (source / name).stat().st_mtime_ns for name in weights.sizes_bytes()},
        "model": model.model_dump(mode="json"),
        "plan": plan_digest([chunk for chunked, _ in group for chunk in chunked.chunks] for group in groups),
    }
    with ResumableOutput(output, task, note) as output_files:
        output_files.require_space(total + total // 100)
        files: dict[str, list[Record]] = {}
        done = 0
        for number, group in enumerate(groups):
            name = f"__{number}_0.distcp"
            if output_files.finished(name) is None:
                with output_files.writing(name) as (path, facts):
                    chunks = _boxes(group, weights, partial(_advance_from, advance, done, total))
                    facts["records"] = [record.as_json() for record in write_data(path, chunks)]
            facts = output_files.finished(name) or {}
            files[name] = [Record.from_json(record) for record in facts["records"]]
            done += sum(size for _, size in group)
            advance(done, total)
        state = "__state_0.distcp"
        files[state] = write_data(output_files.folder / state, initial_router_state(model, family))
        write_metadata(output_files.folder, files)
        _write_companions(source, output_files.folder, model)
        write_manifest(output_files.folder, _description(source, model), known=output_files.digests)
        output_files.publish()
    left_out = sum(name.startswith(VISION) for name in weights)
    return Imported(output, model, left_out)


def _with_prefix_of(family: Family, weights: PublishedWeights) -> Family:
    """Return the family with this folder's prefix: text-only copies have the multimodal prefix or the short one."""
    prefixes = (QWEN3_5_MOE.prefix, QWEN3_NEXT.prefix)
    used = [prefix for prefix in prefixes if any(name.startswith(prefix) for name in weights)]
    return replace(family, prefix=used[0]) if used else family


def _check_counts(model: ModelConfig, weights: PublishedWeights) -> None:
    """Refuse more layers and experts than the files can have, before their parameters are listed."""
    has_stacks = any(name.endswith(".experts.gate_up_proj") for name in weights)
    if model.num_layers * (1 if has_stacks else model.num_moe_experts) > len(weights):
        raise UserError(
            f"{CONFIG} describes {model.num_layers} layers of {model.num_moe_experts} experts, and the files of "
            f"{weights.folder} have {len(weights)} tensors. The two are not of one model; download them again."
        )


def _groups(model: list[ChunkedMapping], weights: PublishedWeights) -> list[list[tuple[ChunkedMapping, int]]]:
    """Distribute the mappings over data files of FILE_BYTES, in order, each with its size in bytes."""
    groups: list[list[tuple[ChunkedMapping, int]]] = [[]]
    filled = 0
    for chunked in model:
        size = sum(weights[name].nbytes for name in chunked.mapping.hf)
        if groups[-1] and filled + size > FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append((chunked, size))
        filled += size
    return groups


def _advance_from(advance: Advance, base: int, total: int, done: int) -> None:
    advance(base + done, total)


def _boxes(
    group: list[tuple[ChunkedMapping, int]], weights: PublishedWeights, advance: Callable[[int], None]
) -> Iterator[tuple[TensorChunk, Tensor]]:
    done = 0
    for chunked, size in group:
        tensor = chunked.mapping.to_megatron({name: weights[name] for name in chunked.mapping.hf})
        yield from chunked.cut(tensor.float() if chunked.is_float32 else tensor)
        done += size
        advance(done)


def _write_companions(source: Path, folder: Path, model: ModelConfig) -> None:
    """Write the model section as a recipe part, and copy the configuration and tokenizer files for a later export."""
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
