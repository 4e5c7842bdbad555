"""Reward workers: scores of each kind, what a failing process affects, replies matched to requests, limits."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from megatron_q3n.config import UserError
from megatron_q3n.config.rl import RewardConfig
from megatron_q3n.rl.reward_workers import ROOT, RewardWorkers, worker_variables
from megatron_q3n.rl.samples import NO_ANSWER, Prompt, Sample

HERE = "tests.rl.test_reward_workers"
# a worker process that breaks the protocol in the way that the first argument names
BROKEN_WORKER = """
import json, sys
how = sys.argv[1]
def write(content): print(json.dumps(content), flush=True)
write({"ready": True, "isolation": {}})
for number, line in enumerate(sys.stdin):
    request = json.loads(line)
    if request["text"] != "bad":
        write({"id": request["id"], "score": float(request["text"])})
    elif how == "twice":
        print('{"id": "%s", "score": 0.5}\\n{"id": "%s", "score": 0.5}' % (request["id"], request["id"]), flush=True)
    elif how == "late":
        write({"id": request["id"], "score": 3})
        write({"id": "x", "score": 9})
    elif how == "foreign":
        write({"id": "0", "score": 0.5})
    elif how == "text":
        print("hello", flush=True)
    elif how == "list":
        write([1])
    elif how == "end":
        sys.exit()
"""

# a trainer that scores slowly and records the signals that stop it
INTERRUPTED = f"""
from megatron_q3n.run_directory import StopRequest
from tests.rl.test_reward_workers import RewardConfig, RewardWorkers, sample_of
stop = StopRequest(None, 0.0)
stop.listen()
samples = [sample_of("slow", {{"value": n}}) for n in range(6)]
with RewardWorkers(RewardConfig(kind="function", function="{HERE}:score_with_fault", failure_score=-1)) as workers:
    workers.wait_until_ready()
    print("scoring", *(process._process.pid for process in workers._processes), flush=True)
    workers.score(samples)
print([(sample.score, sample.failure) for sample in samples], stop.reason())
"""


def score_with_fault(answer: str, arguments: dict[str, Any]) -> Any:
    """Fail in the way that the answer names, otherwise return the score in the arguments."""
    if answer == "hang":
        time.sleep(3600)
    if answer == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if answer == "leave":
        os._exit(0)
    if answer == "raise":
        raise RuntimeError("no")
    if answer == "crash once":
        marker = Path(tempfile.gettempdir()) / "crashed"
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    if answer == "slow":
        time.sleep(0.5)
    if answer == "print":
        print('{"score": 99}')
    values: dict[str, Any] = {"nan": float("nan"), "none": None, "text": "1", "list": [1.0], "large": 2e6, "true": True}
    return values[answer] if answer in values else float(arguments["value"])


def sample_of(text: str, arguments: dict[str, Any]) -> Sample:
    return Sample(Prompt(0, [1], arguments), 0, [1], [0.0], "stop", 0, text=text)


def scored(settings: RewardConfig, samples: list[Sample]) -> list[tuple[float, str | None]]:
    with RewardWorkers(settings) as workers:
        workers.score(samples)
    return [(sample.score, sample.failure) for sample in samples]


def test_a_failing_scoring_function_affects_its_own_response_only() -> None:
    settings = RewardConfig(
        kind="function", function=f"{HERE}:score_with_fault", time_limit_seconds=1, failure_score=-1, workers=2
    )
    answers = ["fine", "hang", "crash", "leave", "raise", "print", "nan", "fine", "hang", "none", "text", "list"]
    answers += ["large", "true", "fine", "crash once"]
    results = scored(settings, [sample_of(answer, {"value": n}) for n, answer in enumerate(answers)])
    assert results == [
        (0, None),
        (-1, "time limit"),
        (-1, "crash"),
        (-1, "crash"),
        (-1, "RuntimeError: no"),
        (5, None),
        (-1, "a score of nan; it must be a number from -1e+06 to 1e+06"),
        (7, None),
        (-1, "time limit"),
        (-1, "a score of type NoneType; return a number"),
        (-1, "a score of type str; return a number"),
        (-1, "a score of type list; return a number"),
        (-1, "a score of 2e+06; it must be a number from -1e+06 to 1e+06"),
        (1, None),
        (14, None),
        (15, None),
    ]


def test_task_scores_and_an_answer_that_is_evaluated_sees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """reasoning-gym's scorer of this task calls eval on the answer; the answer reads the key with a length oracle."""
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    arguments = {"task": "chain_sum", "settings": {"min_terms": 2, "max_terms": 2}, "seed": 5, "index": 77}
    evaluating = {"task": "string_insertion", "settings": {}, "seed": 5, "index": 0}
    attack = "__import__('time').sleep(3600 if 'WANDB_API_KEY' in __import__('os').environ else 0)"
    executed = "__import__('time').sleep(3600)"
    starts_process = "__import__('os').fork() and __import__('time').sleep(3600)"
    samples = [sample_of(text, arguments) for text in ("15061", "15062", "")]
    samples += [sample_of(text, evaluating) for text in (executed, attack, starts_process)]
    results = scored(RewardConfig(workers=1, time_limit_seconds=1), samples)
    assert results[:3] == [(1, None), (0, None), (0, None)]
    assert results[3] == (0, "time limit"), "this scorer no longer evaluates answers; attack another one"
    assert results[4][1] is None
    assert results[5][1] is None


