"""Overrides written by programs: Hydra and OmegaConf read back every text as it was."""

import random

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from megatron_q3n.config.override_text import override

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
