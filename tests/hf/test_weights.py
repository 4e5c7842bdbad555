"""Indexes of Hugging Face folders that name files outside of the folder, or none."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_q3n.config import UserError
from megatron_q3n.hf.weights import INDEX, PublishedWeights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with one shard, beside a file that is not part of it."""
    inside = tmp_path / "model"
    inside.mkdir()
    save_file({"a": torch.ones(2)}, inside / "model-1.safetensors")
    shutil.copyfile(inside / "model-1.safetensors", tmp_path / "outside.safetensors")
    return inside


OUTSIDE = ["../outside.safetensors", "sub/../../outside.safetensors", "sub/model-1.safetensors", "model-1.bin"]


@pytest.mark.parametrize("shard", [*OUTSIDE, "ABSOLUTE", "", 3, None, ["model-1.safetensors"], "a\0.safetensors"])
def test_a_shard_that_is_no_file_of_the_folder_is_refused(folder: Path, shard: Any) -> None:
    if shard == "ABSOLUTE":
        shard = str(folder.parent / "outside.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UserError, match=r"lists .* for a, which is not the name of a safetensors file"):
        PublishedWeights(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a"]}, {"weight_map": "a"}])
def test_an_index_without_a_table_is_refused(folder: Path, index: Any) -> None:
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="has no object weight_map"):
        PublishedWeights(folder)


def test_a_link_to_a_shard_is_read(folder: Path, tmp_path: Path) -> None:
    """As in the cache of the Hugging Face hub, whose folders hold links to its blobs."""
    (folder / "model-1.safetensors").unlink()
    (folder / "model-1.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert PublishedWeights(folder)["a"].tolist() == [1, 1]
