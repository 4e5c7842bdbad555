"""Foreign and damaged checkpoints: nothing in them is executed, and each damage is one message.

A foreign checkpoint is self-consistent: whoever changed a file also rewrote the manifest. Damage that the manifest's
digests detect: test_corruption.py.
"""

import contextlib
import io
import json
import os
import pickle
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_q3n.checkpoint import integrity, write_manifest
from megatron_q3n.config import UserError
from tests.checkpoint.tiny_state import fingerprint, state_of, step
from tests.seeds import FIRST_SEED

NUM_DAMAGED, NUM_DAMAGED_RECORDS = 300, 40
Dice = random.Random


class Touch:
    """An object whose unpickling creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def intact(alone: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with one checkpoint."""
    from megatron_q3n import checkpoint

    run_dir = tmp_path_factory.mktemp("intact")
    state = state_of(alone)
    step(state)
    checkpoint.save(state, run_dir)
    return run_dir


@pytest.fixture
def run_dir(intact: Path, tmp_path: Path) -> Path:
    """Return a copy of the run to change."""
    return Path(shutil.copytree(intact, tmp_path / "run", symlinks=True))


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints/step_0000001"


def replace_metadata(folder: Path, content: bytes) -> None:
    """Write another `.metadata`, and a manifest that fits it."""
    (folder / ".metadata").write_bytes(content)
    known = integrity.read_manifest(folder)["digests"]
    known[".metadata"] = integrity.file_digest(folder / ".metadata")
    write_manifest(folder, None, known)


def readers(alone: Any, run_dir: Path) -> dict[str, Callable[[], Any]]:
    """Return every way to read a checkpoint."""
    from megatron_q3n import checkpoint
    from megatron_q3n.checkpoint.saved_tensors import CheckpointTensors
    from megatron_q3n.checkpoint.weights import load_weights
    from megatron_q3n.conversion.torch_dist import SavedTensors

    state, path = state_of(alone), newest(run_dir)
    return {
        "resume": lambda: checkpoint.resume(state, run_dir),
        "load": lambda: checkpoint.load(state, path, resume=False),
        "load the weights": lambda: checkpoint.load(state, path, resume=False, with_optimizer=False),
        "evaluate, generate, serve": lambda: load_weights(state.models, state.config, alone[1], path),
        "inspect": lambda: CheckpointTensors(path),
        "export": lambda: SavedTensors(path),
    }


def flip(content: bytearray, dice: Dice) -> None:
    for _ in range(dice.choice([1, 1, 2, 16])):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)


def overwrite(content: bytearray, dice: Dice) -> None:
    start = dice.randrange(len(content))
    content[start : start + 64] = dice.randbytes(len(content[start : start + 64]))


def cut(content: bytearray, dice: Dice) -> None:
    del content[dice.randrange(len(content)) :]


def omit(content: bytearray, dice: Dice) -> None:
    start = dice.randrange(len(content))
    del content[start : start + dice.randrange(1, 200)]


def repeat(content: bytearray, dice: Dice) -> None:
    start = dice.randrange(len(content))
    content[start:start] = content[start : start + dice.randrange(1, 200)]


def set_opcode(content: bytearray, dice: Dice) -> None:
    """Overwrite a byte by an opcode, some with the largest argument there is."""
    start = dice.randrange(len(content))
    content[start : start + 5] = bytes([dice.choice(b"RbcijopPQrq0N\x81\x8b\x92\x93\x96")]) + b"\xff\xff\xff\x7f"


DAMAGES: list[Callable[[bytearray, Dice], None]] = [flip, flip, overwrite, cut, omit, repeat, set_opcode, set_opcode]


def test_every_damage_of_the_index_is_one_message(run_dir: Path, intact: Path) -> None:
    """With a manifest that fits the damaged index. What passes the checks can be read, too."""
    from megatron_q3n.checkpoint.saved_tensors import CheckpointTensors

    folder, good = newest(run_dir), (newest(intact) / ".metadata").read_bytes()
    start, num_refused = FIRST_SEED, 0
    for seed in range(start, start + NUM_DAMAGED):
        dice, content = Dice(seed), bytearray(good)
        damage = dice.choice(DAMAGES)
        damage(content, dice)
        replace_metadata(folder, bytes(content))
        message = str(folder)
        try:
            tensors = CheckpointTensors(folder)
            tensors.statistics(dice.choice(list(tensors.entries)))
        except UserError as error:
            message = str(error)
            num_refused += 1
        assert str(folder) in message, f"seed {seed}"
        assert "\n" not in message, f"seed {seed}"
    assert num_refused > NUM_DAMAGED / 2