def test_an_answer_pattern_runs_within_the_time_limit() -> None:
    """The pattern backtracks without end on a text; the thread of the trainer does not run it."""
    settings = RewardConfig(
        kind="math_verify",
        answer_pattern=r"(?:\s*\w+\s*)+answer: (\d+)",
        time_limit_seconds=0.5,
        failure_score=-2,
        workers=1,
    )
    texts = ["the answer: 42", "a" * 40, "no", "the answer: 41"]
    began = time.monotonic()
    results = scored(settings, [sample_of(text, {"answer": "42"}) for text in texts])
    assert results == [(1, None), (-2, "time limit"), (-2, NO_ANSWER), (0, None)]
    assert time.monotonic() - began < 60, "a pattern on 40 characters takes minutes without the limit"


def test_a_missing_scoring_function_is_named_in_the_error() -> None:
    settings = RewardConfig(kind="function", function=f"{HERE}:nothing", workers=1)
    with pytest.raises(UserError, match="nothing does not start"):
        scored(settings, [sample_of("1", {})])


@contextmanager
def broken_workers(how: str) -> Iterator[RewardWorkers]:
    settings = RewardConfig(workers=1, failure_score=-1, time_limit_seconds=5)
    with RewardWorkers(settings, lambda _scratch: [sys.executable, "-c", BROKEN_WORKER, how]) as workers:
        yield workers


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("twice", "a reply that belongs to no request"),
        ("foreign", "a reply that belongs to no request"),
        ("text", "a reply that is not JSON"),
        ("list", "a reply of another form"),
        ("end", "crash"),
    ],
)
def test_a_reply_to_no_request_ends_the_process_and_shifts_no_score(how: str, reason: str) -> None:
    samples = [sample_of(text, {}) for text in ("1", "bad", "2", "3", "bad", "4")]
    with broken_workers(how) as workers:
        workers.score(samples)
    expected = [(1, None), (-1, reason), (2, None), (3, None), (-1, reason), (4, None)]
    assert [(sample.score, sample.failure) for sample in samples] == expected


def test_a_line_after_the_reply_is_not_the_next_reply() -> None:
    with broken_workers("late") as workers:
        for text, score in (("bad", 3), ("1", 1), ("bad", 3), ("2", 2)):
            sample = sample_of(text, {})
            workers.score([sample])
            # the surplus line arrives with the reply, or later
            assert sample.score == score or (text == "bad" and sample.failure == "a reply that belongs to no request")
            time.sleep(0.1)


def test_an_idle_process_that_is_killed_is_replaced_and_no_response_is_lost() -> None:
    with broken_workers("") as workers:
        workers.score([sample_of("1", {})])
        for _ in range(2):
            os.kill(workers._processes[0]._process.pid, signal.SIGKILL)
            time.sleep(0.1)
            samples = [sample_of("2", {}), sample_of("3", {})]
            workers.score(samples)
            assert [(sample.score, sample.failure) for sample in samples] == [(2, None), (3, None)]


