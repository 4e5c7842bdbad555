"""Construction of a server from a model, its tokenizer and chat template, and the settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_q3n.config.inference import InferenceConfig
from megatron_q3n.config.serve import ServeConfig
from megatron_q3n.data.chat_template import ChatTemplate
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.inference.limits import GenerationLimits
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.model.decode.protocols import DecodeModel
from megatron_q3n.server.application import Application, Weights
from megatron_q3n.server.endpoints import ChatEndpoint, CompletionEndpoint, Endpoint
from megatron_q3n.server.generation_thread import GenerationThread
from megatron_q3n.server.generations import Generations
from megatron_q3n.server.listening import HttpServer, open_socket
from megatron_q3n.server.server_metrics import ServerMetrics

# memory of the running batch grows with it; further sequences wait
DEFAULT_MAX_SEQUENCES = 256


class ModelServer:
    """A server of one model: the generation thread, the application, and the socket, which listens at once."""

    def __init__(
        self,
        model: DecodeModel,
        tokenizer: TextTokenizer,
        template: ChatTemplate,
        load: Callable[[Path], None],
        settings: ServeConfig,
        inference: InferenceConfig,
        api_key: str | None,
    ) -> None:
        """Raises: UserError for an address that cannot be used, or drafts that the model does not support."""
        limits = GenerationLimits.from_model(model)
        limits.check([], Sampling(1), inference.draft_depth)
        listening = open_socket(settings)
        self.port: int = listening.getsockname()[1]
        self.thread = GenerationThread(
            model,
            vocab_size=tokenizer.vocab_size,
            draft_depth=inference.draft_depth,
            prefill_tokens=inference.prefill_tokens,
            max_sequences=inference.max_sequences or DEFAULT_MAX_SEQUENCES,
            on_failure=self.stop,
        )
        metrics, weights = ServerMetrics(), Weights(load)
        stop_tokens = frozenset({tokenizer.eod, template.end_of_turn})
        generations = Generations(self.thread, tokenizer, limits, settings, stop_tokens, metrics)
        parts = (generations, tokenizer, template, settings, lambda: weights.version)
        endpoints: dict[str, Endpoint[Any]] = {
            "/v1/completions": CompletionEndpoint(*parts),
            "/v1/chat/completions": ChatEndpoint(*parts),
        }
        application = Application(self.thread, endpoints, weights, settings, metrics, api_key)
        self._server = HttpServer(application.app, listening, settings)

    def run(self) -> None:
        """Serve until stopped or interrupted."""
        self.thread.start()
        self._server.run(self._close)

    def stop(self) -> None:
        """End `run` soon; may be called by any thread."""
        self._server.stop()

    def _close(self) -> None:
        self.thread.close()
        self.thread.join()
