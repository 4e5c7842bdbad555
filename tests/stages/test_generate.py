"""Stage generate and tools/generate.py: completions, and one clear error message for bad input.

One small checkpoint with random weights.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_q3n.config import RunConfig, UserError, validate
from megatron_q3n.data.tokenizer import TextTokenizer, train_bpe
from tests import forked
from tests.server.tiny_server import chat_tokenizer

ROOT = Path(__file__).parent.parent.parent
TEXTS = ["def main(argument):\n    return argument + 1\n"] * 20
SETTINGS = {
    "model": {"hidden_size": 32, "vocab_size": 320, "max_position_embeddings": 512},
    "data": {"source": "blend", "train": [{"path": "unused"}]},
    "training": {"sequence_length": 32, "micro_batch_size": 2, "global_batch_size": 2},
}


@pytest.fixture(scope="module")
def trained(alone: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directories with and without MTP: a checkpoint, and the tokenizer that its configuration names."""
    from megatron_q3n import checkpoint
    from megatron_q3n.training.state import build_state

    folder = tmp_path_factory.mktemp("trained")
    (folder / "tokenizer").mkdir()
    train_bpe(TEXTS, 300).save(folder / "tokenizer")
    for name, model in (("run", {}), ("no-mtp", {"mtp_num_layers": 0})):
        config = validate({**SETTINGS, "model": {**SETTINGS["model"], **model}})
        checkpoint.save(build_state(config, *alone), folder / name)
        tree = config.model_dump(mode="json")
        tree["data"]["tokenizer"] = str(folder / "tokenizer")
        (folder / name / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder


def request(trained: Path, name: str = "run", **inference: Any) -> RunConfig:
    return validate(
        {
            "stage": "generate",
            "checkpoint": {"load": str(trained / name)},
            "inference": {"prompts": ["def main"], "max_new_tokens": 8, **inference},
        }
    )


def test_text_from_a_checkpoint(trained: Path, run_module: Callable[..., Any]) -> None:
    done = run_module(
        "--config-name",
        "generate",
        f"checkpoint.load={trained / 'run'}",
        "inference.draft_depth=2",
        'inference.prompts=["def main"]',
        "inference.max_new_tokens=12",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def main")
    assert "12 tokens in" in done.stderr
    assert "drafts accepted by depth" in done.stderr


def test_the_tool_accepts_any_text_and_writes_results(trained: Path, tmp_path: Path) -> None:
    prompts = ['f"${name}" \\ {x: [1]}\n\té', "class A:"]
    done = forked.run(
        ROOT / "tools" / "generate.py",
        trained / "run",
        *prompts,
        "--tokens",
        "5",
        "--temperature",
        "0",
        "--output",
        tmp_path / "out.jsonl",
        "--stop",
        "a",
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [result["prompt"] for result in results] == prompts
    tokenizer = TextTokenizer.load(trained / "tokenizer")
    for result in results:
        shown = [t for t in result["tokens"] if t not in (tokenizer.eod, tokenizer.id_of("a"))]
        assert result["text"] == tokenizer.decode(shown)
        assert len(result["logprobs"]) == len(result["tokens"]) <= 5


@pytest.mark.parametrize(
    ("name", "inference", "message"),
    [
        ("run", {"prompts": []}, "inference.prompts is empty"),
        ("nothing", {}, "no checkpoint found"),
        ("nothing", {"output": "/nowhere/out.jsonl"}, "inference.output=/nowhere/out.jsonl.*Nothing was computed"),
        ("run", {"output": "/"}, "could not be written there .Is a directory"),
        ("run", {"prompts": ["x" * 900]}, "more than model.max_position_embeddings=512"),
        ("run", {"max_new_tokens": 600}, "Shorten the prompt or generate less"),
        ("run", {"stop": ["no such token"]}, "'no such token' is not one token"),
        ("run", {"stop": [300]}, "there is no token 300"),
        ("no-mtp", {"draft_depth": 1}, "needs a multi-token prediction layer"),
        ("run", {"tokenizer": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_bad_requests_are_refused(trained: Path, name: str, inference: Any, message: str, tmp_path: Path) -> None:
    from megatron_q3n.stages import generate

    with pytest.raises(UserError, match=message):
        generate.run(request(trained, name, **inference), tmp_path)


def test_empty_prompt_and_missing_checkpoint_are_refused_at_once(run_module: Callable[..., Any]) -> None:
    for settings, message in (
        (['inference.prompts=["a",""]', "checkpoint.load=x"], "prompt 2 is empty"),
        (['inference.prompts=["a"]'], "checkpoint.load=RUN_DIR"),
    ):
        done = run_module("--config-name", "generate", *settings)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_layouts_that_generation_does_not_support_are_refused(trained: Path, tmp_path: Path) -> None:
    from megatron_q3n.stages import generate

    for name in ("pipeline_model", "context"):
        tree = request(trained).model_dump(mode="json")
        tree["parallel"] |= {f"{name}_parallel_size": 2, "world_size": 2}
        with pytest.raises(UserError, match=f"parallel.{name}_parallel_size=2"):
            generate.run(validate(tree), tmp_path)


def test_stop_tokens_by_id_by_text_and_by_name(trained: Path) -> None:
    from megatron_q3n.stages.generate import to_sampling

    tokenizer = TextTokenizer.load(trained / "tokenizer")
    settings = request(trained, stop=[7, "a", "<|endoftext|>"]).inference
    assert to_sampling(settings, tokenizer, frozenset({tokenizer.eod})).stop_tokens == {
        *(7, tokenizer.encode("a")[0], tokenizer.eod)
    }


def test_model_settings_override_those_of_the_checkpoint(trained: Path) -> None:
    from megatron_q3n import checkpoint
    from megatron_q3n.stages.trained_model import with_checkpoint_model

    source = checkpoint.find(trained / "run")
    tree = request(trained).model_dump(mode="json")
    tree["model"]["rotary_base"] = 5e6
    config = with_checkpoint_model(source, validate(tree))
    assert (config.model.hidden_size, config.model.rotary_base) == (32, 5e6)


def test_characters_that_span_several_tokens_are_decoded_whole(trained: Path) -> None:
    from megatron_q3n.inference.detokenizer import IncrementalDetokenizer

    tokenizer = TextTokenizer.load(trained / "tokenizer")
    text = IncrementalDetokenizer(tokenizer, frozenset({tokenizer.eod}))
    ids = tokenizer.encode("naïve 漢字 🙂!")
    shown = [text.add([i]) for i in [*ids, tokenizer.eod]]
    assert len(ids) > len("naïve 漢字 🙂!"), "some characters span several tokens"
    assert "".join(shown) == "naïve 漢字 🙂!"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(shown)
    incomplete = tokenizer.encode("漢")[:1]
    assert text.add(incomplete) == ""
    assert text.flush() == "\N{REPLACEMENT CHARACTER}"


def test_a_text_ends_at_the_end_of_turn_of_the_chat_template(
    trained: Path, tmp_path: Path, run_module: Callable[..., Any]
) -> None:
    """At the highest temperature every token is about equally likely, so some texts draw <|im_end|>."""
    from megatron_q3n.data.chat_template import CHATML, ChatTemplate
    from megatron_q3n.stages import chat_format

    tokenizer, run_dir = chat_tokenizer(), tmp_path / "run"
    end_of_turn = tokenizer.id_of("<|im_end|>")
    shutil.copytree(trained / "run", run_dir)
    chat_format.save(run_dir, tokenizer, ChatTemplate(CHATML, tokenizer))
    output = tmp_path / "texts.jsonl"
    done = run_module(
        *("--config-name", "generate", f"checkpoint.load={run_dir}", f"inference.output={output}"),
        *("inference.prompts=[a,b,c,d]", "inference.max_new_tokens=300", "inference.temperature=1000"),
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in output.read_text().splitlines()]
    ended = [result for result in results if result["tokens"][-1] == end_of_turn]
    assert ended
    assert {result["finish_reason"] for result in ended} == {"stop"}
    assert not any(end_of_turn in result["tokens"][:-1] or "<|im_end|>" in result["text"] for result in results)
    source = run_dir / "checkpoints" / "step_0000000"
    assert chat_format.stop_tokens(source, tokenizer) == {tokenizer.eod, end_of_turn}
    assert chat_format.stop_tokens(trained / "run" / "checkpoints" / "step_0000000", tokenizer) == {tokenizer.eod}
