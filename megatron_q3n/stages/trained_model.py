"""Trained model for inference: configuration, tokenizer and weights from a checkpoint and its run directory."""

from pathlib import Path
from typing import Any

from megatron_q3n import checkpoint
from megatron_q3n.checkpoint import integrity
from megatron_q3n.checkpoint.weights import load_weights
from megatron_q3n.config import ModelConfig, RunConfig, UserError, validate
from megatron_q3n.config.data import DataConfig
from megatron_q3n.config.plain_yaml import read_mapping
from megatron_q3n.conversion.importing import KEPT
from megatron_q3n.conversion.run_tokenizer import run_tokenizer
from megatron_q3n.data.tokenizer import TOKENIZER_FILE, TextTokenizer
from megatron_q3n.device import Device
from megatron_q3n.kernels.startup.qualification import qualify
from megatron_q3n.model.build import build_model
from megatron_q3n.model.transformer_config import compute_dtype
from megatron_q3n.parallel import Parallel
from megatron_q3n.run_directory import CONFIG

# the data settings that select the text, without those of layout and caching
TEXT_SETTINGS = (
    "source",
    "stdlib_vocab_size",
    "stdlib_validation_percent",
    "stdlib_packages",
    "train",
    "validation",
    "tokenizer",
)


def with_checkpoint_model(source: Path, config: RunConfig) -> RunConfig:
    """Return the configuration with the checkpoint's model, overridden by this configuration's non-default settings.

    Raises: UserError if the two are not compatible.
    """
    current, defaults = config.model.model_dump(mode="json"), ModelConfig().model_dump(mode="json")
    overrides = {name: value for name, value in current.items() if value != defaults[name]}
    saved = integrity.read_manifest(source)["model"]
    return validate(config.model_dump(mode="json") | {"model": saved | overrides})


def with_checkpoint_data(source: Path, config: RunConfig) -> RunConfig:
    """Return the configuration with the data of the checkpoint's run, unless it sets data of its own.

    The tokenizer belongs to the data: the default one would be rejected for any other run.
    """
    run_config = source.parent.parent / CONFIG
    current = config.data.model_dump(mode="json")
    defaults = DataConfig().model_dump(mode="json")
    if not run_config.is_file() or any(current[name] != defaults[name] for name in TEXT_SETTINGS):
        return config
    section = read_mapping(run_config).get("data")
    if not isinstance(section, dict):
        raise UserError(f"{run_config} has no section data, which says what the model was trained on; set data.* here.")
    run = defaults | section
    data = current | {name: run[name] for name in TEXT_SETTINGS}
    return validate(config.model_dump(mode="json") | {"data": data})


def load_model(source: Path, config: RunConfig, device: Device, group: Parallel) -> Any:
    """Build the model on this rank and load its weights. A collective call."""
    qualify(config, device.torch_device, compute_dtype(config))
    chunks = build_model(config, device.model_backend, group.groups)
    for chunk in chunks:
        chunk.to(device.torch_device)
    load_weights(chunks, config, group, source)
    return chunks[0]


def checkpoint_tokenizer(source: Path, setting: str | None) -> TextTokenizer:
    """Return the tokenizer that a checkpoint's model was trained with, or the one of the setting.

    Raises: UserError if it cannot be found.
    """
    if setting is not None:
        return TextTokenizer.load(setting)
    found = run_tokenizer(source)
    if found is None:
        raise UserError(
            f"{source} is not in a run directory and has no {KEPT}/{TOKENIZER_FILE}: set its tokenizer "
            "with inference.tokenizer=FOLDER."
        )
    return TextTokenizer.load(found.path, found.eod_token)


def find_checkpoint(config: RunConfig) -> Path:
    """Return the folder of the checkpoint that `checkpoint.load` names."""
    assert config.checkpoint.load is not None, "RunConfig validates it"
    return checkpoint.find(config.checkpoint.load)
