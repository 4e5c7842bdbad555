"""Imported checkpoints in parallel layouts: transformers' logits, and exact export of what those layouts save."""

from pathlib import Path

import pytest
import torch

from megatron_q3n.conversion.exporting import Export, export_weights
from megatron_q3n.conversion.importing import import_weights
from megatron_q3n.hf import QWEN3_NEXT
from tests import forked
from tests.conversion.layout_ranks import LAYOUTS, ROWS, TOKENS
from tests.hf.published import publish, quiet, stored, transformers_model


@pytest.mark.multiprocess
def test_imports_and_exports_in_parallel_layouts(tmp_path: Path) -> None:
    model = transformers_model("qwen3_next")
    source = publish(tmp_path / "hf", model)
    import_weights(source, tmp_path / "ours", quiet, quiet)
    done = forked.run("tests.conversion.layout_ranks", tmp_path / "ours", tmp_path, seconds=280)
    assert done.returncode == 0, done.stderr[-4000:]
    tokens = torch.randint(0, 96, (ROWS, TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(tokens).logits
    before = stored(source)
    for layout in LAYOUTS:
        found = sorted(tmp_path.glob(f"{layout}-*.pt"))
        assert len(found) == 2, "both ranks of the last stage"
        for path in found:
            torch.testing.assert_close(torch.load(path), expected, rtol=0, atol=1e-4)
        output = tmp_path / f"{layout}-out"
        export = Export(tmp_path / layout, output, QWEN3_NEXT, torch.float32)
        export_weights(export, quiet, quiet)
        after = stored(output)
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-7)
