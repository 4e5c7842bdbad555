"""HTTP rollout engine against our own server process: equality with in-process, weight sync, dead and slow servers.

The server is started once and serves a tiny untrained model. Not covered: vLLM and SGLang themselves.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_q3n.config import UserError
from megatron_q3n.config.rl import RolloutConfig
from tests.rl.tiny_loop import tiny_config, tiny_loop

KEY = "the key of weight updates"


@pytest.fixture(autouse=True)
def api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's key is that of the server."""
    monkeypatch.setenv("Q3N_API_KEY", KEY)


@pytest.fixture(scope="module")
def loop(alone: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_loop(tiny_config(tmp_path_factory.mktemp("rl")), *alone)


@pytest.fixture(scope="module")
def run_dir(loop: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as fine-tuning writes it."""
    from megatron_q3n import checkpoint
    from megatron_q3n.data.chat_template import PLAIN, ChatTemplate
    from megatron_q3n.stages import chat_format

    folder = tmp_path_factory.mktemp("run")
    chat_format.save(folder, loop.tokenizer, ChatTemplate(PLAIN, loop.tokenizer))
    checkpoint.save(loop.state, folder)
    return folder


@pytest.fixture(scope="module")
def server(run_dir: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = ["-m", "megatron_q3n.train", "--config-name", "serve"]
    process = subprocess.Popen(
        [sys.executable, *command, f"checkpoint.load={run_dir}", "serve.port=0"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"Q3N_API_KEY": KEY},
        cwd=Path(__file__).parent.parent.parent,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving http://"), line
    yield line.split()[1], process
    process.kill()
    process.wait()


def engine(loop: Any, run_dir: Path, urls: list[str], **options: Any) -> Any:
    from megatron_q3n.rl.http_engine import HttpEngine
    from megatron_q3n.stages.weight_sync import WeightSync

    settings = RolloutConfig(engine="http", urls=urls, prompts=4, samples_per_prompt=3, max_new_tokens=7, **options)
    sync = WeightSync(loop.state, run_dir, None)
    return HttpEngine(loop.state.parallel, settings, loop.stop_tokens, loop.tokenizer.vocab_size, 5, sync)


@pytest.fixture(scope="module")
def dead_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"


@pytest.fixture
def slow_url() -> Iterator[str]:
    """A server that accepts connections and sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


def test_server_generates_as_the_in_process_engine_does(loop: Any, run_dir: Path, server: tuple[str, Any]) -> None:
    """Server and trainer agree on log-probs, and greedy responses equal the in-process engine's."""
    remote_engine = engine(loop, run_dir, [server[0]])
    # the weights that the server was started with
    remote_engine._version = 0
    # more than one request
    prompts = loop.prompts.take(0, 20)
    local, remote = loop.engine.generate_greedy(prompts), remote_engine.generate_greedy(prompts)
    assert [s.tokens for s in local] == [s.tokens for s in remote]
    samples = remote_engine.generate(prompts, 3)
    assert [s.key for s in samples] == [(n, m) for n in range(20) for m in range(3)]
    assert len({tuple(s.tokens) for s in samples}) > 10
    assert retry(remote_engine, prompts) == [s.tokens for s in samples], "a retried request has the same seed"
    without_replay = loop.settings.model_copy(update={"routing_replay": False})
    loop.state.config = loop.state.config.model_copy(update={"rl": without_replay})
    assert loop._compute_logprobs(samples)[1].logprob_diff_max < 1e-4


def retry(remote_engine: Any, prompts: Any) -> list[list[int]]:
    return [sample.tokens for sample in remote_engine.generate(prompts, 3)]


def test_servers_load_new_weights(loop: Any, run_dir: Path, server: tuple[str, Any]) -> None:
    import torch

    remote_engine, prompts = engine(loop, run_dir, [server[0]]), loop.prompts.take(0, 4)
    with torch.no_grad():
        for parameter in loop.state.models[0].parameters():
            parameter.mul_(1.3)
    remote_engine.update_weights(7)
    samples = remote_engine.generate(prompts, 3)
    assert {sample.policy_version for sample in samples} == {7}
    assert loop._compute_logprobs(samples)[1].logprob_diff_max < 1e-4
    for version in (8, 9):
        remote_engine.update_weights(version)
    folders = sorted(path.name for path in (run_dir / "weight_sync").glob("version_*"))
    assert folders == ["version_0000008", "version_0000009"]


def test_weights_are_not_loaded_without_the_key(
    loop: Any, run_dir: Path, server: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("Q3N_API_KEY", "another key")
    with pytest.raises(UserError, match=r"does not load new weights.*status 401"):
        engine(loop, run_dir, [server[0]], attempts=1).update_weights(3)


def test_requests_are_retried_on_the_next_server(
    loop: Any, run_dir: Path, server: tuple[str, Any], dead_url: str, slow_url: str
) -> None:
    remote_engine = engine(loop, run_dir, [dead_url, slow_url, server[0]], timeout_seconds=3)
    remote_engine._version = 0
    prompts = loop.prompts.take(0, 20)
    names = [sample.key for sample in remote_engine.generate(prompts, 3)]
    assert names == [(n, m) for n in range(20) for m in range(3)]
    assert remote_engine.num_retries >= 2


def test_error_names_servers_that_stay_dead(loop: Any, run_dir: Path, dead_url: str) -> None:
    remote_engine = engine(loop, run_dir, [dead_url], attempts=2)
    remote_engine._version = 0
    with pytest.raises(UserError, match=dead_url.replace(".", r"\.")):
        remote_engine.generate(loop.prompts.take(0, 2), 3)


def test_a_frozen_server_recovers(loop: Any, run_dir: Path, server: tuple[str, Any]) -> None:
    """Stopped for longer than the time limit and then continued: every sample exists once."""
    url, process = server
    remote_engine = engine(loop, run_dir, [url], timeout_seconds=2)
    remote_engine._version = 0
    process.send_signal(19)
    waker = threading.Thread(target=lambda: (time.sleep(3), process.send_signal(18)))
    waker.start()
    names = [sample.key for sample in remote_engine.generate(loop.prompts.take(0, 4), 3)]
    waker.join()
    assert names == [(n, m) for n in range(4) for m in range(3)]
    assert remote_engine.num_retries >= 1