def test_an_index_that_does_not_match_its_digest_is_not_unpickled(run_dir: Path, tmp_path: Path, alone: Any) -> None:
    marker = tmp_path / "marker"
    (newest(run_dir) / ".metadata").write_bytes(pickle.dumps(Touch(marker)))
    for name, read in readers(alone, run_dir).items():
        with pytest.raises(UserError, match=r"\.metadata"):
            read()
        assert not marker.exists(), name


def foreign_indexes(marker: Path) -> dict[str, bytes]:
    from torch.distributed.checkpoint.metadata import Metadata

    in_a_field = Metadata({}, planner_data=Touch(marker), storage_data={})
    # sets an attribute of the class for all of its instances
    on_the_class = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\nN}\x8c\x07defaced\x88s\x86b."
    return {
        "call": pickle.dumps(Touch(marker)),
        "in a field": pickle.dumps(in_a_field),
        "protocol 0": pickle.dumps(in_a_field, protocol=0),
        "INST": b"(S'touch " + str(marker).encode() + b"'\nios\nsystem\n.",
        "on the class": on_the_class,
    }


@pytest.mark.parametrize("kind", ["call", "in a field", "protocol 0", "INST", "on the class"])
def test_no_reader_executes_a_foreign_index(run_dir: Path, tmp_path: Path, alone: Any, kind: str) -> None:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata

    marker = tmp_path / "marker"
    content = foreign_indexes(marker)[kind]
    replace_metadata(newest(run_dir), content)
    for name, read in readers(alone, run_dir).items():
        with pytest.raises(UserError, match=r"\.metadata"):
            read()
        assert not marker.exists(), name
    assert not hasattr(Metadata, "defaced")
    if kind != "on the class":
        # torch's own reader still executes it; without this, PlainReader is not needed
        with contextlib.suppress(AttributeError):
            FileSystemReader(newest(run_dir)).read_metadata()
        assert marker.exists()


