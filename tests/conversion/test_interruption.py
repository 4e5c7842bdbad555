"""Conversions that are interrupted, repeated, or read damaged files: outputs are complete or absent, and work resumes.

Files of a few kilobytes replace those of gigabytes; the moment of a kill is chosen by the bytes done.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_q3n.config import UserError
from megatron_q3n.conversion import importing
from megatron_q3n.conversion.exporting import Export, export_weights
from megatron_q3n.conversion.importing import import_weights
from megatron_q3n.conversion.resumable_output import ResumableOutput
from megatron_q3n.hf import QWEN3_NEXT
from megatron_q3n.hf.weights import CONFIG, INDEX
from tests.hf.published import publish, quiet, stored, transformers_model

SMALL_FILE = 20_000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return publish(tmp_path / "hf", transformers_model("qwen3_next"))


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "FILE_BYTES", SMALL_FILE)


class Interruption(Exception):
    """Stands for whatever ends a process."""


def interrupted(after_bytes: int) -> importing.Advance:
    def advance(done: int, total: int) -> None:
        if done > after_bytes:
            raise Interruption

    return advance


def export_of(checkpoint: Path, output: Path) -> Export:
    return Export(checkpoint, output, QWEN3_NEXT, torch.float32, max_shard_bytes=SMALL_FILE)


def assert_exports(checkpoint: Path, output: Path, source: Path) -> None:
    """Show by exporting it that a checkpoint holds the source."""
    export_weights(export_of(checkpoint, output), quiet, quiet)
    expected, found = stored(source), stored(output)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-7)


@pytest.mark.usefixtures("small_files")
def test_an_interrupted_import_goes_on(source: Path, tmp_path: Path) -> None:
    output, partial = tmp_path / "ours", tmp_path / ".ours.partial"
    with pytest.raises(Interruption):
        import_weights(source, output, quiet, interrupted(after_bytes=3 * SMALL_FILE))
    assert not output.exists()
    kept = {path.name: path.stat().st_ino for path in (partial / "files").iterdir()}
    assert len(kept) >= 2
    assert list(partial.glob("*.writing"))
    notes: list[str] = []
    import_weights(source, output, notes.append, quiet)
    assert notes == [f"continuing: {len(kept)} finished files kept"]
    assert kept.items() <= {path.name: path.stat().st_ino for path in output.iterdir()}.items()
    assert not partial.exists()
    assert_exports(output, tmp_path / "out", source)


@pytest.mark.usefixtures("small_files")
def test_an_interrupted_export_goes_on_and_writes_damaged_files_again(source: Path, tmp_path: Path) -> None:
    import_weights(source, tmp_path / "ours", quiet, quiet)
    export = export_of(tmp_path / "ours", tmp_path / "out")
    with pytest.raises(Interruption):
        export_weights(export, quiet, interrupted(after_bytes=5 * SMALL_FILE))
    assert not export.output.exists()
    victim, *others = sorted((tmp_path / ".out.partial/files").iterdir())
    assert len(others) >= 3
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    notes: list[str] = []
    export_weights(export, notes.append, quiet)
    assert "without a tokenizer" in notes[0]
    assert notes[1:] == [
        f"{victim.name} does not match its digest; it is written again",
        f"continuing: {len(others)} finished files kept",
    ]
    uninterrupted = export_of(tmp_path / "ours", tmp_path / "uninterrupted")
    export_weights(uninterrupted, quiet, quiet)
    files = {path.name: path.read_bytes() for path in uninterrupted.output.iterdir()}
    assert files == {path.name: path.read_bytes() for path in export.output.iterdir()}


@pytest.mark.usefixtures("small_files")
def test_a_killed_import_goes_on(source: Path, tmp_path: Path) -> None:
    """SIGKILL, so that no handler of ours runs; the dead process's lock does not hold."""
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from megatron_q3n.conversion import importing\n"
        f"importing.FILE_BYTES = {SMALL_FILE}\n"
        "def advance(done, total):\n"
        f"    if done > {5 * SMALL_FILE}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "importing.import_weights(Path(sys.argv[1]), Path(sys.argv[2]), print, advance)\n"
    )
    output = tmp_path / "ours"
    command = [sys.executable, "-c", program, str(source), str(output)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not output.exists()
    notes: list[str] = []
    import_weights(source, output, notes.append, quiet)
    assert re.fullmatch(r"continuing: [3-5] finished files kept", *notes)
    assert_exports(output, tmp_path / "out", source)


def test_a_partial_output_with_other_files_is_discarded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importing, "FILE_BYTES", SMALL_FILE)
        with pytest.raises(Interruption):
            import_weights(source, tmp_path / "ours", quiet, interrupted(3 * SMALL_FILE))
    import_weights(source, tmp_path / "ours", quiet, quiet)
    assert_exports(tmp_path / "ours", tmp_path / "out", source)


