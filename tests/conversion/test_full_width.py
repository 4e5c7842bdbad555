"""Conversion of the released model's full width in 3 GiB of memory: two layers, MTP layer, embedding and head.

About 10 GiB of random bf16 weights, both ways, bit for bit. The limit is on anonymous memory: the kernel can drop pages
of memory-mapped files. Not covered: the other 46 layers, which have the same parameters.
"""

import json
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_q3n.hf import QWEN3_NEXT, param_mappings
from megatron_q3n.hf.model_config import from_published
from megatron_q3n.hf.weights import CONFIG, INDEX, PublishedWeights, ShardWriter, index_of, plan_shards
from tests.hf.test_model_config import QWEN3_NEXT_80B

TOOL = Path(__file__).parent.parent.parent / "tools" / "convert_hf.py"
MAX_ANON_GIB = 3
NEEDED_GIB = 40
CONTENT = QWEN3_NEXT_80B | {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
BLOCK = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()


def made_up(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor that follows from its name, fast: a block of noise, transposed and repeated."""
    num = torch.Size(shape).numel()
    transposed = BLOCK.roll(zlib.crc32(name.encode()) % BLOCK.numel())
    return transposed.repeat(-(-num // BLOCK.numel()))[:num].view(shape)


def shapes() -> dict[str, tuple[int, ...]]:
    config, family = from_published(CONTENT, has_mtp=True)
    assert family is QWEN3_NEXT
    return {name: shape for mapping in param_mappings(config) for name, shape in mapping.hf.items()}


def write_source(folder: Path) -> Path:
    folder.mkdir()
    tensors = {name: (shape, torch.bfloat16) for name, shape in shapes().items()}
    shards = plan_shards(tensors, 4_000_000_000)
    for shard in shards:
        writer = ShardWriter(folder / shard.name, shard)
        for name, slot in shard.slots.items():
            writer.put(name, made_up(name, slot.shape))
        writer.close()
    (folder / INDEX).write_text(json.dumps(index_of(shards)))
    (folder / CONFIG).write_text(json.dumps(CONTENT))
    return folder


def peak_anon_gib(*arguments: str) -> float:
    """Run the tool and return the most anonymous memory that any sample showed."""
    process = subprocess.Popen([sys.executable, str(TOOL), *arguments])
    started, samples = time.monotonic(), [0]
    while process.poll() is None:
        samples += anon_kib(process.pid)
        time.sleep(0.01)
    assert process.returncode == 0
    print(f"{arguments[0]}: {max(samples) / 2**20:.2f} GiB, {time.monotonic() - started:.0f} s")
    assert len(samples) > 100, "too few to have seen the peak"
    return max(samples) / 2**20


def anon_kib(pid: int) -> Iterator[int]:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has just ended
        return
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            yield int(line.split()[1])


@pytest.mark.slow
def test_full_width_goes_both_ways_in_three_gib(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is sampled from /proc, and this system has none")
    if (free := shutil.disk_usage(tmp_path).free) < NEEDED_GIB * 2**30:
        pytest.skip(f"{free / 2**30:.0f} GiB free on the disk of {tmp_path}, {NEEDED_GIB} needed")
    source, checkpoint, exported = (tmp_path / name for name in ("hf", "ours", "out"))
    try:
        write_source(source)
        peak_import = peak_anon_gib("import", str(source), "--output", str(checkpoint))
        shutil.rmtree(source)
        peak_export = peak_anon_gib("export", str(checkpoint), "--output", str(exported))
        shutil.rmtree(checkpoint)
        weights = PublishedWeights(exported)
        expected = shapes()
        assert set(weights) == expected.keys()
        for name, shape in expected.items():
            assert torch.equal(weights[name], made_up(name, shape)), name
    finally:
        for folder in (source, checkpoint, exported):
            shutil.rmtree(folder, ignore_errors=True)
    assert peak_import < MAX_ANON_GIB
    assert peak_export < MAX_ANON_GIB
