"""Credentials in settings are refused before anything is written; the message does not repeat them."""

from typing import Any

import pytest

from megatron_q3n.config import UserError, validate

HTTP = {"engine": "http"}


def with_url(url: str) -> dict[str, Any]:
    return {"rl": {"rollout": HTTP | {"urls": ["http://first:8000/v1", url]}, "routing_replay": False}}


def with_argument(name: str, value: str) -> dict[str, Any]:
    return {"callbacks": [{"path": "mine.Notifier", "arguments": {name: value}}]}


@pytest.mark.parametrize(
    ("tree", "where"),
    [
        (with_url("http://user:hunter2@second:8000/v1"), "rl.rollout.urls.1 holds a URL with a password"),
        (with_url("http://:hunter2@second:8000/v1"), "rl.rollout.urls.1 holds a URL with a password"),
        (with_url("http://second/v1?model=a&api_key=hunter2"), "rl.rollout.urls.1 holds a URL with a credential"),
        (with_argument("webhook", "https://me:hunter2@chat.example/x"), "callbacks.0.arguments.webhook holds a URL"),
        (with_argument("api_key", "hunter2"), "callbacks.0.arguments.api_key holds a credential, by its name"),
        (with_argument("SLACK_TOKEN", "hunter2"), "callbacks.0.arguments.SLACK_TOKEN holds a credential"),
        ({"logging": {"wandb": {"tags": ["sk-hunter2hunter2hunter2hunter2"]}}}, "logging.wandb.tags.0 holds what"),
        ({"recipe": "hf_hunter2hunter2hunter2hunter2hunter2"}, "recipe holds what looks like an access token"),
    ],
)
def test_a_credential_is_refused_without_being_repeated(tree: dict[str, Any], where: str) -> None:
    with pytest.raises(UserError) as refused:
        validate(tree)
    assert str(refused.value).startswith(where)
    assert "hunter2" not in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "tree",
    [
        with_url("http://second:8000/v1?timeout=3"),
        with_argument("api_key", "$SLACK_TOKEN"),
        with_argument("num_tokens", "hunter2"),
        with_argument("token_file", "/run/secrets/slack"),
        {"samples": {"prompts": ["http://user:hunter2@host is"]}},
        {"inference": {"prompts": ["x"], "stop": ["://a:b@"]}},
    ],
)
def test_what_is_no_credential_is_not_refused(tree: dict[str, Any]) -> None:
    validate(tree)
