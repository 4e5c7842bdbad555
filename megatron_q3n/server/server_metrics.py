"""Metrics of the server in Prometheus' text format: requests, tokens, times, and the running batch."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class ServerMetrics:
    """Metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "q3n_requests", "requests by path and status", ["path", "status"], registry=self._registry
        )
        self.prompt_tokens = self._counter("q3n_prompt_tokens", "tokens of prompts")
        self.generated_tokens = self._counter("q3n_generated_tokens", "tokens generated and delivered")
        self.cancelled = self._counter("q3n_cancelled_requests", "requests whose client left before the end")
        self._first_token = self._histogram("q3n_time_to_first_token_seconds", "from the request to its first token")
        self._request = self._histogram("q3n_request_seconds", "from the request to the end of its reply")

    def gauge(self, name: str, description: str, value: Callable[[], float]) -> None:
        """Add a value that is read at every scrape."""
        Gauge(name, description, registry=self._registry).set_function(value)

    @contextmanager
    def timed_request(self) -> Iterator[Callable[[], None]]:
        """Measure a request; the yielded function marks its first token."""
        began = time.monotonic()
        is_first = True

        def mark() -> None:
            nonlocal is_first
            if is_first:
                self._first_token.observe(time.monotonic() - began)
            is_first = False

        try:
            yield mark
        finally:
            self._request.observe(time.monotonic() - began)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, description: str) -> Counter:
        return Counter(name, description, registry=self._registry)

    def _histogram(self, name: str, description: str) -> Histogram:
        return Histogram(name, description, registry=self._registry, buckets=_SECONDS)
