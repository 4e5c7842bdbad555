"""Fixtures of the server's tests: one server of a tiny random model for all of them, and clients."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.server.tiny_server import KEY, running


@pytest.fixture(scope="session")
def server(alone: Any) -> Iterator[Any]:
    with running(alone, key=KEY, max_body_mib=1, max_choices=64) as running_server:
        yield running_server


@pytest.fixture(scope="session")
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0) as openai_client:
        yield openai_client


@pytest.fixture(scope="session")
def http(server: Any) -> Iterator[httpx.Client]:
    """A plain client with the key, relative to the server's root."""
    root, headers = server.url.removesuffix("v1"), {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=root, headers=headers, timeout=60) as plain:
        yield plain
