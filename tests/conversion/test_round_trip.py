"""Round trips of transformers' models through our checkpoints: equal logits, equal bits, no extra parameter.

One process and one layout here; other layouts are covered by tests/checkpoint and tests/tools/layouts. Reading a part
of a tensor shows that a conversion's chunks can be resharded.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from megatron_q3n.config import UserError, validate
from megatron_q3n.conversion.exporting import Export, export_weights
from megatron_q3n.conversion.importing import import_weights
from megatron_q3n.conversion.tensor_chunks import TensorChunk
from megatron_q3n.conversion.torch_dist import SavedTensors
from megatron_q3n.hf import FAMILIES, QWEN3_5_MOE, QWEN3_5_MOE_TEXT, QWEN3_NEXT, Family
from megatron_q3n.hf.weights import CONFIG, INDEX
from tests.hf.published import as_released, publish, quiet, stored, transformers_model

TEXT_FAMILIES = [QWEN3_NEXT, QWEN3_5_MOE_TEXT]
TOKENS = torch.randint(0, 96, (2, 75), generator=torch.Generator().manual_seed(3))


def by_type(family: Family) -> str:
    return family.model_type


def state_from(alone: Any, checkpoint: Path, **precision: str) -> Any:
    """Build our model with the dimensions that the import found, and load it."""
    from megatron_q3n import checkpoint as checkpointing
    from megatron_q3n.training.state import build_state

    section = json.loads((checkpoint / "checkpoint.json").read_text())["model"]
    data = {"source": "blend", "train": [{"path": "unused"}]}
    training = {"sequence_length": 32, "micro_batch_size": 2, "global_batch_size": 2, "steps": 99}
    tree = {"model": section, "data": data, "training": training, "precision": precision}
    state = build_state(validate(tree), *alone)
    checkpointing.load(state, checkpoint, resume=False, with_optimizer=False)
    return state


@torch.no_grad()
def our_logits(state: Any) -> torch.Tensor:
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    return state.models[0].eval()(TOKENS, positions, None)


@torch.no_grad()
def load_with_transformers(folder: Path) -> nn.Module:
    """Load an export as any user would, with nothing missing, unexpected or of another shape."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("family", TEXT_FAMILIES, ids=by_type)
def test_imports_with_the_same_logits(alone: Any, tmp_path: Path, family: Family) -> None:
    theirs = transformers_model(family.model_type)
    imported = import_weights(publish(tmp_path / "hf", theirs), tmp_path / "ours", quiet, quiet)
    assert imported.num_left_out == 0
    state = state_from(alone, imported.checkpoint)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(state), theirs(TOKENS).logits, rtol=0, atol=1e-4)
    assert state.step == 0


@pytest.mark.parametrize("family", TEXT_FAMILIES, ids=by_type)
@pytest.mark.parametrize("stored_head", [False, True])
def test_tied_embeddings_are_imported(alone: Any, tmp_path: Path, family: Family, stored_head: bool) -> None:
    """The head is a copy of the embedding, with transformers' logits; a head in the file is ignored, as there."""
    theirs = transformers_model(family.model_type, tie_word_embeddings=True)
    source = publish(tmp_path / "hf", theirs)
    assert "lm_head.weight" not in stored(source)
    if stored_head:
        save_file({"lm_head.weight": torch.ones(96, 32)}, source / "head.safetensors")
        index = json.loads((source / INDEX).read_text())
        index["weight_map"]["lm_head.weight"] = "head.safetensors"
        (source / INDEX).write_text(json.dumps(index))
    notes: list[str] = []
    imported = import_weights(source, tmp_path / "ours", notes.append, quiet)
    assert "the head is a copy" in notes[0]
    state = state_from(alone, imported.checkpoint)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(state), theirs(TOKENS).logits, rtol=0, atol=1e-4)
    export_weights(Export(imported.checkpoint, tmp_path / "out", family, torch.float32), quiet, quiet)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["tie_word_embeddings"] is False
    with torch.no_grad():
        logits = load_with_transformers(tmp_path / "out")(TOKENS).logits
    torch.testing.assert_close(logits, our_logits(state), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", TEXT_FAMILIES, ids=by_type)
def test_a_trained_state_exports_with_the_same_logits(alone: Any, tmp_path: Path, family: Family) -> None:
    from megatron_q3n import checkpoint
    from megatron_q3n.data.batch import causal_batch
    from megatron_q3n.training.step import train_step

    theirs = transformers_model(family.model_type)
    imported = import_weights(publish(tmp_path / "hf", theirs), tmp_path / "ours", quiet, quiet)
    state = state_from(alone, imported.checkpoint)
    rows = torch.randint(0, 96, (2, 33), generator=torch.Generator().manual_seed(1))
    batch = causal_batch(rows[:, :-1], rows[:, 1:].contiguous(), torch.ones(2, 32))
    for _ in range(2):
        train_step(state, [batch])
    checkpoint.save(state, tmp_path / "run")
    export = Export(tmp_path / "run", tmp_path / "out", family, torch.float32, max_shard_bytes=50_000)
    export_weights(export, quiet, quiet)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5
    loaded = load_with_transformers(tmp_path / "out")
    with torch.no_grad():
        logits = loaded(TOKENS).logits
        moved = (logits - theirs(TOKENS).logits).abs().max()
    assert moved > 1e-2, "the training should show"
    torch.testing.assert_close(our_logits(state), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", TEXT_FAMILIES, ids=by_type)
def test_bf16_comes_back_bit_for_bit(tmp_path: Path, family: Family) -> None:
    """Multi-token prediction included; where a family publishes fp32 beside bf16, so do we."""
    model = transformers_model(family.model_type)
    source = publish(tmp_path / "hf", model, torch.bfloat16)
    import_weights(source, tmp_path / "ours", quiet, quiet)
    export_weights(Export(tmp_path / "ours", tmp_path / "out", family), quiet, quiet)
    import_weights(tmp_path / "out", tmp_path / "again", quiet, quiet)
    export_weights(Export(tmp_path / "again", tmp_path / "out2", family), quiet, quiet)
    expected, found, again = (stored(tmp_path / name) for name in ("hf", "out", "out2"))
    assert found.keys() == again.keys()
    assert all(torch.equal(found[name], again[name]) for name in found)
    if family.stacked_experts:
        for name in [name for name in expected if ".experts.0.gate" in name and "mtp" not in name]:
            stack = found[name.replace("0.gate_proj.weight", "gate_up_proj")]
            assert torch.equal(stack[0, :16], expected[name])
    else:
        assert found.keys() == expected.keys()
    for name in expected.keys() & found.keys():
        assert torch.equal(found[name].to(expected[name].dtype), expected[name]), name
        is_wide = bool(family.float32) and name.endswith(family.float32)
        assert found[name].dtype == (torch.float32 if is_wide else torch.bfloat16), name


def test_bf16_does_not_round_what_training_keeps_in_fp32(tmp_path: Path) -> None:
    source = publish(tmp_path / "hf", transformers_model("qwen3_next"))
    import_weights(source, tmp_path / "ours", quiet, quiet)
    export_weights(Export(tmp_path / "ours", tmp_path / "out", QWEN3_NEXT), quiet, quiet)
    expected, found = stored(source), stored(tmp_path / "out")
    for name in expected:
        if name.endswith(("A_log", "dt_bias", "linear_attn.norm.weight")):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-7)
        else:
            assert torch.equal(found[name], expected[name].bfloat16()), name


def test_the_released_form_of_qwen3_5_comes_and_goes(alone: Any, tmp_path: Path) -> None:
    """Text inside a multimodal model: the vision tower is left out on the way in, and put back."""
    text = transformers_model("qwen3_5_moe_text")
    released = as_released(tmp_path / "released", publish(tmp_path / "hf", text))
    imported = import_weights(released, tmp_path / "ours", quiet, quiet)
    assert imported.num_left_out == 1
    with torch.no_grad():
        expected = text(TOKENS).logits
    torch.testing.assert_close(our_logits(state_from(alone, imported.checkpoint)), expected, rtol=0, atol=1e-4)
    export = Export(imported.checkpoint, tmp_path / "out", QWEN3_5_MOE, torch.float32, like=released)
    export_weights(export, quiet, quiet)
    before, after = stored(released), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-7)
    with torch.no_grad():
        logits = load_with_transformers(tmp_path / "out")(TOKENS).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    shell = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert shell["image_token_id"] == 90
    assert shell["text_config"]["rope_parameters"]["rope_theta"] == 1e6
    alone_again = Export(imported.checkpoint, tmp_path / "x", QWEN3_5_MOE)
    with pytest.raises(UserError, match=r"its vision part is not in the checkpoint: give --like"):
        export_weights(alone_again, quiet, quiet)


