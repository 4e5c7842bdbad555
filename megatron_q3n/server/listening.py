"""Listening: the socket, the event loop, and the time limit of idle and half-open connections."""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_q3n.config import UserError
from megatron_q3n.config.serve import ServeConfig

BACKLOG = 1024
# for replies that are being sent when the server ends
SHUTDOWN_SECONDS = 5


class TimedProtocol(H11Protocol):
    """HTTP protocol that closes a connection on which no complete request arrives in time.

    uvicorn itself limits the time between requests only: a connection on which half a request arrives stays for ever.
    """

    _idle_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the timer of a new connection."""
        super().connection_made(transport)
        self._restart_timer()

    def data_received(self, data: bytes) -> None:
        """Stop the timer when the head of a request is complete; its body and reply have a limit of their own."""
        super().data_received(data)
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering:
            self._stop_timer()
        elif self._idle_timer is None:
            self._restart_timer()

    def on_response_complete(self) -> None:
        """Start the timer again for the next request on the connection."""
        super().on_response_complete()
        self._restart_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def _restart_timer(self) -> None:
        self._stop_timer()
        if not self.transport.is_closing():
            self._idle_timer = self.loop.call_later(self.config.timeout_keep_alive, self.transport.close)

    def _stop_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._idle_timer = None


def open_socket(settings: ServeConfig) -> socket.socket:
    """Return a listening socket.

    Raises: UserError for an address that cannot be used.
    """
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        raise UserError(
            f"serve.host={settings.host} serve.port={settings.port}: {error.strerror or error}; choose another "
            "address, or port 0 for any free one."
        ) from None


class HttpServer:
    """uvicorn on one socket."""

    def __init__(self, app: Any, listening: socket.socket, settings: ServeConfig) -> None:
        self._socket = listening
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=TimedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                # an integer in uvicorn's annotation, which passes it to call_later
                timeout_keep_alive=settings.idle_timeout_seconds,  # type: ignore[arg-type]
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            )
        )

    def stop(self) -> None:
        """End `run` soon; may be called by any thread."""
        self._server.should_exit = True

    def run(self, close: Callable[[], object]) -> None:
        """Serve until stopped or interrupted, then call `close` while the event loop can still take messages."""
        if threading.current_thread() is threading.main_thread():
            # end as after Ctrl-C
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        asyncio.run(self._serve(close))

    async def _serve(self, close: Callable[[], object]) -> None:
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            close()
