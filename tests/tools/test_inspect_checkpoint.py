"""tools/inspect_checkpoint.py: summary, statistics, differences, and errors for damaged checkpoints."""

import importlib.util
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_q3n.checkpoint.saved_tensors import CheckpointTensors
from tests.checkpoint.conftest import frozen_imports  # noqa: F401
from tests.checkpoint.tiny_state import state_of, step

TOOL = Path(__file__).parent.parent.parent / "tools/inspect_checkpoint.py"
Inspect = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trained(alone: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Return a state at step 2, and its run with the checkpoints of steps 1 and 2."""
    from megatron_q3n import checkpoint

    folder = tmp_path_factory.mktemp("run")
    state = state_of(alone)
    for _ in range(2):
        step(state)
        checkpoint.save(state, folder)
    return state, folder


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inspect:
    """Run the tool in this process: (exit status, stdout, stderr), on a terminal of 80 columns."""
    spec = importlib.util.spec_from_file_location("inspect_checkpoint", TOOL)
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        status = tool.main()
        return status, *capsys.readouterr()

    return run


def test_summary_names_step_model_layout_and_sizes(trained: tuple[Any, Path], inspect: Inspect) -> None:
    status, out, _ = inspect(trained[1], "--verify")
    assert status == 0
    assert "2, after 128 tokens" in out
    assert "4 layers, width 32, 8 experts, vocabulary 64" in out
    assert "1 process(es), fp32" in out
    assert "the contents of all files are as saved" in out
    parameters = sum(p.numel() for p in trained[0].models[0].parameters())
    assert f"{3 * parameters / 1e6:,.2f} M numbers" in out
    # a path may be longer than the terminal is wide; the rest may not
    assert all(len(line) <= 80 for line in out.splitlines() if "run" not in line)


def test_every_tensor_is_read_as_it_is_in_memory(trained: tuple[Any, Path], inspect: Inspect) -> None:
    status, out, _ = inspect(trained[1], "--tensors")
    assert status == 0
    table = trained[0].models[0].embedding.word_embeddings.weight
    found = re.search(r"^embedding\.word_embeddings\.weight\n +(.*)$", out, re.MULTILINE)
    assert found
    assert found[1].split() == [
        "float32",
        "64×32",
        "min",
        f"{table.min().item():.4g}",
        "max",
        f"{table.max().item():.4g}",
        "norm",
        f"{table.norm().item():.5g}",
    ]
    tensors = CheckpointTensors(trained[1] / "checkpoints/step_0000002")
    assert tensors.read("embedding.word_embeddings.weight").equal(table)


def test_difference_between_two_checkpoints(trained: tuple[Any, Path], inspect: Inspect) -> None:
    folder = trained[1] / "checkpoints"
    status, out, _ = inspect(folder / "step_0000002", "--diff", folder / "step_0000001")
    assert status == 0
    assert re.search(r"\noutput_layer\.weight\n.*max \|difference\|", out)
    assert "\n0 of " in out
    status, out, _ = inspect(folder / "step_0000002", "--diff", folder / "step_0000002")
    total = len(CheckpointTensors(folder / "step_0000002").entries)
    assert f"{total} of {total} tensors are equal bit for bit" in out


@pytest.mark.parametrize("what", ["nothing", "manifest", "metadata", "file"])
def test_missing_and_damaged_checkpoints_are_refused(
    trained: tuple[Any, Path], inspect: Inspect, tmp_path: Path, what: str
) -> None:
    target = tmp_path / "run"
    shutil.copytree(trained[1], target, symlinks=True)
    newest = target / "checkpoints/step_0000002"
    if what == "nothing":
        shutil.rmtree(target)
    elif what == "file":
        (newest / "metadata.json").write_text("{}")
    else:
        (newest / {"manifest": "checkpoint.json", "metadata": ".metadata"}[what]).write_text("x")
    status, _, err = inspect(target, "--verify")
    assert status == 2
    assert {"nothing": "no checkpoint found", "file": "metadata.json has 2 bytes instead"}.get(what, "damaged") in err
