"""Completion server: OpenAI-compatible completions over HTTP by the in-process engine, for `http_engine.py`.

    GET  /health                    200 when it can serve
    GET  /v1/models                 the model's name
    POST /v1/completions            prompts (text, ids, or lists of either), n, max_tokens, temperature, seed,
                                    stop_token_ids; always returns log-probs, and tokens by their ids
    POST /update_weights_from_disk  {"model_path": a folder of safetensors}

There is one model, so one request generates at a time; a request may hold many prompts. Each completion's random
numbers depend only on the request's seed and its index.
"""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from megatron_q3n.config import UserError
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.inference.generate import generate
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.model.decode.protocols import DecodeModel
from megatron_q3n.rl.http_engine import TOKEN_ID_PREFIX

# OpenAI's default
DEFAULT_MAX_TOKENS = 16
MAX_BODY_BYTES = 1 << 28


class BadRequest(ValueError):
    """An invalid request; the message is returned with status 400."""


class CompletionServer(ThreadingHTTPServer):
    """HTTP server of one model; `load(folder)` loads weights into it."""

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        model: DecodeModel,
        tokenizer: TextTokenizer,
        stop_tokens: frozenset[int],
        load: Callable[[Path], None],
    ) -> None:
        super().__init__(address, _Handler)
        self._model, self._tokenizer, self._load = model, tokenizer, load
        self._stop_tokens = stop_tokens
        self._model_lock = threading.Lock()

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the completions of a request.

        Raises: BadRequest; UserError for prompts that are too long.
        """
        prompts = self._prompts(request.get("prompt"))
        count, temperature = _positive_integer(request, "n", 1), float(request.get("temperature", 1.0))
        seed = request.get("seed", 0)
        sampling = Sampling(
            _positive_integer(request, "max_tokens", DEFAULT_MAX_TOKENS),
            temperature,
            stop_tokens=self._stop_tokens | frozenset(request.get("stop_token_ids", [])),
            vocab_size=self._tokenizer.vocab_size,
        )
        repeated = [prompt for prompt in prompts for _ in range(count)]
        with self._model_lock:
            completions = generate(self._model, repeated, sampling, seed=[f"{seed}.{i}" for i in range(len(repeated))])
        choices = [
            {
                "index": index,
                "text": self._text(completion.tokens, sampling.stop_tokens),
                "finish_reason": completion.finish_reason,
                "logprobs": {
                    "tokens": [f"{TOKEN_ID_PREFIX}{token}" for token in completion.tokens],
                    "token_logprobs": completion.sampled_logprobs,
                },
            }
            for index, completion in enumerate(completions)
        ]
        return {"object": "text_completion", "model": "policy", "choices": choices}

    def update_weights(self, request: dict[str, Any]) -> dict[str, Any]:
        """Load weights, after the current generation ends."""
        folder = request.get("model_path")
        if not isinstance(folder, str):
            raise BadRequest("model_path must name a folder")
        with self._model_lock:
            self._load(Path(folder))
        return {"success": True, "message": f"weights from {folder}"}

    def _prompts(self, prompt: Any) -> list[list[int]]:
        if isinstance(prompt, str) or (prompt and all(isinstance(t, int) for t in prompt)):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise BadRequest("prompt must be a text, token ids, or a list of either")
        return [self._tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompt]

    def _text(self, tokens: list[int], stop_tokens: frozenset[int]) -> str:
        return self._tokenizer.decode(token for token in tokens if token not in stop_tokens)


class _Handler(BaseHTTPRequestHandler):
    """Handler of one connection; its method names are those of http.server."""

    server: CompletionServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, {"status": "ok"})
        elif self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": "policy", "object": "model"}]})
        else:
            self._send(404, {"error": {"message": f"there is no {self.path}"}})

    def do_POST(self) -> None:
        routes = {"/v1/completions": self.server.complete, "/update_weights_from_disk": self.server.update_weights}
        if self.path not in routes:
            self._send(404, {"error": {"message": f"there is no {self.path}"}})
            return
        try:
            self._send(200, routes[self.path](self._body()))
        except (BadRequest, UserError, TypeError, ValueError) as error:
            self._send(400, {"error": {"message": str(error)}})

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing per request."""

    def _body(self) -> dict[str, Any]:
        length = int(self.headers.get("Content-Length", 0))
        if length > MAX_BODY_BYTES:
            raise BadRequest(f"a body of {length} bytes")
        content = json.loads(self.rfile.read(length))
        if not isinstance(content, dict):
            raise BadRequest("the body must be a JSON object")
        return content

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            # the client closed the connection; it retries
            self.close_connection = True


def _positive_integer(request: dict[str, Any], name: str, default: int) -> int:
    value = request.get(name, default)
    if not isinstance(value, int) or value < 1:
        raise BadRequest(f"{name} must be a positive integer, found {value!r}")
    return value
