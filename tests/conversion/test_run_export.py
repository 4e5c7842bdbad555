"""Export of a run: what other programs need beside the weights, without naming any folder."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_q3n.config import UserError, validate
from megatron_q3n.conversion.exporting import Export, export_weights
from megatron_q3n.conversion.run_tokenizer import TokenizerSource, published_folders, run_tokenizer
from megatron_q3n.data.chat_template import CHATML, ChatTemplate
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.hf import QWEN3_NEXT
from tests.conversion.test_published_tokenizer import CONVERSATION, TEXTS, chatml, plain, released_folder
from tests.hf.published import quiet

__all__ = ["chatml", "plain"]
MODEL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "kv_channels": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "mtp_num_layers": 0,
    "init_method_std": 0.2,
}


@pytest.fixture
def state(alone: Any) -> Any:
    from megatron_q3n.training.state import build_state

    training = {"sequence_length": 32, "micro_batch_size": 2, "global_batch_size": 2, "steps": 99}
    data = {"source": "blend", "train": [{"path": "unused"}]}
    return build_state(validate({"model": MODEL, "data": data, "training": training}), *alone)


def run_directory(path: Path, state: Any, **settings: Any) -> Path:
    """Write the checkpoint and the config.yaml of a run."""
    from megatron_q3n import checkpoint

    checkpoint.save(state, path)
    data = {"tokenizer": None, "source": "blend", "train": [{"path": "gone"}]} | settings.pop("data", {})
    (path / "config.yaml").write_text(yaml.safe_dump({"data": data, "checkpoint": {"load": None}} | settings))
    return path


def export(source: Path, output: Path, **options: Any) -> dict[str, Any]:
    export_weights(Export(source, output, QWEN3_NEXT, torch.float32, **options), quiet, quiet)
    return {path.name: json.loads(path.read_text()) for path in output.glob("*.json")}


@torch.no_grad()
def bits_per_byte(logits: torch.Tensor, ids: list[int], text: str) -> float:
    loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), torch.tensor(ids[1:]), reduction="sum")
    return loss.item() / math.log(2) / len(text.encode())


def test_a_fine_tuned_run_is_exported_as_a_chat_model(state: Any, chatml: TextTokenizer, tmp_path: Path) -> None:
    """Perplexity, conversations and stop tokens in transformers are ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_q3n.stages import chat_format

    run = run_directory(tmp_path / "run", state)
    template = ChatTemplate(CHATML, chatml)
    chat_format.save(run, chatml, template)
    files = export(run, tmp_path / "out")
    end_of_turn = chatml.id_of("<|im_end|>")
    assert files["config.json"]["eos_token_id"] == end_of_turn
    assert files["generation_config.json"]["eos_token_id"] == [end_of_turn, chatml.eod]

    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert model.generation_config.eos_token_id == [end_of_turn, chatml.eod]
    conversation = theirs.apply_chat_template(CONVERSATION)["input_ids"]
    assert conversation == template.encode(template.render(CONVERSATION))
    text = "\n".join(TEXTS[:6])
    ids, our_ids = theirs(text).input_ids, chatml.encode(text)
    tokens = torch.tensor([our_ids])
    with torch.no_grad():
        ours = state.models[0].eval()(tokens, torch.arange(tokens.shape[1])[None], None)
        found = model(torch.tensor([ids])).logits
    assert bits_per_byte(found, ids, text) == pytest.approx(bits_per_byte(ours, our_ids, text), abs=1e-4)


