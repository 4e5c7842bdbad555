"""Serve stage: OpenAI-compatible completions and chat of a checkpoint over HTTP.

One process, one model; for models that need several GPUs use vLLM or SGLang.
"""

import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from megatron_q3n import parallel
from megatron_q3n.checkpoint.weights import load_weights
from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.config.serve import ServeConfig, unused_inference_settings
from megatron_q3n.conversion.importing import import_weights
from megatron_q3n.device import select_device
from megatron_q3n.model.decode.protocols import DecodeModel
from megatron_q3n.parallel import Parallel
from megatron_q3n.server.build import ModelServer
from megatron_q3n.stages import chat_format, trained_model


def run(config: RunConfig, run_dir: Path) -> int:
    """Serve until interrupted; the address is the first line of standard output. There is no run directory.

    Returns: 0; 1 if the generation ended by an error.
    """
    _check(config)
    api_key = _api_key(config.serve)
    source = trained_model.find_checkpoint(config)
    config = trained_model.with_checkpoint_model(source, config)
    tokenizer, template = chat_format.load_chat_format(config, run_dir)
    device = select_device(config)
    group = parallel.initialize(config, device)
    model = trained_model.load_model(source, config, device, group)
    load = partial(_load, model, config, group)
    server = ModelServer(model, tokenizer, template, load, config.serve, config.inference, api_key)
    print(f"serving http://{_bracketed(config.serve.host)}:{server.port}/v1", flush=True)
    try:
        server.run()
    except KeyboardInterrupt:
        print("stopped")
    parallel.shutdown()
    return 1 if server.thread.has_failed else 0


def _check(config: RunConfig) -> None:
    """Raises: UserError for settings that have no effect on a server, and layouts of several processes."""
    if unused := unused_inference_settings(config.inference):
        raise UserError(
            f"inference.{unused[0]} has no effect with stage=serve: it is a parameter of each request; remove it."
        )
    num_processes = max(config.world_size, config.parallel.model_parallel_size)
    if num_processes > 1:
        raise UserError(
            f"stage=serve runs in one process, found settings for {num_processes}; use parallel=single (a checkpoint "
            "loads in any layout), or vLLM or SGLang for models that need several GPUs."
        )


def _api_key(settings: ServeConfig) -> str | None:
    """Return the API key of the environment, if there is one; say what is open without it."""
    key = os.environ.get(settings.api_key_env)
    if key is not None and not key.strip():
        raise UserError(f"${settings.api_key_env} is empty: set it to a key, or unset it.")
    if key is None and settings.host not in ("127.0.0.1", "::1", "localhost"):
        print(
            f"warning: everyone who reaches serve.host={settings.host} can generate; for an API key set "
            f"${settings.api_key_env}.",
            file=sys.stderr,
        )
    return key.strip() if key else None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _load(model: DecodeModel, config: RunConfig, group: Parallel, folder: Path) -> None:
    """Load the weights of a Hugging Face folder into the model, through a temporary checkpoint."""
    temporary = Path(tempfile.mkdtemp(prefix="weights-"))
    try:
        imported = import_weights(folder, temporary / "checkpoint", _discard, _discard)
        load_weights([model], config, group, imported.checkpoint)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _discard(*_: object) -> None:
    """Discard the import's messages: a rollout brings new weights every few seconds."""
