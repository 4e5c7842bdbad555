"""Evaluate stage: correct results in every layout, output files, and one message for bad input.

One small checkpoint with random weights. Draft acceptance itself is tested in tests/model/mtp.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_q3n.config import UserError, validate
from megatron_q3n.data.tokenizer import TextTokenizer
from tests.inference.tiny_model import full_logits, tiny_model

ROOT = Path(__file__).parents[2]
MODEL = {"hidden_size": 32, "vocab_size": 512, "max_position_embeddings": 512}
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
COMPLETION = """output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""
QUESTIONS = [{"question": f"x = {i}\ny =", "choices": [f" {i}", " None", " self"], "answer": i % 3} for i in range(10)]


@pytest.fixture(scope="module")
def run_dir(alone: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a checkpoint, on the standard library's tokens."""
    from megatron_q3n import checkpoint
    from megatron_q3n.training.state import build_state
    from tests.inference.tiny_model import move_from_init

    folder = tmp_path_factory.mktemp("evaluated") / "run"
    config = validate({"model": MODEL, "training": {"sequence_length": 32}})
    state = build_state(config, *alone)
    move_from_init(state.models[0])
    checkpoint.save(state, folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return folder


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two local tasks over one local file."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, kind in (("choosing", CHOICE), ("completing", COMPLETION)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)
    return folder


def request(run_dir: Path, **evaluate: Any) -> Any:
    return validate({"stage": "evaluate", "checkpoint": {"load": str(run_dir)}, "evaluate": evaluate})


def test_losses_and_bytes_by_position_match_the_logits(alone: Any) -> None:
    from megatron_q3n.evaluation.held_out_loss import MeasurementSettings, measure_sequences

    model = tiny_model(alone)
    tokens = torch.randint(0, 64, (3, 17), generator=torch.Generator().manual_seed(0))
    num_bytes = torch.arange(64)
    counts = torch.tensor([True, False, True])
    sums = measure_sequences(model, [(tokens, counts)], MeasurementSettings(num_bytes, 4, 0, 4, 0, 64))
    wanted = torch.zeros(4, 3, dtype=torch.float64)
    for row in (0, 2):
        log_p = full_logits(model, tokens[row, :-1].tolist()).log_softmax(-1)
        for place, token in enumerate(tokens[row, 1:].tolist()):
            wanted[place // 4] += torch.tensor([-log_p[place, token].item(), 1, token])
    torch.testing.assert_close(sums.text, wanted, rtol=0, atol=1e-3)


def test_the_text_defaults_to_that_of_the_run(run_dir: Path) -> None:
    from megatron_q3n.stages.trained_model import with_checkpoint_data

    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    saved["data"] |= {"stdlib_vocab_size": 300, "stdlib_packages": ["yaml"], "cache_dir": "there"}
    beside = run_dir.parent / "another"
    source = beside / "checkpoints/step_0000001"
    source.mkdir(parents=True)
    assert with_checkpoint_data(source, validate({})) == validate({}), "no run directory around it"
    (beside / "config.yaml").write_text(yaml.safe_dump(saved))
    found = with_checkpoint_data(source, validate({"data": {"cache_dir": "here"}})).data
    assert (found.stdlib_vocab_size, found.stdlib_packages) == (300, ["yaml"])
    assert found.cache_dir == str(Path("here").absolute())
    named = validate({"data": {"stdlib_vocab_size": 400}})
    assert with_checkpoint_data(source, named) == named
    saved["data"].pop("stdlib_packages")  # a run from before there were any
    (beside / "config.yaml").write_text(yaml.safe_dump(saved))
    assert with_checkpoint_data(source, validate({})).data.stdlib_packages == []


def test_results_are_computed_from_the_sums() -> None:
    from megatron_q3n.evaluation.held_out_loss import EvaluationSums
    from megatron_q3n.evaluation.results import summarize_data_set

    wanted = request(Path("unused"), position_buckets=1, draft_depth=2, context_tokens=8, draft_stride=2)
    drafts = torch.tensor([[[10, 10, 8, 10, 6], [10, 8, 4, 5, 2]]], dtype=torch.float64)
    text = torch.tensor([[math.log(2) * 300, 100, 200]], dtype=torch.float64)
    results = summarize_data_set(EvaluationSums(text, drafts), wanted.evaluate)
    assert results["bits_per_byte"] == pytest.approx(1.5)
    assert results["perplexity"] == pytest.approx(8)
    assert results["drafts"]["greedy"] == {"acceptance": [0.8, 0.5], "tokens_per_pass": pytest.approx(2.2)}
    assert results["drafts"]["drawn"] == {"acceptance": [0.6, 0.4], "tokens_per_pass": pytest.approx(1.8)}
    assert results["by_position"][0]["to"] == 8


def test_text_drafts_recall_and_tasks_of_a_run(run_dir: Path, tasks_dir: Path, run_module: Callable[..., Any]) -> None:
    done = run_module(
        "--config-name",
        "evaluate",
        f"checkpoint.load={run_dir}",
        "evaluate.draft_depth=2",
        "evaluate.num_sequences=6",
        "evaluate.context_tokens=64",
        "evaluate.batch_size=4",
        "evaluate.draft_stride=16",
        f"evaluate.tasks_dir={tasks_dir}",
        "evaluate.tasks=[choosing,completing]",
        "evaluate.recall_lengths=[16,64]",
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((run_dir / "evaluation.json").read_text())
    (found,) = results["sets"].values()
    assert found["tokens"] == 6 * 64
    assert found["drafts"]["places"] == 6 * 4
    assert 0 <= results["tasks"]["choosing"]["acc"] <= 1
    assert "exact_match" in results["tasks"]["completing"]
    for length in (16, 64):
        recall = results["tasks"][f"repeat {length} tokens"]
        assert 0 <= recall["accuracy"] < 0.5
        assert recall["loss"] > 1
        assert recall["loss of the first copy"] > 1
    report = (run_dir / "report.html").read_text()
    for words in ("Held-out text: validation", "Draft acceptance: validation", "choosing", "loss of the first copy"):
        assert words in report


def test_harness_scores_match_the_model(alone: Any, tmp_path: Path) -> None:
    """Scores match the logits of unpacked sequences; completions are the greedy tokens."""
    from lm_eval.api.instance import Instance

    from megatron_q3n.data.folders import cache_root
    from megatron_q3n.data.stdlib import prepare_stdlib
    from megatron_q3n.evaluation.harness_adapter import HarnessModel

    tokenizer = TextTokenizer.load(prepare_stdlib(cache_root(None), 512, 5.0).train)
    model = tiny_model(alone, vocab_size=512)
    adapter = HarnessModel(model, tokenizer, alone[1].groups.dp, tokens_per_pass=24, draft_depth=1)
    pairs = [("def f(x):\n    return", " x"), ("", "class A:"), ("import os", "\nimport sys\n")]
    scores = adapter.loglikelihood(
        [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True
    )
    for (context, continuation), (score, _) in zip(pairs, scores):
        before = tokenizer.encode(context) if context else [tokenizer.eod]
        whole = tokenizer.encode(context + continuation) if context else before + tokenizer.encode(continuation)
        log_p = full_logits(model, whole[:-1]).log_softmax(-1)
        wanted = sum(log_p[i - 1, whole[i]].item() for i in range(len(before), len(whole)))
        assert score == pytest.approx(wanted, abs=1e-3)
    requested = Instance("generate_until", {}, ("def ", {"until": ["\n"], "max_gen_toks": 5}), 0)
    tokens = tokenizer.encode("def ")
    for _ in range(5):
        tokens.append(int(full_logits(model, tokens)[-1, : tokenizer.vocab_size].argmax()))
    text = tokenizer.decode(tokens[-5:]).split("\n")[0]
    assert adapter.generate_until([requested]) == [text]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"num_sequences": 0}, "leave nothing to measure"),
    "tasks without files": ({"tasks": ["a"]}, "needs evaluate.tasks_dir"),
    "stretches": ({"context_tokens": 100, "position_buckets": 8}, "not divisible by evaluate.position_buckets"),
    "no position to draft": ({"draft_depth": 1, "draft_stride": 512}, "no position would be scored"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_rejected_by_validation(case: str) -> None:
    evaluate, message = BAD[case]
    with pytest.raises(UserError, match=message):
        request(Path("anywhere"), **evaluate)


def test_a_checkpoint_is_needed() -> None:
    with pytest.raises(UserError, match=r"checkpoint\.load=RUN_DIR"):
        validate({"stage": "evaluate"})


BAD_INPUT = {
    "no such folder of tasks": (["evaluate.tasks=[a]", "evaluate.tasks_dir=/nowhere"], "does not exist"),
    "a file that cannot be written": (["evaluate.output=/nowhere/out.json"], "Nothing was computed"),
    "rows longer than positions": (["evaluate.context_tokens=1024"], "max_position_embeddings=512"),
    "recall longer than positions": (["evaluate.recall_lengths=[16,300]"], "two copies of 300 tokens"),
    "no such task": (["evaluate.num_sequences=0", "evaluate.tasks=[a]", "evaluate.tasks_dir=TASKS"], "has no task a"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message(case: str, run_dir: Path, tasks_dir: Path, run_module: Callable[..., Any]) -> None:
    words, message = BAD_INPUT[case]
    words = [word.replace("TASKS", str(tasks_dir)) for word in words]
    done = run_module("--config-name", "evaluate", f"checkpoint.load={run_dir}", *words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", [b"", b"[1]", b"data: 3", b"\xff", b"a: &a [*a]", b"data: {source: [1]}"])
def test_a_damaged_configuration_of_the_run_is_one_message(run_dir: Path, tmp_path: Path, content: bytes) -> None:
    from megatron_q3n.stages.trained_model import with_checkpoint_data

    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml|data\.source"):
        with_checkpoint_data(tmp_path / "checkpoints/step_0000001", request(run_dir))


def test_without_lm_eval_the_error_names_the_requirements_file(
    run_dir: Path, tasks_dir: Path, tmp_path: Path, run_module: Callable[..., Any]
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['lm_eval'] = None\n")
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    done = run_module(
        "--config-name",
        "evaluate",
        f"checkpoint.load={run_dir}",
        "evaluate.num_sequences=0",
        "evaluate.tasks=[choosing]",
        f"evaluate.tasks_dir={tasks_dir}",
        environment={"PYTHONPATH": path},
    )
    assert done.returncode == 2, done.stderr
    assert "requirements-eval.txt" in done.stderr


LAYOUTS = {"tp2": ["parallel.tensor_model_parallel_size=2"], "ep2": ["parallel.expert_model_parallel_size=2"]}


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_give_the_results_of_one(layout: str, run_dir: Path, tasks_dir: Path, tmp_path: Path) -> None:
    """Held-out loss, greedy drafts, recall, tasks; with expert parallelism each rank has different sequences."""
    words = [
        "--config-name",
        "evaluate",
        f"checkpoint.load={run_dir}",
        "evaluate.draft_depth=2",
        "evaluate.num_sequences=5",
        "evaluate.context_tokens=64",
        "evaluate.batch_size=2",
        "evaluate.draft_stride=16",
        f"evaluate.tasks_dir={tasks_dir}",
        "evaluate.tasks=[choosing,completing]",
        "evaluate.recall_lengths=[5,40]",
        "evaluate.num_recall_sequences=7",
    ]
    found = {}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, launch, more in (("one", [], []), ("two", torchrun, LAYOUTS[layout])):
        output = tmp_path / f"{name}.json"
        command = [*launch, "-m", "megatron_q3n.train", *words, *more, f"evaluate.output={output}"]
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
        found[name] = json.loads(output.read_text())
    one, two = (found[name]["sets"]["validation"] for name in ("one", "two"))
    assert two["tokens"] == one["tokens"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["drafts"]["greedy"] == one["drafts"]["greedy"]
    recalled = [f"repeat {length} tokens" for length in (5, 40)]
    for task in recalled:
        one, two = (found[name]["tasks"].pop(task) for name in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-5)
    assert found["two"]["tasks"] == found["one"]["tasks"]


def results_of(checkpoint: str, loss: float) -> dict[str, Any]:
    return {"checkpoint": checkpoint, "sets": {}, "tasks": {"choosing": {"acc": loss}}}


def test_a_second_evaluation_keeps_the_results_of_the_first(tmp_path: Path) -> None:
    from megatron_q3n.evaluation.results import earlier_results, write_results

    settings = request(tmp_path, output=str(tmp_path / "out.json")).evaluate
    source = tmp_path / "run/checkpoints/step_0000001"
    for loss in (1.0, 2.0, 2.0, 3.0):
        write_results(results_of("a", loss), earlier_results(source, settings), source, settings)
    written = json.loads((tmp_path / "out.json").read_text())
    found = [written, *written["earlier"]]
    assert [entry["tasks"]["choosing"]["acc"] for entry in found] == [3.0, 2.0, 1.0], "equal results once"


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"a": 1}', b"\xff", b'{"checkpoint": "a", "sets": {}}'])
def test_a_file_that_holds_no_results_is_not_replaced(tmp_path: Path, content: bytes) -> None:
    from megatron_q3n.evaluation.results import earlier_results

    (tmp_path / "out.json").write_bytes(content)
    settings = request(tmp_path, output=str(tmp_path / "out.json")).evaluate
    with pytest.raises(UserError, match=r"out\.json exists and holds no results"):
        earlier_results(tmp_path / "run/checkpoints/step_0000001", settings)
    assert (tmp_path / "out.json").read_bytes() == content
