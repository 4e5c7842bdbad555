"""Any value of any setting: composition and validation accept it or refuse it in one message, in bounded time.

In one process and without building anything; what an accepted configuration does is not covered here.
"""

import functools
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_q3n.config import EXIT_BAD_INPUT, UserError, known_settings, launch, validate
from megatron_q3n.recipe import configure, register_defaults

SECONDS = 30.0
ODD_VALUES = [
    *("null", "", "0", "1", "-1", "3", "1.5", "1e300", "-1e300", "nan", "inf", "-inf", "1e-320", "true", "False"),
    *("4294967296", "99999999999999999999", "9" * 400, "[]", "{}", "[[]]", "[null]", "{a: 1}", "[{}]", "[{path: x}]"),
    *(
        "text",
        "'a b'",
        "'\\u2028'",
        "'~'",
        "~",
        "~/x",
        "'a\\0b'",
        "${recipe}",
        "${training}",
        "${nothing}",
        "${oc.env:NO}",
    ),
    *(
        "'\\${x}'",
        "(",
        "'",
        "a,b",
        "range(3)",
        "choice(1,2)",
        "[1,[2,[3]]]",
        "'" + "x" * 5000 + "'",
        "???",
        "é",
        "=",
        "a=b",
    ),
]
PREFIXES = ["", "", "", "+", "++", "~"]


@functools.cache
def names() -> list[str]:
    register_defaults()
    return [*known_settings(), "model.megatron.hidden_dropout", "model.megatron.absent", "absent", "hydra.run.dir"]


def outcome(overrides: list[str]) -> str | None:
    """Return the message of a refusal, None if accepted."""
    began = time.monotonic()
    try:
        configure(["--config-name", "pretrain-tiny", *overrides])
        message = None
    except UserError as error:
        message = str(error)
    assert time.monotonic() - began < SECONDS
    return message


def test_every_setting_takes_or_refuses_odd_values() -> None:
    """Each setting with one of the values, which one by its position."""
    for index, name in enumerate(names()):
        override = f"{name}={ODD_VALUES[index % len(ODD_VALUES)]}"
        message = outcome([override])
        assert message is None or message.strip(), override


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_any_overrides_are_accepted_or_refused_in_a_message(data: st.DataObject) -> None:
    overrides = [
        data.draw(st.sampled_from(PREFIXES))
        + data.draw(st.sampled_from(names()))
        + data.draw(st.sampled_from(["=", "=", "=", "", "=="]))
        + data.draw(st.one_of(st.sampled_from(ODD_VALUES), st.text(max_size=12)))
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    message = outcome(overrides)
    assert message is None or message.strip()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "seed": (
        {"training": {"seed": 2**32}},
        "training.seed=4294967296: input should be less than or equal to 4294967295",
    ),
    "sampling seed": ({"inference": {"seed": 2**32}}, "inference.seed=4294967296"),
    "learning rate": ({"schedule": {"lr": 1e300}}, "schedule.lr=1e+300: input should be less than or equal to 1000000"),
    "steps": ({"training": {"steps": 10**12}}, "training.steps=1000000000000: input should be less than or equal to"),
    "not a number": ({"model": {"megatron": {"hidden_dropout": float("nan")}}}, "hidden_dropout=nan is no number"),
    "infinite": ({"model": {"megatron": {"hidden_dropout": float("inf")}}}, "hidden_dropout=inf is no number"),
    "dropout": ({"model": {"megatron": {"attention_dropout": 0.1}}}, "attention_dropout=0.1: attention runs without"),
    "bias": ({"model": {"megatron": {"add_bias_linear": True}}}, "add_bias_linear=True: projections and experts"),
    "activation": ({"model": {"megatron": {"gated_linear_unit": False}}}, "gated_linear_unit=False: the experts are"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_cannot_work_are_refused(name: str) -> None:
    tree, message = REFUSED[name]
    with pytest.raises(UserError) as refused:
        validate(tree)
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_fixed_fields_may_be_named_with_their_value() -> None:
    validate({"model": {"megatron": {"attention_dropout": 0.0, "gated_linear_unit": True}}})


@pytest.mark.parametrize("value", ["0", "-1", "two", "", "1.0"])
def test_launcher_variables_that_are_no_numbers_are_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(UserError, match=f"environment variable WORLD_SIZE='{value}'"):
        validate({})
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(UserError, match="environment variable RANK='x'"):
        launch.rank()


def test_a_layout_of_several_processes_names_the_launcher(run_module: Any) -> None:
    done = run_module("--config-name", "pretrain-tiny", "parallel=tp2", "run_dir='a b'")
    assert done.returncode == EXIT_BAD_INPUT
    command = (
        """torchrun --nproc-per-node 2 -m megatron_q3n.train --config-name pretrain-tiny parallel=tp2 'run_dir='"""
    )
    assert command in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_unusable_rank_is_one_message(run_module: Any) -> None:
    done = run_module("--config-name", "pretrain-tiny", environment={"RANK": "x"})
    assert done.returncode == EXIT_BAD_INPUT
    assert done.stderr.splitlines()[0].startswith("error: environment variable RANK='x'")
    assert len(done.stderr.splitlines()) == 1
