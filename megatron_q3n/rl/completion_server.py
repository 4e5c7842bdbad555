"""Our own server of completions: what `http_engine.py` asks of vLLM and SGLang, by the in-process engine.

    GET  /health                    200 when it can answer
    GET  /v1/models                 what is served
    POST /v1/completions            prompts (text, ids, or lists of either), n, max_tokens, temperature, seed,
                                    stop_token_ids; logprobs and tokens by id always come along
    POST /update_weights_from_disk  {"model_path": a folder of safetensors}

One generation at a time, since there is one model; a request may bring many prompts. Each completion's random
numbers depend on the request's seed and its place alone.
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
from megatron_q3n.rl.http_engine import TOKEN_NAME

DEFAULT_TOKENS = 16  # OpenAI's
MAX_BODY_BYTES = 1 << 28


class BadRequest(ValueError):
    """What was asked is not understood; the message goes back."""


class AnswerServer(ThreadingHTTPServer):
    """Serves one model. `load(folder)` puts other weights into it."""

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        model: Any,
        tokenizer: TextTokenizer,
        stop_tokens: frozenset[int],
        load: Callable[[Path], None],
    ) -> None:
        super().__init__(address, _Handler)
        self._model, self._tokenizer, self._load = model, tokenizer, load
        self._stop_tokens = stop_tokens
        self._one_at_a_time = threading.Lock()

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a request for completions.

        Raises: BadRequest; UserError for prompts the model cannot take.
        """
        prompts = self._prompts(request.get("prompt"))
        count, temperature = _whole(request, "n", 1), float(request.get("temperature", 1.0))
        seed = request.get("seed", 0)
        sampling = Sampling(
            _whole(request, "max_tokens", DEFAULT_TOKENS),
            temperature,
            stop_tokens=self._stop_tokens | frozenset(request.get("stop_token_ids", [])),
            vocab_size=self._tokenizer.vocab_size,
        )
        asked = [prompt for prompt in prompts for _ in range(count)]
        with self._one_at_a_time:
            done = generate(self._model, asked, sampling, seed=[f"{seed}.{i}" for i in range(len(asked))])
        choices = [
            {
                "index": index,
                "text": self._text(answer.tokens, sampling.stop_tokens),
                "finish_reason": answer.finish_reason,
                "logprobs": {
                    "tokens": [f"{TOKEN_NAME}{token}" for token in answer.tokens],
                    "token_logprobs": answer.sampled_logprobs,
                },
            }
            for index, answer in enumerate(done)
        ]
        return {"object": "text_completion", "model": "policy", "choices": choices}

    def update_weights(self, request: dict[str, Any]) -> dict[str, Any]:
        """Load other weights, once the generation under way is done."""
        folder = request.get("model_path")
        if not isinstance(folder, str):
            raise BadRequest("model_path must name a folder")
        with self._one_at_a_time:
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
    """One connection."""

    server: AnswerServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:  # its name is the library's
        if self.path == "/health":
            self._send(200, {"status": "ok"})
        elif self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": "policy", "object": "model"}]})
        else:
            self._send(404, {"error": {"message": f"there is no {self.path}"}})

    def do_POST(self) -> None:  # its name is the library's
        known = {"/v1/completions": self.server.complete, "/update_weights_from_disk": self.server.update_weights}
        if self.path not in known:
            self._send(404, {"error": {"message": f"there is no {self.path}"}})
            return
        try:
            self._send(200, known[self.path](self._body()))
        except (BadRequest, UserError, TypeError, ValueError) as error:
            self._send(400, {"error": {"message": str(error)}})

    def log_message(self, format: str, *arguments: Any) -> None:  # its names are the library's
        """Say nothing of every request."""

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
            self.close_connection = True  # whoever asked has gone; it will ask again


def _whole(request: dict[str, Any], name: str, default: int) -> int:
    value = request.get(name, default)
    if not isinstance(value, int) or value < 1:
        raise BadRequest(f"{name} must be a whole number from 1, found {value!r}")
    return value