def test_any_part_of_a_stored_tensor_can_be_read(alone: Any, tmp_path: Path) -> None:
    """Across the chunks of an import, and from the whole stacks that training saves."""
    from megatron_q3n import checkpoint

    source = publish(tmp_path / "hf", transformers_model("qwen3_next"))
    imported = import_weights(source, tmp_path / "ours", quiet, quiet)
    state = state_from(alone, imported.checkpoint)
    saved = checkpoint.save(state, tmp_path / "run")
    name = "decoder.layers.1.mlp.experts.linear_fc1.weight"
    parameter = dict(state.models[0].named_parameters())[name].detach()
    chunk = TensorChunk(name, tuple(parameter.shape), (1, 5, 3), (2, 20, 7))
    for folder in (imported.checkpoint, saved):
        assert torch.equal(SavedTensors(folder).read(chunk), parameter[1:3, 5:25, 3:10])


def test_index_and_config_are_complete(tmp_path: Path) -> None:
    source = publish(tmp_path / "hf", transformers_model("qwen3_next"), torch.bfloat16)
    content = json.loads((source / CONFIG).read_text()) | {"eos_token_id": 7}
    (source / CONFIG).write_text(json.dumps(content))
    import_weights(source, tmp_path / "ours", quiet, quiet)
    kept = tmp_path / "ours" / "huggingface"
    out = tmp_path / "out"
    export_weights(Export(tmp_path / "ours", out, QWEN3_NEXT, like=kept), quiet, quiet)
    index, tensors = json.loads((out / INDEX).read_text()), stored(out)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    config = json.loads((out / CONFIG).read_text())
    assert config["eos_token_id"] == 7
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"attention_gate": "none"}, "model.attention_gate=none cannot be exported"),
        ({"attention_gate": "headwise"}, "model.attention_gate=headwise cannot be exported"),
        ({"attention_gate_position": "value"}, "attention_gate_position=value cannot be exported"),
        ({"attention_gate_activation": "silu"}, "attention_gate_activation=silu cannot be"),
        ({"attention_gate_shared": True}, "attention_gate_shared=True cannot be exported"),
        ({"moe_router_enable_expert_bias": True}, "enable_expert_bias=True cannot be exported"),
        ({"mixer_pattern": "GS", "attention_window_tokens": 8}, r"mixer_pattern=GS cannot be exported"),
        ({"mtp_num_layers": 2}, "mtp_num_layers=2 .* has no published form"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES, ids=by_type)
def test_what_transformers_cannot_load_is_not_exported(section: dict[str, Any], reason: str, family: Family) -> None:
    from megatron_q3n.hf.published_config import to_published

    model = validate({"model": section}).model
    with pytest.raises(UserError, match=reason):
        to_published(model, family)
