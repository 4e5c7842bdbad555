"""ASGI application: routes, the API key, limits of each request, and errors in OpenAI's form.

GET  /health                    200 when it can generate; without a key
GET  /metrics                   Prometheus' text format
GET  /v1/models                 the model's name
POST /v1/completions            prompts as texts or token ids
POST /v1/chat/completions       conversations, by the model's chat template
POST /update_weights_from_disk  {"model_path": a folder of safetensors}; only with a key
"""

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from megatron_q3n.config import UserError
from megatron_q3n.config.serve import ServeConfig
from megatron_q3n.server.endpoints import Endpoint, PreparedReply
from megatron_q3n.server.generation_thread import GenerationFailed, GenerationThread
from megatron_q3n.server.replies import error_body, event
from megatron_q3n.server.requests import BadRequest, WeightsRequest, parse
from megatron_q3n.server.server_metrics import ServerMetrics

UPDATE_WEIGHTS = "/update_weights_from_disk"
# for the last event of a stream, after its deadline
STALLED_SECONDS = 5.0
DISCARD_SECONDS = 2.0


class Weights:
    """Weights of the served model: `load(folder)` replaces them, and `version` counts how often."""

    def __init__(self, load: Callable[[Path], None]) -> None:
        self._load = load
        self.version = 0

    def update(self, folder: Path) -> None:
        """Load the weights of a folder. Called by the generation thread."""
        self._load(folder)
        self.version += 1


