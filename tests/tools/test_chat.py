"""tools/chat.py against a server in this process: a conversation of two turns, and one message for what is wrong."""

import io
import sys
from typing import Any

import pytest

from tests.server.tiny_server import running
from tools import chat


def run(monkeypatch: pytest.MonkeyPatch, typed: str, *arguments: str) -> int:
    monkeypatch.delenv("Q3N_API_KEY", raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    monkeypatch.setattr(sys, "argv", ["chat.py", *arguments])
    return chat.main()


@pytest.fixture(scope="module")
def server(alone: Any) -> Any:
    with running(alone) as running_server:
        yield running_server


def test_a_conversation_of_two_turns(
    server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import openai

    options = ["--temperature", "0", "--tokens", "5", "--system", "brief"]
    assert run(monkeypatch, "hi\nand?\n/new\nhi\n\nnever sent\n", server.url, *options) == 0
    printed = capsys.readouterr().out.split("> ")
    client = openai.OpenAI(base_url=server.url, api_key="none")
    messages: Any = [{"role": "system", "content": "brief"}]
    answers = []
    for text in ("hi", "and?"):
        messages.append({"role": "user", "content": text})
        reply = client.chat.completions.create(model="policy", messages=messages, temperature=0, max_tokens=5)
        answers.append(reply.choices[0].message.content)
        messages.append({"role": "assistant", "content": answers[-1]})
    assert [part.removesuffix("\n") for part in printed] == ["", *answers, "", answers[0], ""]


def test_errors_are_one_message(
    server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([server.url, "--temperature", "-1"], "temperature: must be 0"),
        (["http://127.0.0.1:9/v1"], "Is the server running?"),
    ):
        assert run(monkeypatch, "hi\n", *arguments) == 2
        captured = capsys.readouterr().err
        assert message in captured
        assert captured.startswith("error: http://")
