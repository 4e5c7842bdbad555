"""Callbacks alone: how a list passes moments on, what a recipe may name. In real runs: tests/stages/test_session.py."""

import inspect
from typing import Any

import pytest

from megatron_q3n.config import UserError, validate
from megatron_q3n.metrics import names
from megatron_q3n.training.callbacks import Callback, CallbackList, load_callbacks

HERE = "tests.training.test_callbacks"
REPORT: Any = None


class Named(Callback):
    """Callback that returns fixed answers and records its calls."""

    def __init__(self, name: str = "a", admits: bool | None = None, metric: str = "custom/value") -> None:
        self.name, self.admits, self.metric = name, admits, metric
        self.calls: list[str] = []

    def before_update(self, step: int, loss: float, grad_norm: float) -> bool | None:
        self.calls.append("before_update")
        return self.admits

    def after_step(self, step: int, report: Any) -> dict[str, float]:
        self.calls.append("after_step")
        return {self.metric: step}


class NotACallback:
    """A class that a recipe must not name."""


def test_every_moment_is_passed_on() -> None:
    """A new moment needs a method of CallbackList too; called on a list, each reaches every callback."""
    moments = [name for name, value in vars(Callback).items() if inspect.isfunction(value)]
    assert {"on_run_start", "before_update", "heartbeat"} < set(moments)
    assert [name for name in moments if name not in vars(CallbackList)] == []
    for moment in moments:
        calls: list[str] = []

        def recorded(*arguments: Any, calls: list[str] = calls) -> None:
            calls.append("called")

        callbacks = [Callback(), Callback()]
        for callback in callbacks:
            setattr(callback, moment, recorded)
        num_arguments = len(inspect.signature(getattr(Callback, moment)).parameters) - 1
        getattr(CallbackList(callbacks), moment)(*range(num_arguments))
        assert len(calls) == 2, moment


@pytest.mark.parametrize(
    ("answers", "admitted"), [((None, None), True), ((True, False), False), ((False, None), False)]
)
def test_one_callback_withholds_an_update_and_all_are_called(answers: tuple[bool | None, ...], admitted: bool) -> None:
    callbacks = [Named(admits=answer) for answer in answers]
    assert CallbackList(callbacks).before_update(3, 1.0, 1.0) is admitted
    assert [callback.calls for callback in callbacks] == [["before_update"]] * 2


def test_metrics_are_collected_up_to_the_verdict_that_ends_the_session() -> None:
    first, second, third = Named(metric="custom/a"), Named(metric="custom/b"), Named(metric="custom/c")
    several = CallbackList([first, second, third])
    assert several.after_step(2, REPORT) == {"custom/a": 2.0, "custom/b": 2.0, "custom/c": 2.0}
    assert several.verdict == "go_on"
    second.verdict = "roll_back"
    assert several.after_step(3, REPORT) == {"custom/a": 3.0, "custom/b": 3.0}
    assert several.verdict == "roll_back"
    assert len(third.calls) == 1


@pytest.mark.parametrize("name", ["custom/", "mine/value", "custom/with space", "loss"])
def test_a_metric_without_a_name_in_the_table_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"Named: after_step returned the metric .* Allowed are custom/<name>"):
        CallbackList([Named(metric=name)]).after_step(1, REPORT)


@pytest.mark.parametrize("name", ["custom/value", "custom/layer_3/norm-max", "loss/train"])
def test_custom_metrics_and_those_of_the_table_are_recorded(name: str) -> None:
    assert CallbackList([Named(metric=name)]).after_step(1, REPORT) == {name: 1.0}
    names.check(name)


def loaded(*callbacks: dict[str, Any]) -> list[Any]:
    return load_callbacks(validate({"callbacks": list(callbacks)}).callbacks)


def test_callbacks_are_constructed_in_the_order_of_the_recipe() -> None:
    one, two = loaded({"path": f"{HERE}.Named"}, {"path": f"{HERE}.Named", "arguments": {"name": "b", "admits": False}})
    assert (one.name, one.admits, two.name, two.admits) == ("a", None, "b", False)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"path": "no_such_package.Thing"},
            r"callbacks\[0\]: path=no_such_package.Thing cannot be imported: No module",
        ),
        ({"path": f"{HERE}.Missing"}, rf"Missing is not a subclass of .*Callback; {HERE} defines Named\. Correct"),
        ({"path": f"{HERE}.NotACallback"}, "NotACallback is not a subclass"),
        ({"path": f"{HERE}.REPORT"}, "REPORT is not a subclass"),
        (
            {"path": f"{HERE}.Named", "arguments": {"nmae": "a"}},
            r"unexpected keyword argument 'nmae'. It takes Named\(",
        ),
        ({"path": "NoModule"}, "path='NoModule' is not an import path; give module and class"),
        ({"path": "module:Class"}, "path='module:Class' is not an import path"),
        ({"path": f"{HERE}.Named", "argument": {}}, "argument: no such setting"),
    ],
)
def test_a_bad_setting_is_refused_with_what_to_do(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        loaded(setting)


@pytest.mark.parametrize("stage", ["generate", "serve", "evaluate"])
def test_callbacks_without_training_are_refused(stage: str) -> None:
    callbacks = [{"path": f"{HERE}.Named"}]
    with pytest.raises(UserError, match=f"callbacks have no effect with stage={stage}"):
        validate({"stage": stage, "checkpoint": {"load": "runs/latest"}, "callbacks": callbacks})
