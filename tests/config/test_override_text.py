"""Overrides written by programs: Hydra and OmegaConf read back every text as it was."""

import random
import subprocess
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from megatron_q3n.config.override_text import override, shell_override

SPECIAL = [
    "a",
    "1",
    " ",
    "\\",
    "'",
    '"',
    "$",
    "${",
    "${x}",
    "}",
    "=",
    ",",
    "(",
    ")",
    "[",
    "]",
    "%j",
    "#",
    ":",
    "~",
    "\n",
]


def read(text: str) -> object:
    (parsed,) = OverridesParser.create().parse_overrides([text])
    assert not parsed.is_sweep_override()
    container = OmegaConf.to_container(OmegaConf.create({"x": parsed.value()}), resolve=True)
    assert isinstance(container, dict)
    return container["x"]


def test_every_text_is_read_back() -> None:
    generator = random.Random(5)
    for _ in range(600):
        text = "".join(generator.choice(SPECIAL) for _ in range(generator.randrange(8)))
        assert read(override("x", text)) == text
        assert read(override("x", [text, "b"])) == [text, "b"]
    assert read(override("x", None)) is None
    assert read(override("x", 7)) == 7


@pytest.mark.parametrize("name", ["plain", "a b", "it's", "a=b,c", "a$b", "a${HOME}b", "a(b", 'a"b'])
def test_a_pasted_override_is_read_back(name: str) -> None:
    """By a real shell, then by Hydra and OmegaConf."""
    path = Path("/runs") / name
    words = ["bash", "-c", f"printf %s {shell_override('x', path)}"]
    pasted = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert read(pasted) == str(path)
    assert (shell_override("x", path) == f"x={path}") == (name == "plain")
