"""Greedy texts equal those of transformers' generation with its KV cache, from the same published weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_q3n import hf
from megatron_q3n.config import validate
from megatron_q3n.hf.model_config import from_published
from tests.hf.published import transformers_model


@pytest.mark.parametrize("length", [3, 90])
def test_greedy_texts_equal_those_of_transformers(alone: Any, tmp_path: Path, length: int) -> None:
    from megatron_q3n.inference.generate import generate
    from megatron_q3n.inference.sampling import Sampling
    from megatron_q3n.model.build import build_model

    theirs = transformers_model("qwen3_next")
    settings, _ = from_published(theirs.config.to_dict(), has_mtp=False)
    data = {"source": "blend", "train": [{"path": "unused"}]}
    config = validate({"model": settings.model_dump(mode="json"), "data": data})
    device, parallel = alone
    ours = build_model(config, device.model_backend, parallel.groups)[0].to(device.torch_device)
    ours.load_state_dict(hf.to_megatron(dict(theirs.state_dict()), config.model), strict=False)
    prompts = torch.randint(0, 96, (3, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        expected = theirs.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
        )[:, length:]
    done = generate(ours, prompts.tolist(), Sampling(40, 0.0))
    assert [completion.tokens for completion in done] == expected.tolist()