@pytest.mark.usefixtures("small_files")
def test_a_partial_output_of_another_source_is_discarded(source: Path, tmp_path: Path) -> None:
    other = publish(tmp_path / "other", transformers_model("qwen3_5_moe_text"))
    with pytest.raises(Interruption):
        import_weights(other, tmp_path / "ours", quiet, interrupted(3 * SMALL_FILE))
    notes: list[str] = []
    import_weights(source, tmp_path / "ours", notes.append, quiet)
    assert notes == ["discarding the partial output of another source or other options"]
    assert_exports(tmp_path / "ours", tmp_path / "out", source)


def test_an_output_is_never_overwritten_or_written_by_two(source: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    with pytest.raises(UserError, match=r"there exists; delete it or give another --output"):
        import_weights(source, tmp_path / "there", quiet, quiet)
    with ResumableOutput(tmp_path / "ours", {}, quiet) as output_files:
        with pytest.raises(UserError, match="another process is writing"):
            import_weights(source, tmp_path / "ours", quiet, quiet)
        with pytest.raises(UserError, match=r"GiB free, .* GiB needed"):
            output_files.require_space(2**60)


@pytest.mark.parametrize("way", ["import", "export"])
@pytest.mark.usefixtures("small_files")
def test_a_full_disk_is_reported_and_the_conversion_resumes(source: Path, tmp_path: Path, way: str) -> None:
    """A file size limit replaces the full disk: the free space was sufficient at the start."""
    if way == "export":
        import_weights(source, tmp_path / "ours", quiet, quiet)
        convert = partial(export_weights, export_of(tmp_path / "ours", tmp_path / "out"))
    else:
        convert = partial(import_weights, source, tmp_path / "ours")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE // 2, limits[1]))
    try:
        with pytest.raises(UserError, match=r"could not be written \(File too large\)"):
            convert(quiet, quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if way == "import":
        import_weights(source, tmp_path / "ours", quiet, quiet)
    assert_exports(tmp_path / "ours", tmp_path / "out", source)


def rewrite(source: Path, name: str, tensor: torch.Tensor | None, to: str | None = None) -> None:
    """Replace, rename or drop a tensor of a model folder, its index included."""
    index = json.loads((source / INDEX).read_text())
    file = source / index["weight_map"].pop(name)
    tensors = load_file(file)
    old = tensors.pop(name)
    if to is not None or tensor is not None:
        tensors[to or name] = old if tensor is None else tensor
        index["weight_map"][to or name] = file.name
    save_file(tensors, file, metadata={"format": "pt"})
    (source / INDEX).write_text(json.dumps(index))


GATE, UNKNOWN = "model.layers.2.mlp.gate.weight", "model.layers.2.mlp.gate.bias"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "mtp.safetensors").unlink(), r"mtp\.safetensors is missing, and .* lists it"),
        (lambda f: os.truncate(f / "mtp.safetensors", 5000), r"mtp\.safetensors is truncated"),
        (lambda f: (f / INDEX).write_text("{"), r"index\.json cannot be read"),
        (lambda f: (f / CONFIG).unlink(), r"config\.json: no such file"),
        (lambda f: rewrite(f, GATE, None), rf"1 missing: {GATE}"),
        (lambda f: rewrite(f, GATE, None, to=UNKNOWN), rf"1 missing: {GATE}; 1 unexpected: {UNKNOWN}"),
        (lambda f: rewrite(f, EXPERT, torch.zeros(5, 32)), r"3\.up_proj\.weight has shape \[5, 32\]"),
        (
            lambda f: rewrite(f, EXPERT, torch.zeros(16, 32).to(torch.float8_e4m3fn)),
            r"3\.up_proj\.weight is stored as F8_E4M3; .* unquantized",
        ),
        (lambda f: rewrite(f, "mtp.norm.weight", None), r"1 missing: mtp\.norm\.weight"),
    ],
)
def test_a_damaged_source_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, damage: object, reason: str
) -> None:
    assert callable(damage)
    damage(source)
    with pytest.raises(UserError, match=reason):
        import_weights(source, tmp_path / "ours", quiet, quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_an_index_that_promises_what_a_shard_lacks_is_refused(source: Path, tmp_path: Path) -> None:
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["model.extra"] = "mtp.safetensors"
    (source / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"mtp\.safetensors lacks model\.extra"):
        import_weights(source, tmp_path / "ours", quiet, quiet)


@pytest.mark.parametrize("victim", ["__0_0.distcp", "__state_0.distcp", ".metadata"])
def test_a_damaged_checkpoint_is_not_exported(source: Path, tmp_path: Path, victim: str) -> None:
    import_weights(source, tmp_path / "ours", quiet, quiet)
    path = tmp_path / "ours" / victim
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"does not match its digest[\s\S]*export another"):
        export_weights(export_of(tmp_path / "ours", tmp_path / "out"), quiet, quiet)
    assert not list(tmp_path.glob("*out*"))