def test_a_pretraining_run_exports_the_tokenizer_of_its_settings(
    state: Any, chatml: TextTokenizer, tmp_path: Path
) -> None:
    """With Qwen's files, the tokens are those that Qwen's files name."""
    released = released_folder(tmp_path / "released", chatml)
    run = run_directory(tmp_path / "run", state, data={"tokenizer": str(released)})
    files = export(run, tmp_path / "out")
    assert files["tokenizer_config.json"]["eos_token"] == "<|im_end|>"
    assert files["config.json"]["eos_token_id"] == chatml.id_of("<|im_end|>")
    assert files["generation_config.json"]["temperature"] == 0.7
    # a continued run reads its corpus's tokenizer.json; the released files come from the checkpoint it started with
    bare = tmp_path / "bare"
    bare.mkdir()
    chatml.save(bare)
    load = {"checkpoint": {"load": str(run)}}
    continued = run_directory(tmp_path / "continued", state, data={"tokenizer": str(bare)}, **load)
    files = export(continued, tmp_path / "out2")
    assert files["tokenizer_config.json"]["eos_token"] == "<|im_end|>"
    assert files["generation_config.json"]["temperature"] == 0.7


def test_a_run_that_loaded_itself_is_followed_once(state: Any, tmp_path: Path) -> None:
    """As `checkpoint.load=runs/latest` reads after the run."""
    run = run_directory(tmp_path / "run", state, checkpoint={"load": str(tmp_path / "run")})
    saved = next((run / "checkpoints").glob("step_*")).resolve()
    assert list(published_folders(saved)) == [saved / "huggingface"]


def test_a_folder_to_be_like_does_not_replace_the_tokenizer(
    state: Any, plain: TextTokenizer, chatml: TextTokenizer, tmp_path: Path
) -> None:
    like = released_folder(tmp_path / "released", chatml)
    ids = {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 3, "model_type": "qwen3_next", "their_field": 4}
    (like / "config.json").write_text(json.dumps(ids))
    plain.save(tmp_path)
    run = run_directory(tmp_path / "run", state, data={"tokenizer": str(tmp_path)})
    files = export(run, tmp_path / "out", like=like)
    assert TextTokenizer.load(tmp_path / "out").fingerprint == plain.fingerprint
    token_ids = {name: files["config.json"][name] for name in ids}
    assert token_ids == ids | {"eos_token_id": plain.eod, "bos_token_id": None, "pad_token_id": None}
    assert files["generation_config.json"] == {"eos_token_id": plain.eod, "pad_token_id": plain.eod}
    # with its own tokenizer, all of its values hold
    files = export(run, tmp_path / "out2", like=like, tokenizer=TokenizerSource(like))
    assert {name: files["config.json"][name] for name in ids} == ids


def test_a_checkpoint_alone_is_exported_without_a_tokenizer_and_says_so(state: Any, tmp_path: Path) -> None:
    from megatron_q3n import checkpoint

    notes: list[str] = []
    saved = checkpoint.save(state, tmp_path / "saved")
    assert run_tokenizer(saved) is None
    export_weights(Export(saved, tmp_path / "out", QWEN3_NEXT), notes.append, quiet)
    assert "exporting without a tokenizer; --tokenizer FOLDER adds one" in notes[0]
    assert not list((tmp_path / "out").glob("*token*"))


def test_missing_and_too_large_tokenizers_are_refused_before_the_weights_are_read(
    state: Any, chatml: TextTokenizer, tmp_path: Path
) -> None:
    run = run_directory(tmp_path / "run", state)
    with pytest.raises(UserError, match=r"data folder gone does not exist.*Or give its tokenizer with --tokenizer"):
        export(run, tmp_path / "out")
    with pytest.raises(UserError, match=r"tokenizer .*nowhere"):
        export(run, tmp_path / "out", tokenizer=TokenizerSource(tmp_path / "nowhere"))
    content = json.loads(chatml.content)
    last = content["added_tokens"][-1]
    content["added_tokens"] += [last | {"id": i, "content": f"<|{i}|>"} for i in range(last["id"] + 1, 513)]
    TextTokenizer(content, "<|endoftext|>").save(tmp_path)
    with pytest.raises(UserError, match=r"has 513 tokens, more than the model's vocabulary of 512"):
        export(run, tmp_path / "out", tokenizer=TokenizerSource(tmp_path))
    assert not (tmp_path / "out").exists()