@pytest.mark.parametrize("place", ["rng", "common"])
def test_no_reader_executes_a_foreign_object(
    alone: Any, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random generators' states are read on a resume only, and the others' readers go on."""
    from torch.distributed.checkpoint import DefaultLoadPlanner

    from megatron_q3n import checkpoint
    from megatron_q3n.checkpoint import state_dict

    marker, run_dir = tmp_path / "marker", tmp_path / "run"
    original = state_dict.sharded_state_dict
    state = state_of(alone)
    step(state)
    with monkeypatch.context() as patch:
        if place == "rng":
            patch.setattr(state_dict, "_rng_states", lambda: {"python": Touch(marker)})
        else:
            patch.setattr(
                state_dict, "sharded_state_dict", lambda *a, **k: {**original(*a, **k), "common": Touch(marker)}
            )
        checkpoint.save(state, run_dir)
    for name, read in readers(alone, run_dir).items():
        if name == "resume" or (place == "common" and name not in ("inspect", "export")):
            with pytest.raises(UserError, match="more than plain values"):
                read()
        else:
            read()
        assert not marker.exists(), name
    record = io.BytesIO()
    torch.save([Touch(marker)], record)
    record.seek(0)
    # torch's own planner still executes it; without this, _PlainObjects is not needed
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner({"x": None}, None, True)
    planner.load_bytes(type("Item", (), {"dest_index": type("Index", (), {"fqn": "x"})})(), record)  # type: ignore[arg-type]
    assert marker.exists()


def test_a_place_outside_of_the_checkpoint_is_refused(run_dir: Path) -> None:
    from megatron_q3n.checkpoint.metadata_file import parse, read_metadata

    folder = newest(run_dir)
    content = (folder / ".metadata").read_bytes()
    outside = "../x.distcp"
    for name, value in (("relative_path", outside), ("offset", -1), ("length", 10**12), ("length", 10)):
        metadata = pickle.loads(content)
        for place in metadata.storage_data.values():
            object.__setattr__(place, name, value)
        replace_metadata(folder, pickle.dumps(metadata))
        with pytest.raises(UserError, match=r"\.metadata is not a checkpoint's index"):
            read_metadata(folder)
    # a memo index of two billion: the unpickler in C allocates for all below it
    assert parse(b"\x80\x04}r\xff\xff\xff\x7f.") == {}


def test_damaged_records_that_are_not_verified_are_one_message(run_dir: Path, intact: Path, alone: Any) -> None:
    from megatron_q3n import checkpoint

    state = state_of(alone, {"checkpoint": {"verify": "sizes"}})
    start = FIRST_SEED
    (name,) = (path.name for path in newest(intact).glob("*.distcp") if path.stat().st_size > 100_000)
    good = (newest(intact) / name).read_bytes()
    for seed in range(start, start + NUM_DAMAGED_RECORDS):
        dice, content = Dice(seed), bytearray(good)
        for _ in range(20):
            overwrite(content, dice)
        (newest(run_dir) / name).write_bytes(content[: len(good)])
        message = "cannot be read"
        try:
            checkpoint.load(state, newest(run_dir), resume=True)
        except UserError as error:
            message = str(error)
        assert re.search(r"cannot be read|random generators", message), f"seed {seed}: {message}"


def test_objects_are_plain_and_those_of_earlier_versions_load(
    alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, the state of numpy's generator was saved with an array, which is pickled by numpy's functions."""
    from megatron_q3n import checkpoint
    from megatron_q3n.checkpoint import state_dict

    state = state_of(alone)
    step(state)
    record = io.BytesIO()
    torch.save(state_dict._rng_states(), record)
    record.seek(0)
    assert torch.load(record, weights_only=True)["numpy"][0] == "MT19937"
    plain = state_dict._rng_states
    with monkeypatch.context() as patch:
        patch.setattr(state_dict, "_rng_states", lambda: {**plain(), "numpy": np.random.get_state()})
        saved = checkpoint.save(state, tmp_path)
    expected, numbers = fingerprint(state), np.random.random(3)
    np.random.seed(1)
    other = state_of(alone)
    checkpoint.load(other, saved, resume=True)
    assert fingerprint(other) == expected
    assert np.random.random(3).tolist() == numbers.tolist()


VALUES: list[Any] = [None, -1, 10**30, 1.5, "text", [], [1], {}, {"a": 1}, {"../x": 1}, {"/dev/zero": 0}, {"pipe": 0}]


def test_every_foreign_manifest_is_one_message(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a checksum that fits: each field, and each entry of its tables, with a value of another kind."""
    from tools import inspect_checkpoint

    folder = newest(run_dir)
    os.mkfifo(folder / "pipe")
    good = integrity.read_manifest(folder)
    monkeypatch.setattr(sys, "argv", ["inspect_checkpoint", str(folder), "--verify"])
    for name in good:
        for value in VALUES:
            changed = [{**good, name: value}]
            if isinstance(good[name], dict):
                key = next(iter(good[name]))
                changed.append({**good, name: {**good[name], key: value}})
            for manifest in changed:
                body = {field: content for field, content in manifest.items() if field != "seal"}
                text = json.dumps(body, indent=1).removesuffix("\n}")
                (folder / integrity.MANIFEST).write_text(integrity._with_checksum(text))
                code = inspect_checkpoint.main()
                errors = capsys.readouterr().err
                assert code in (0, 2), (name, value)
                assert len(errors.splitlines()) <= (code == 2) * 10, (name, value, errors)


@pytest.mark.parametrize("options", [[], ["--verify"], ["--tensors"]])
def test_inspect_refuses_in_one_line(
    run_dir: Path, tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from tools import inspect_checkpoint

    marker = tmp_path / "marker"
    for content in (pickle.dumps(Touch(marker)), b"", b"\x80"):
        replace_metadata(newest(run_dir), content)
        monkeypatch.setattr(sys, "argv", ["inspect_checkpoint", str(run_dir), *options])
        assert inspect_checkpoint.main() == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert not marker.exists()
