"""A trained model to use and not to train: configuration, tokenizer and weights, from its checkpoint and beside it."""

from pathlib import Path
from typing import Any

import yaml

from megatron_q3n import checkpoint
from megatron_q3n.checkpoint import integrity
from megatron_q3n.checkpoint.weights import load_weights
from megatron_q3n.config import ModelConfig, RunConfig, UserError, validate
from megatron_q3n.config.data import DataConfig
from megatron_q3n.conversion.importing import KEPT
from megatron_q3n.data.manifest import verify_prepared
from megatron_q3n.data.stdlib import corpus_of
from megatron_q3n.data.tokenizer import TOKENIZER_FILE, TextTokenizer
from megatron_q3n.device import Device
from megatron_q3n.kernels.startup.qualification import qualify
from megatron_q3n.model.build import build_model, compute_dtype
from megatron_q3n.parallel import Parallel
from megatron_q3n.run_directory import CONFIG, TOKENIZER_FOLDER

# what says which text a run reads; how it is laid out and cached is another matter
TEXT = (
    "source",
    "stdlib_vocab_size",
    "stdlib_validation_percent",
    "stdlib_packages",
    "train",
    "validation",
    "tokenizer",
)


def with_model_of(source: Path, config: RunConfig) -> RunConfig:
    """Return the configuration with the checkpoint's model, and this one's own model settings laid over it.

    Raises: UserError if the two do not go together.
    """
    own, defaults = config.model.model_dump(mode="json"), ModelConfig().model_dump(mode="json")
    chosen = {name: value for name, value in own.items() if value != defaults[name]}
    saved = integrity.read(source)["model"]
    return validate(config.model_dump(mode="json") | {"model": saved | chosen})


def with_text_of(source: Path, config: RunConfig) -> RunConfig:
    """Return the configuration with the text that the checkpoint's run held out, where this one names none.

    A tokenizer goes with its text, so that of the defaults would be refused for any other run.
    """
    run_config = source.parent.parent / CONFIG
    ours = config.data.model_dump(mode="json")
    defaults = DataConfig().model_dump(mode="json")
    if not run_config.is_file() or any(ours[name] != defaults[name] for name in TEXT):
        return config
    run = defaults | yaml.safe_load(run_config.read_text())["data"]
    data = ours | {name: run[name] for name in TEXT}
    return validate(config.model_dump(mode="json") | {"data": data})


def load_model(source: Path, config: RunConfig, device: Device, group: Parallel) -> Any:
    """Build the model on this rank and load its weights."""
    qualify(config, device.torch_device, compute_dtype(config))
    chunks = build_model(config, device.model_backend, group.groups)
    for chunk in chunks:
        chunk.to(device.torch_device)
    load_weights(chunks, config, group, source)
    return chunks[0]


def tokenizer_of(source: Path, setting: str | None) -> TextTokenizer:
    """Return the tokenizer a checkpoint's model was trained with, or the one that is set.

    Raises: UserError if it cannot be found from here.
    """
    if setting is not None:
        return TextTokenizer.load(setting)
    if (source / KEPT / TOKENIZER_FILE).is_file():
        return TextTokenizer.load(source / KEPT)
    run_dir = source.parent.parent
    if (run_dir / TOKENIZER_FOLDER / TOKENIZER_FILE).is_file():
        return TextTokenizer.load(run_dir / TOKENIZER_FOLDER)
    run_config = run_dir / CONFIG
    if not run_config.is_file():
        raise UserError(
            f"{source} lies in no run directory and holds no {KEPT}/{TOKENIZER_FILE}: name its tokenizer "
            "with inference.tokenizer=FOLDER."
        )
    data = yaml.safe_load(run_config.read_text())["data"]
    if data["tokenizer"] is not None:
        return TextTokenizer.load(data["tokenizer"])
    if data["source"] == "stdlib":
        return TextTokenizer.load(corpus_of(DataConfig.model_validate(data)).train)
    folder = data["train"][0]["path"]
    return TextTokenizer.load(folder, verify_prepared(folder).tokenizer.eod_token)


def find(config: RunConfig) -> Path:
    """Return the checkpoint that `checkpoint.load` means."""
    assert config.checkpoint.load is not None, "the configuration asks for it"
    return checkpoint.find(config.checkpoint.load)