def test_a_worker_that_is_killed_while_it_scores_loses_no_response() -> None:
    settings = RewardConfig(kind="function", function=f"{HERE}:score_with_fault", workers=1, failure_score=-1)
    sample = sample_of("slow", {"value": 3})
    with RewardWorkers(settings) as workers:
        workers.wait_until_ready()
        killed = workers._processes[0]._process.pid
        timer = threading.Timer(0.25, os.killpg, (killed, signal.SIGKILL))
        timer.start()
        workers.score([sample])
        timer.join()
        assert workers._processes[0]._process.pid != killed
    assert (sample.score, sample.failure) == (3, None)


def test_a_worker_that_is_killed_while_it_starts_is_replaced() -> None:
    with broken_workers("") as workers:
        os.killpg(workers._processes[0]._process.pid, signal.SIGKILL)
        samples = [sample_of("2", {}), sample_of("3", {})]
        workers.score(samples)
        assert [(sample.score, sample.failure) for sample in samples] == [(2, None), (3, None)]
    settings = RewardConfig(kind="function", function=f"{HERE}:score_with_fault", workers=2)
    with RewardWorkers(settings) as workers:
        # as the kernel does where memory runs out, inside of the namespaces
        time.sleep(0.3)
        for child in psutil.Process(workers._processes[0]._process.pid).children(recursive=True)[-1:]:
            child.kill()
        workers.wait_until_ready()
        samples = [sample_of("fine", {"value": n}) for n in range(4)]
        workers.score(samples)
    assert [sample.score for sample in samples] == [0, 1, 2, 3]


def test_processes_have_their_own_session_and_a_bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches the foreground process group, of which the worker processes are no members."""
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("MODEL_KEY", "1")
    with broken_workers("") as workers:
        assert os.getpgid(workers._processes[0]._process.pid) != os.getpgrp()
        assert os.getsid(workers._processes[0]._process.pid) != os.getsid(0)
    settings = RewardConfig(kind="function", function="x:y", environment=["MODEL_KEY"])
    assert set(worker_variables(RewardConfig())) & {"WANDB_API_KEY", "MODEL_KEY"} == set()
    assert worker_variables(settings)["MODEL_KEY"] == "1"
    monkeypatch.delenv("MODEL_KEY")
    with pytest.raises(UserError, match="MODEL_KEY is not set"):
        worker_variables(settings)


@pytest.mark.parametrize("to_workers", [(), (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)])
def test_a_request_to_stop_interrupts_no_scoring(to_workers: tuple[signal.Signals, ...]) -> None:
    """Ctrl-C signals the foreground group; Slurm signals every process of a job step."""
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as trainer:
        assert trainer.stdout is not None
        word, *workers = trainer.stdout.readline().split()
        assert word == "scoring"
        time.sleep(0.6)
        os.killpg(trainer.pid, signal.SIGINT)
        for number in to_workers:
            for pid in workers:
                os.killpg(int(pid), number)
        output = trainer.stdout.read()
    assert output.strip() == f"{[(float(n), None) for n in range(6)]} SIGINT received"
    assert trainer.returncode == 0


def test_more_than_a_scoring_function_needs_is_refused_for_other_kinds() -> None:
    for setting in ({"network": True}, {"environment": ["A"]}, {"readable_paths": ["data"]}):
        with pytest.raises(ValidationError, match="only kind=function"):
            RewardConfig.model_validate(setting)


def test_a_readable_path_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("0.5")
    for paths, expected in (([str(tmp_path)], 0.5), ([], None)):
        settings = RewardConfig(kind="function", function=f"{HERE}:score_of_file", workers=1, readable_paths=paths)
        sample = sample_of("x", {"file": str(tmp_path / "words")})
        with RewardWorkers(settings) as workers:
            has_landlock = "Landlock" in workers.wait_until_ready()["files"]
            workers.score([sample])
        if expected is None and has_landlock:
            assert "PermissionError" in str(sample.failure)
        else:
            assert (sample.score, sample.failure) == (0.5, None)


def score_of_file(_answer: str, arguments: dict[str, Any]) -> float:
    """Return the number in a file."""
    return float(Path(arguments["file"]).read_text())
