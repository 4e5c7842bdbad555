"""Serve stage: OpenAI-compatible completions of a checkpoint over HTTP, for the rollouts of another process.

One process, one model; for models that need several GPUs use vLLM or SGLang.
"""

import shutil
import tempfile
from functools import partial
from pathlib import Path

from megatron_q3n import parallel
from megatron_q3n.checkpoint.weights import load_weights
from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.conversion.importing import import_weights
from megatron_q3n.device import select_device
from megatron_q3n.model.decode.protocols import DecodeModel
from megatron_q3n.parallel import Parallel
from megatron_q3n.rl.completion_server import CompletionServer
from megatron_q3n.stages import chat_format, trained_model


def run(config: RunConfig, run_dir: Path) -> int:
    """Serve until interrupted; the address is the first line of standard output. There is no run directory.

    Returns: 0.
    """
    source = trained_model.find_checkpoint(config)
    config = trained_model.with_checkpoint_model(source, config)
    tokenizer, template = chat_format.load_chat_format(config, run_dir)
    device = select_device(config)
    group = parallel.initialize(config, device)
    if group.world_size > 1:
        raise UserError(f"stage=serve runs in one process, found {group.world_size}; use vLLM or SGLang for more.")
    model = trained_model.load_model(source, config, device, group)
    stop_tokens = frozenset({tokenizer.eod, template.end_of_turn})
    load = partial(_load, model, config, group)
    try:
        address = (config.serve.host, config.serve.port)
        server = CompletionServer(address, model, tokenizer, stop_tokens, load)
    except OSError as error:
        raise UserError(
            f"serve.host={config.serve.host} serve.port={config.serve.port}: {error.strerror}; choose another port, "
            "or 0 for any."
        ) from None
    with server:
        print(f"serving http://{config.serve.host}:{server.server_port}/v1", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")
    parallel.shutdown()
    return 0


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
