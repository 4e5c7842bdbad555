"""Another training source on the command line drops the recipe's held-out set, unless it is set as well."""

from pathlib import Path

import pytest

from megatron_q3n.config.held_out import overrides_without_recipes_held_out
from megatron_q3n.recipe import configure, register_defaults

OWN = "sft.train=[{path: mine.jsonl}]"


@pytest.mark.parametrize(
    ("overrides", "added"),
    [
        ([OWN], ["sft.validation=[]"]),
        (["training.steps=2", f"++{OWN}"], ["sft.validation=[]"]),
        ([OWN, "sft.validation=[{path: held_out.jsonl}]"], []),
        (["sft={train: [{path: mine.jsonl}]}"], ["sft.validation=[]"]),
        (["sft={train: [{path: a}], validation: [{path: b}]}"], []),
        (["sft={turns: last}"], []),
        (["rl.prompts=[{path: mine.jsonl}]", "sft.turns=last"], ["rl.held_out=[]"]),
        (["rl.prompts=[{path: mine.jsonl}]", "rl.held_out=[]"], []),
        (["sft.validation_percent=3"], []),
    ],
)
def test_overrides(overrides: list[str], added: list[str]) -> None:
    assert overrides_without_recipes_held_out(overrides) == added


def test_recipes_keep_their_held_out_set_for_their_own_data_only() -> None:
    register_defaults()
    assert configure(["--config-name", "sft-tiny"]).sft.validation
    own = configure(["--config-name", "sft-tiny", OWN]).sft
    assert [Path(source.path or "").name for source in own.train] == ["mine.jsonl"]
    assert own.validation == []
    rl = ["--config-name", "rl-tiny", "rl.prompts=[{path: mine.jsonl}]", "rl.reward.kind=math_verify"]
    assert configure(rl).rl.held_out == []
    assert configure([*rl, "rl.held_out=[{path: other.jsonl}]"]).rl.held_out[0].path == str(
        Path("other.jsonl").absolute()
    )