class Application:
    """Handlers of one server; `app` is the ASGI application."""

    def __init__(
        self,
        thread: GenerationThread,
        endpoints: dict[str, Endpoint[Any]],
        weights: Weights,
        settings: ServeConfig,
        metrics: ServerMetrics,
        api_key: str | None,
    ) -> None:
        self._thread, self._weights, self._settings = thread, weights, settings
        self._metrics, self._api_key = metrics, api_key
        self._num_requests = 0
        posts = {path: self._generation_handler(endpoint) for path, endpoint in endpoints.items()}
        posts[UPDATE_WEIGHTS] = self._update_weights
        gets = {"/health": self._health, "/metrics": self._show_metrics, "/v1/models": self._models}
        routes = [Route(path, self._handler(handle), methods=["POST"]) for path, handle in posts.items()]
        routes += [Route(path, self._handler(handle), methods=["GET"]) for path, handle in gets.items()]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})
        metrics.gauge("q3n_running_sequences", "sequences in the running batch", lambda: thread.num_running)
        metrics.gauge("q3n_waiting_sequences", "sequences that wait for the batch", lambda: thread.num_waiting)
        metrics.gauge("q3n_requests_in_progress", "requests being answered", lambda: self._num_requests)
        metrics.gauge("q3n_weight_version", "how often new weights were loaded", lambda: weights.version)

    def _handler(self, handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Return the handler with its key checked, its errors as replies, and its status counted."""

        async def handler(request: Request) -> Response:
            try:
                self._check_key(request)
                response = await handle(request)
            except BadRequest as error:
                response = _error(str(error), error.status, error.parameter)
            except ClientDisconnect:
                response = _error("the client left", 499)
            except TimeoutError:
                seconds = self._settings.timeout_seconds
                response = _error(f"not finished after {seconds:g} s (serve.timeout_seconds)", 504)
            except GenerationFailed as error:
                response = _error(str(error), 500)
            self._metrics.requests.labels(request.url.path, str(response.status_code)).inc()
            return response

        return handler

    def _check_key(self, request: Request) -> None:
        if self._api_key is None or request.url.path == "/health":
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        is_right = secrets.compare_digest(key.strip().encode(), self._api_key.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise BadRequest("a wrong or missing API key (Authorization: Bearer …)", status=401)

    def _generation_handler(self, endpoint: Endpoint[Any]) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            with self._counted():
                async with asyncio.timeout(self._settings.timeout_seconds):
                    body = await self._read_body(request)
                    # parsing and tokenizing a long prompt must not delay the other requests' streams
                    reply = await asyncio.to_thread(lambda: endpoint.prepare(parse(endpoint.request_type, body)))
                    if not reply.is_streamed:
                        return await self._reply_whole(request, reply)
                self._check_health()
                deadline = asyncio.get_running_loop().time() + self._settings.timeout_seconds
                return TimedStream(self._stream(reply, deadline), deadline)

        return handle

    async def _reply_whole(self, request: Request, reply: PreparedReply) -> Response:
        """Return the whole reply; if the client leaves first, cancel it.

        Raises: ClientDisconnect.
        """
        self._check_health()
        with self._metrics.timed_request() as mark_first:
            generating = asyncio.ensure_future(reply.whole(mark_first))
            leaving = asyncio.ensure_future(_wait_until_left(request))
            try:
                await asyncio.wait({generating, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not generating.done():
                    self._metrics.cancelled.inc()
                    raise ClientDisconnect
                return JSONResponse(await generating)
            finally:
                for task in (generating, leaving):
                    task.cancel()
                await asyncio.gather(generating, leaving, return_exceptions=True)

    async def _stream(self, reply: PreparedReply, deadline: float) -> AsyncIterator[str]:
        """Yield the server-sent events of a reply; an error after the first one is an event too."""
        last: str | None = None
        self._num_requests += 1
        try:
            with self._metrics.timed_request() as mark_first:
                async with contextlib.aclosing(reply.chunks(mark_first)) as chunks:
                    async for chunk in _until(deadline, chunks):
                        yield event(chunk)
            last = "[DONE]"
        except (GenerationFailed, TimeoutError) as error:
            last = json.dumps(error_body(str(error) or "not finished in time (serve.timeout_seconds)", 500))
        finally:
            self._num_requests -= 1
            if last is None:
                self._metrics.cancelled.inc()
        yield event(last)

    async def _update_weights(self, request: Request) -> Response:
        """Load weights after the sequences that were submitted before."""
        if self._api_key is None:
            raise BadRequest(
                f"weight updates need an API key: start the server with ${self._settings.api_key_env} set", status=403
            )
        async with asyncio.timeout(self._settings.timeout_seconds):
            folder = Path(parse(WeightsRequest, await self._read_body(request)).model_path)
            self._check_health()
            try:
                await asyncio.wrap_future(self._thread.call(lambda: self._weights.update(folder)))
            except (UserError, OSError) as error:
                raise BadRequest(f"{folder}: {error}", parameter="model_path") from None
        return JSONResponse(
            {"success": True, "message": f"weights from {folder}", "weight_version": self._weights.version}
        )

    async def _read_body(self, request: Request) -> bytes:
        """Return the body of a JSON request.

        Raises: BadRequest for a body of another type, over the limit, or that does not arrive.
        """
        # browsers send other types to any address without asking it first
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise BadRequest("the body must have Content-Type: application/json", status=415)
        limit, seconds = int(self._settings.max_body_mib * 2**20), self._settings.idle_timeout_seconds
        body = bytearray()
        is_too_large = int(request.headers.get("content-length", "0")) > limit
        try:
            # the rest of a large body is discarded: a client that is still sending would not read the reply
            async with asyncio.timeout(min(seconds, DISCARD_SECONDS) if is_too_large else seconds):
                async for part in request.stream():
                    is_too_large = is_too_large or len(body) + len(part) > limit
                    if not is_too_large:
                        body += part
        except TimeoutError:
            if not is_too_large:
                raise BadRequest(
                    f"the body did not arrive within {seconds:g} s (serve.idle_timeout_seconds)", status=408
                ) from None
        if is_too_large:
            raise BadRequest(f"the body is larger than {limit} bytes (serve.max_body_mib)", status=413)
        return bytes(body)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count a request among those in progress.

        Raises: BadRequest at the limit.
        """
        limit = self._settings.max_requests
        if self._num_requests >= limit:
            raise BadRequest(f"{limit} requests are in progress already (serve.max_requests); try later", status=429)
        self._num_requests += 1
        try:
            yield
        finally:
            self._num_requests -= 1

    def _check_health(self) -> None:
        if self._thread.has_failed:
            raise GenerationFailed("the generation thread has ended")

    async def _health(self, request: Request) -> Response:
        self._check_health()
        return JSONResponse({"status": "ok"})

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        model = {"id": self._settings.model_name, "object": "model", "created": 0, "owned_by": "megatron_q3n"}
        return JSONResponse({"object": "list", "data": [model]})


class TimedStream(StreamingResponse):
    """Stream that ends some seconds after its deadline, also when the client does not read what is sent."""

    def __init__(self, events: AsyncIterator[str], deadline: float) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._deadline = deadline + STALLED_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; at the deadline the connection is closed without an end of the stream."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._deadline):
                await super().__call__(scope, receive, send)


async def _until[T](deadline: float, items: AsyncIterator[T]) -> AsyncIterator[T]:
    """Yield items; the deadline is for each item's generation and not for what the caller does with it.

    Raises: TimeoutError.
    """
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                item = await anext(items)
        except StopAsyncIteration:
            return
        yield item


async def _wait_until_left(request: Request) -> None:
    """Return when the client has closed the connection; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _http_error(request: Request, error: Exception) -> Response:
    """Return the reply for a path or method that does not exist."""
    assert isinstance(error, HTTPException)
    return _error(f"{request.method} {request.url.path}: {error.detail}", error.status_code)


def _error(message: str, status: int, parameter: str | None = None) -> Response:
    # the rest of a body that was not read would be taken for the next request
    headers = {"Connection": "close"} | ({"Retry-After": "1"} if status == 429 else {})
    return Response(
        json.dumps(error_body(message, status, parameter)), status, headers=headers, media_type="application/json"
    )
