"""Damaged and hostile model folders: one message, within seconds, and nothing written. A fuzz in one process."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_q3n.config import UserError
from megatron_q3n.conversion.importing import import_weights
from megatron_q3n.hf.weights import CONFIG, INDEX
from tests.hf.published import publish, quiet, transformers_model

# values that JSON can have, of other types and far from every model
HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 7, 10**9, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "4", "full_attention", "default", "\0", "../x", "/etc/passwd", "\ud800"),
    *([], [0], [None], ["full_attention"], [["full_attention"]], [1, 2, 3, 4], {}, {"rope_type": "yarn"}, {"a": {}}),
]
NUM_MUTATIONS = 150
# a conversion of the unchanged folder takes well below a second
MAX_SECONDS = 5.0


@pytest.fixture(scope="module", params=["qwen3_next", "qwen3_5_moe_text"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("hf") / "model", transformers_model(request.param), torch.bfloat16)


def places(content: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) inside a JSON value."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place for key, value in items for place in [(content, key), *places(value)]]


def mutate(draw: random.Random, content: dict[str, Any]) -> None:
    """Replace, remove or add one or two values."""
    for _ in range(draw.randint(1, 2)):
        container, key = draw.choice(places(content))
        if draw.random() < 0.15 and isinstance(container, dict):
            del container[key]
        else:
            container[key] = draw.choice(HOSTILE)


def outcome(source: Path, output: Path) -> str:
    """Import; return "imported", or the message of the refusal."""
    began = time.monotonic()
    try:
        import_weights(source, output, quiet, quiet)
        result = "imported"
    # the two that tools/convert_hf.py turns into a message
    except (UserError, OSError) as error:
        result = str(error)
        assert not output.exists()
    assert time.monotonic() - began < MAX_SECONDS, result
    return result


@pytest.mark.parametrize("name", [CONFIG, INDEX])
def test_changed_json_is_imported_or_refused(source: Path, tmp_path: Path, name: str) -> None:
    original = (source / name).read_text()
    outcomes = []
    try:
        for seed in range(NUM_MUTATIONS):
            content = json.loads(original)
            mutate(random.Random(seed), content)
            (source / name).write_text(json.dumps(content))
            outcomes.append(outcome(source, tmp_path / f"out{seed}"))
    finally:
        (source / name).write_text(original)
    assert outcome(source, tmp_path / "unchanged") == "imported"
    refused = [message for message in outcomes if message != "imported"]
    assert len(refused) > NUM_MUTATIONS / 5
    assert all("\n" not in message for message in refused)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "\0",
        '{"weight_map": ',
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"weight_map": null}',
        "{}",
    ],
)
@pytest.mark.parametrize("name", [CONFIG, INDEX])
def test_other_json_is_refused(source: Path, tmp_path: Path, name: str, text: str) -> None:
    original = (source / name).read_text()
    try:
        (source / name).write_text(text)
        assert outcome(source, tmp_path / "out") != "imported"
    finally:
        (source / name).write_text(original)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(num_hidden_layers=1000, layer_types=None),
        lambda config: config.update(num_experts=8192),
        lambda config: config.update(num_hidden_layers=1000, num_experts=8192, layer_types=None),
    ],
)
def test_more_parameters_than_the_files_have_are_not_listed(
    source: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    original = (source / CONFIG).read_text()
    config = json.loads(original)
    change(config)
    try:
        (source / CONFIG).write_text(json.dumps(config))
        message = outcome(source, tmp_path / "out")
    finally:
        (source / CONFIG).write_text(original)
    assert "The two are not of one model" in message or "The two files are not of one model" in message
