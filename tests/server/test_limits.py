"""Limits, keys and attacks: bodies, numbers, connections and clients that leave; the server stays alive.

The fuzz sends 300 malformed requests over plain sockets: no reply is missing or a server's error, and no traceback is
logged.
"""

import json
import logging
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from megatron_q3n.config import UserError, validate
from tests.server.tiny_server import KEY, running

NUM_MALFORMED = 300
PATHS = ("/v1/completions", "/v1/chat/completions", "/update_weights_from_disk", "/health", "/metrics", "/x")
RIGHT: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 2, "n": 1, "temperature": 0, "stop": ["x"]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
}
WRONG: list[Any] = [None, True, -1, 0, 2**70, 1e-40, "", "a", "\x00", "é" * 3000, [], {}, [[]], [None], {"a": {}}]
WRONG += [[1, 2.5], [10**6], {"role": "user"}, [{"role": "user", "content": {}}], float("nan"), [["a"]], "<|im_end|>"]
NOT_JSON = [b"[" * 50_000, b'{"a":' * 9000, b"\xff\xfe", b'{"prompt": "\\ud800"}', bytes(range(32))]


def send(port: int, request: bytes) -> bytes:
    """Send bytes over a connection of their own, and return what comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request)
        reply = b""
        while part := connection.recv(65536):
            reply += part
    return reply


def request(path: str, body: bytes, *headers: str, method: str = "POST", length: int | str | None = None) -> bytes:
    """Return the bytes of a request with the key."""
    lines = [f"{method} {path} HTTP/1.1", "Host: a", f"Authorization: Bearer {KEY}", "Connection: close"]
    lines += ["Content-Type: application/json", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def malformed(generator: random.Random) -> bytes:
    """Return a request that is wrong in one of many ways."""
    path = generator.choice(PATHS)
    content = json.loads(json.dumps(RIGHT.get(path, {"model_path": "nowhere"})))
    kind = generator.randrange(10)
    if kind < 5:
        name = generator.choice([*content, "n", "stop", "seed", "logprobs", "tools", "messages"])
        content[name] = generator.choice(WRONG)
        return request(path, json.dumps(content).encode())
    body = json.dumps(content).encode()
    if kind == 5:
        return request(path, body[: generator.randrange(len(body))])
    if kind == 6:
        return request(path, generator.choice(NOT_JSON))
    if kind == 7:
        return request(path, body, length=generator.choice([-5, "x", 10**30, "1, 2", "+3"]))
    if kind == 8:
        return request(path, body, method=generator.choice(["GET", "PUT", "DELETE", "X"]))
    damaged = bytearray(request(path, body))
    for _ in range(generator.randrange(1, 6)):
        damaged[generator.randrange(len(damaged))] = generator.randrange(256)
    return bytes(damaged)


@pytest.fixture(scope="module")
def attacked(alone: Any) -> Iterator[Any]:
    """A server that waits a second for the rest of a request."""
    with running(alone, key=KEY, max_body_mib=1, max_choices=64, idle_timeout_seconds=1) as server:
        yield server


def test_300_malformed_requests(attacked: Any, caplog: pytest.LogCaptureFixture) -> None:
    generator = random.Random(9)
    requests = [malformed(generator) for _ in range(NUM_MALFORMED)]
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(16) as threads:
        replies = list(threads.map(lambda sent: send(attacked.port, sent), requests))
    statuses = [reply.split(b" ", 2)[1].decode() if reply else "none" for reply in replies]
    assert not [status for status in statuses if status.startswith("5")]
    assert statuses.count("400") > NUM_MALFORMED / 3
    # a request that ends too early has no reply
    assert statuses.count("none") < NUM_MALFORMED / 10
    assert not [record for record in caplog.records if record.exc_info or "Traceback" in record.getMessage()]
    reply = send(attacked.port, request("/v1/completions", b'{"prompt": "a", "max_tokens": 3}'))
    assert reply.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        (request("/v1/completions", b"x" * 2_000_000), 413, "larger than 1048576 bytes"),
        (request("/v1/completions", b"", length=10**15), 413, "larger than 1048576 bytes"),
        (request("/v1/completions", b"", length=-1), 400, ""),
        (request("/v1/completions", b'{"prompt": "a", "n": 1000000000}'), 400, "more than 64 completions"),
        (request("/v1/completions", b"[" * 100_000), 400, ""),
        (request("/v1/completions", b"a=b"), 400, "Invalid JSON"),
        (request("/v1/completions", b"[]"), 400, "object"),
    ],
)
def test_limits_come_before_work(attacked: Any, sent: bytes, status: int, message: str) -> None:
    reply = send(attacked.port, sent)
    assert reply.startswith(f"HTTP/1.1 {status} ".encode())
    assert message.encode() in reply


def test_a_chunked_body_has_the_same_limit(http: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    parts = (b" " * 65536 for _ in range(20))
    assert http.post("v1/completions", content=parts, headers=headers).status_code == 413
    right = iter([b'{"prompt": "a", ', b'"max_tokens": 2}'])
    assert http.post("v1/completions", content=right, headers=headers).status_code == 200


def test_forms_of_browsers_are_refused(http: httpx.Client) -> None:
    # a connection of its own: the server may close one whose body it refused while the client was sending
    with httpx.Client(base_url=http.base_url, headers=http.headers) as fresh:
        reply = fresh.post("v1/completions", content='{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert reply.status_code == 415


def test_an_error_does_not_poison_the_connection(http: httpx.Client) -> None:
    for _ in range(3):
        assert http.post("v1/completions", json={"prompt": "a", "x": 1}).status_code == 400
        assert http.post("v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_the_key_is_needed_for_everything_but_health(server: Any) -> None:
    root = server.url.removesuffix("/v1")
    for key in ("", "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer é"):
        headers = [(b"Authorization", key.encode("latin-1"))]
        assert httpx.get(f"{root}/v1/models", headers=headers).status_code == 401
        assert httpx.post(f"{root}/update_weights_from_disk", headers=headers, json={}).status_code == 401
        assert httpx.post(f"{server.url}/completions", headers=headers, json={}).status_code == 401
        assert httpx.get(f"{root}/metrics", headers=headers).status_code == 401
    assert httpx.get(f"{root}/health").json() == {"status": "ok"}


def test_weight_updates_need_a_key_and_a_folder_of_weights(alone: Any, http: httpx.Client) -> None:
    reply = http.post("update_weights_from_disk", json={"model_path": "nowhere"})
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "nowhere: no weights in nowhere")
    assert http.post("update_weights_from_disk", json={"path": "x"}).status_code == 400
    with running(alone) as open_server:
        reply = httpx.post(open_server.url.replace("/v1", "/update_weights_from_disk"), json={"model_path": "nowhere"})
        assert reply.status_code == 403
        assert "weight updates need an API key" in reply.text
        assert httpx.get(f"{open_server.url}/models").status_code == 200


def test_weights_are_loaded_between_requests(alone: Any) -> None:
    """A request that runs finishes with the old weights; the next one has the new ones."""
    loaded: list[tuple[Path, int]] = []

    def load(folder: Path) -> None:
        loaded.append((folder, server.thread.num_running))

    server: Any
    with running(alone, key=KEY, load=load) as server:
        client = openai.OpenAI(base_url=server.url, api_key=KEY)
        stream = client.completions.create(model="policy", prompt="a", max_tokens=100, temperature=0, stream=True)
        first = next(iter(stream))
        url = server.url.replace("/v1", "/update_weights_from_disk")
        reply = httpx.post(url, json={"model_path": "new"}, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        assert reply.json() == {"success": True, "message": "weights from new", "weight_version": 1}
        assert loaded == [(Path("new"), 0)]
        assert {chunk.system_fingerprint for chunk in [first, *stream]} == {"weights-0"}
        after = client.completions.create(model="policy", prompt="a", max_tokens=1)
        assert after.system_fingerprint == "weights-1"
        metrics = httpx.get(server.url.replace("/v1", "/metrics"), headers={"Authorization": f"Bearer {KEY}"})
        assert "q3n_weight_version 1.0" in metrics.text


def metric(http: httpx.Client, name: str) -> float:
    return next(float(line.split()[1]) for line in http.get("metrics").text.splitlines() if line.startswith(f"{name} "))


def wait_until_idle(server: Any) -> None:
    for _ in range(1000):
        if server.thread.num_running + server.thread.num_waiting == 0:
            return
        time.sleep(0.01)
    raise AssertionError("sequences are still running")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_cancelled(server: Any, http: httpx.Client, stream: bool) -> None:
    before = metric(http, "q3n_cancelled_requests_total"), metric(http, "q3n_generated_tokens_total")
    body = json.dumps({"prompt": "a", "n": 32, "max_tokens": 500, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(request("/v1/completions", body))
        while server.thread.num_running < 32:
            time.sleep(0.01)
    wait_until_idle(server)
    assert metric(http, "q3n_cancelled_requests_total") == before[0] + 1
    assert metric(http, "q3n_generated_tokens_total") - before[1] < 32 * 400, "it ended long before the limit"


def test_metrics_count_tokens_and_requests(http: httpx.Client) -> None:
    names = ["q3n_prompt_tokens_total", "q3n_generated_tokens_total", "q3n_request_seconds_count"]
    before = [metric(http, name) for name in names]
    reply = http.post("v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 4, "n": 2, "temperature": 0}).json()
    after = [metric(http, name) for name in names]
    assert [b - a for a, b in zip(before, after)] == [3, reply["usage"]["completion_tokens"], 1]
    text = http.get("metrics").text
    assert 'q3n_requests_total{path="/v1/completions",status="200"}' in text
    assert "q3n_time_to_first_token_seconds_bucket" in text


@pytest.fixture(scope="module")
def strict_server(alone: Any) -> Iterator[Any]:
    """A server with low limits."""
    with running(alone, max_requests=2, timeout_seconds=1.5, idle_timeout_seconds=1) as strict:
        yield strict


def test_requests_above_the_limit_get_status_429(strict_server: Any) -> None:
    url, body = f"{strict_server.url}/completions", {"prompt": "a", "n": 64, "max_tokens": 300}
    with ThreadPoolExecutor(6) as threads:
        replies = list(threads.map(lambda _: httpx.post(url, json=body, timeout=60), range(6)))
    assert {reply.status_code for reply in replies} <= {200, 429, 504}
    refused = [reply for reply in replies if reply.status_code == 429]
    assert refused
    assert all(reply.headers["Retry-After"] for reply in refused)
    wait_until_idle(strict_server)


def test_a_request_that_takes_too_long_ends(strict_server: Any) -> None:
    body = {"prompt": "a", "n": 200, "max_tokens": 500}
    reply = httpx.post(f"{strict_server.url}/completions", json=body, timeout=60)
    assert (reply.status_code, "serve.timeout_seconds" in reply.text) == (504, True)
    with httpx.stream("POST", f"{strict_server.url}/completions", json=body | {"stream": True}, timeout=60) as stream:
        *_, last = [line for line in stream.iter_lines() if line]
    assert "serve.timeout_seconds" in last
    wait_until_idle(strict_server)


def test_half_open_connections_do_not_block_and_are_closed(strict_server: Any) -> None:
    halves = [socket.create_connection(("127.0.0.1", strict_server.port)) for _ in range(100)]
    for number, connection in enumerate(halves):
        connection.settimeout(20)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"[: number % 40])
    assert httpx.get(strict_server.url.replace("/v1", "/health"), timeout=20).status_code == 200
    for connection in halves:
        assert connection.recv(1000).partition(b"\r\n")[0] in (b"", b"HTTP/1.1 400 Bad Request")
        connection.close()


def test_a_body_that_never_comes_ends(strict_server: Any) -> None:
    with socket.create_connection(("127.0.0.1", strict_server.port), timeout=20) as connection:
        connection.sendall(request("/v1/completions", b"{", length=100))
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("host", ["", " ", "http://a", "a b", "*", "-x"])
def test_hosts_that_are_no_addresses_are_refused(host: str) -> None:
    with pytest.raises(UserError, match=r"serve\.host=.*must be an IP address or a host name"):
        validate({"stage": "serve", "checkpoint": {"load": "x"}, "serve": {"host": host}})


def test_settings_without_effect_and_several_processes_are_refused(tmp_path: Path) -> None:
    from megatron_q3n.stages import serve

    settings: list[tuple[dict[str, Any], str]] = [
        ({"inference": {"temperature": 0.5}}, "inference.temperature has no effect with stage=serve"),
        ({"parallel": {"tensor_model_parallel_size": 2, "world_size": 2}}, "runs in one process, found settings for 2"),
    ]
    for sections, message in settings:
        with pytest.raises(UserError, match=message):
            serve.run(validate({"stage": "serve", "checkpoint": {"load": "x"}, **sections}), tmp_path)
