"""Two hundred random corruptions: each is detected, none is loaded, and no intact older checkpoint is lost.

Not covered: damage between the verification and the read that follows it.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_q3n.checkpoint import integrity
from megatron_q3n.config import UserError
from tests.checkpoint.tiny_state import fingerprint, state_of, step
from tests.seeds import FIRST_SEED

CORRUPTIONS, RESUMED, PRUNED = 200, 6, 6
Dice = random.Random


@pytest.fixture(scope="module")
def run_dir(alone: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """Return a run with the checkpoints of steps 1 and 2, and the fingerprint of each."""
    from megatron_q3n import checkpoint

    folder = tmp_path_factory.mktemp("run")
    state = state_of(alone)
    prints = {}
    for number in (1, 2):
        step(state)
        checkpoint.save(state, folder)
        prints[number] = fingerprint(state)
    return folder, prints


def flip(file: Path, dice: Dice) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(dice.choice([1, 1, 1, 2, 16])):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


def cut(file: Path, dice: Dice) -> None:
    os.truncate(file, dice.randrange(file.stat().st_size))


def remove(file: Path, _: Dice) -> None:
    file.unlink()


def extend(file: Path, dice: Dice) -> None:
    with file.open("ab") as stream:
        stream.write(dice.randbytes(dice.choice([1, 512])))


def blank(file: Path, dice: Dice) -> None:
    """Overwrite a block with zeros, like a lost disk sector."""
    content = bytearray(file.read_bytes())
    start = dice.randrange(len(content))
    content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    file.write_bytes(content)


def shift(file: Path, dice: Dice) -> None:
    """Rotate the content by one byte: size and byte counts stay the same."""
    content = file.read_bytes()
    file.write_bytes(content[1:] + content[:1])


def exchange(file: Path, dice: Dice) -> None:
    """Swap two files of the checkpoint."""
    other = dice.choice([path for path in sorted(file.parent.iterdir()) if path != file])
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


def borrow(file: Path, _: Dice) -> None:
    """Replace the file by that of the previous checkpoint, of the same name and often of the same size."""
    shutil.copyfile(file.parent.parent / "step_0000001" / file.name, file)


DAMAGES: list[Callable[[Path, Dice], None]] = [*(flip, flip, flip, cut, remove, extend, blank, shift, exchange, borrow)]


def damaged_copy(source: Path, target: Path, seed: int) -> str:
    """Copy a run and damage its newest checkpoint; return what was done."""
    shutil.copytree(source, target, symlinks=True)
    dice = random.Random(seed)
    newest = target / "checkpoints/step_0000002"
    file = dice.choice(sorted(newest.iterdir()))
    before = {path.name: path.read_bytes() for path in newest.iterdir()}
    while {path.name: path.read_bytes() for path in newest.iterdir()} == before:
        damage = dice.choice(DAMAGES)
        damage(file, dice)
    return f"seed {seed}: {damage.__name__} {file.name}"


def test_every_corruption_is_found_and_none_is_loaded(
    alone: Any, run_dir: tuple[Path, dict[int, str]], tmp_path: Path
) -> None:
    from megatron_q3n import checkpoint

    state = state_of(alone)
    step(state)
    before = fingerprint(state)
    start = FIRST_SEED
    for seed in range(start, start + CORRUPTIONS):
        target = tmp_path / "run"
        done = damaged_copy(run_dir[0], target, seed)
        newest = target / "checkpoints/step_0000002"
        assert integrity.find_damage(newest, "full"), done
        with pytest.raises(UserError, match="step_0000002"):
            checkpoint.load(state, newest, resume=True)
        assert fingerprint(state) == before, done
        assert integrity.find_damage(target / "checkpoints/step_0000001", "full") == [], done
        shutil.rmtree(target)


def test_a_resume_falls_back_with_a_warning_and_keeps_the_damaged_checkpoint(
    alone: Any, run_dir: tuple[Path, dict[int, str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from megatron_q3n import checkpoint

    state = state_of(alone)
    start = FIRST_SEED
    for seed in range(start, start + RESUMED):
        target = tmp_path / "run"
        done = damaged_copy(run_dir[0], target, seed)
        resumed = checkpoint.resume(state, target)
        assert resumed.checkpoint == (target / "checkpoints/step_0000001").resolve(), done
        assert fingerprint(state) == run_dir[1][1], done
        (note,) = resumed.notes
        assert "step_0000002 is damaged" in note, done
        assert "going back to step_0000001" in note, done
        assert note in capfd.readouterr().err
        assert (target / "checkpoints/step_0000002.damaged").is_dir()
        assert (target / "checkpoints/latest").resolve().name == "step_0000001"
        shutil.rmtree(target)


def test_pruning_never_deletes_an_intact_checkpoint_for_a_damaged_one(
    alone: Any, run_dir: tuple[Path, dict[int, str]], tmp_path: Path
) -> None:
    """keep_last=2, steps 1 and 2 exist, 2 is damaged during the run: the save of step 3 must not delete step 1."""
    from megatron_q3n import checkpoint

    state = state_of(alone)
    notes: list[str] = []
    start = FIRST_SEED
    for seed in range(start, start + PRUNED):
        target = tmp_path / "run"
        checkpoint.load(state, run_dir[0] / "checkpoints/step_0000002", resume=True)
        step(state)
        done = damaged_copy(run_dir[0], target, seed)
        saver = checkpoint.Saver(state, target, notes.append)
        saver.save()
        assert saver.wait_for_save(True) == [3]
        folder = target / "checkpoints"
        for name in ("step_0000001", "step_0000003"):
            assert integrity.find_damage(folder / name, "full") == [], done
        assert not (folder / "step_0000002").exists() or "checkpoint.json" in done, done
        shutil.rmtree(target)
    assert all("step_0000002 is damaged" in note for note in notes)
    assert notes


def test_with_damaged_checkpoints_only_a_run_does_not_start_from_scratch(
    alone: Any, run_dir: tuple[Path, dict[int, str]], tmp_path: Path
) -> None:
    from megatron_q3n import checkpoint

    state = state_of(alone)
    target = tmp_path / "run"
    shutil.copytree(run_dir[0], target, symlinks=True)
    for name in ("step_0000001", "step_0000002"):
        cut(max((target / "checkpoints" / name).glob("*.distcp")), random.Random(0))
    for _ in range(2):
        with pytest.raises(UserError, match=r"no good checkpoint.*step_0000002.*step_0000001"):
            checkpoint.resume(state, target)
    for name in ("step_0000001", "step_0000002"):
        (target / "checkpoints" / name).rename(target / "checkpoints" / f"{name}.damaged")
    with pytest.raises(UserError, match="only damaged ones are left"):
        checkpoint.resume(state, target)
    assert checkpoint.resume(state, tmp_path / "new").checkpoint is None


def test_a_checkpoint_without_digests_is_loaded_with_a_warning(
    alone: Any, run_dir: tuple[Path, dict[int, str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Format 1, and checkpoints of other writers; `write_manifest` then adds digests."""
    from megatron_q3n import checkpoint

    target = tmp_path / "run"
    shutil.copytree(run_dir[0], target, symlinks=True)
    newest = target / "checkpoints/step_0000002"
    manifest = json.loads((newest / "checkpoint.json").read_text())
    plain = {k: v for k, v in manifest.items() if k not in ("seal", "digests")}
    (newest / "checkpoint.json").write_text(json.dumps(plain | {"format": 1}))
    state = state_of(alone)
    checkpoint.load(state, newest, resume=True)
    assert "no digests" in capfd.readouterr().err
    assert fingerprint(state) == run_dir[1][2]
    checkpoint.write_manifest(newest)
    checkpoint.load(state, newest, resume=True)
    assert "no digests" not in capfd.readouterr().err
    assert json.loads((newest / "checkpoint.json").read_text())["digests"] == manifest["digests"]


def test_verifying_sizes_skips_the_contents_and_detects_truncation(
    run_dir: tuple[Path, dict[int, str]], tmp_path: Path
) -> None:
    target = tmp_path / "run"
    shutil.copytree(run_dir[0], target, symlinks=True)
    newest = target / "checkpoints/step_0000002"
    largest = max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)
    flip(largest, random.Random(0))
    assert integrity.find_damage(newest, "sizes") == []
    assert integrity.find_damage(newest, "full")
    cut(largest, random.Random(0))
    assert integrity.find_damage(newest, "sizes")


def test_processes_verify_disjoint_shares_that_cover_every_file(
    run_dir: tuple[Path, dict[int, str]], tmp_path: Path
) -> None:
    target = tmp_path / "run"
    shutil.copytree(run_dir[0], target, symlinks=True)
    newest = target / "checkpoints/step_0000002"
    for file in newest.iterdir():
        if file.name != "checkpoint.json":
            flip(file, random.Random(0))
    shares = [integrity.find_damage(newest, "full", rank, 2) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(integrity.find_damage(newest, "full"))
    assert len(shares[0] + shares[1]) == 3
