"""metrics.jsonl after kills in any state: which lines are kept or removed, and the error of a failed write."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_q3n.config import UserError
from megatron_q3n.metrics import jsonl


def _lines(num_steps: int) -> list[bytes]:
    return [json.dumps({"step": s, "loss/train": 1 / s}).encode() + b"\n" for s in range(1, num_steps + 1)]


@settings(deadline=None)  # the disk may be busy
@given(num_steps=st.integers(0, 12), cut=st.integers(0, 400), step=st.integers(0, 14))
def test_resume_on_a_torn_file(tmp_path_factory: pytest.TempPathFactory, num_steps: int, cut: int, step: int) -> None:
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    whole = _lines(num_steps)
    torn = b"".join(whole)[:cut]
    path.write_bytes(torn)
    survivors = [json.loads(line) for line in whole[: torn.count(b"\n")]]
    kept = [record for record in survivors if record["step"] <= step]

    assert jsonl.read(path) == survivors
    file = jsonl.open_at(path, step)
    assert file.last_step == (kept[-1]["step"] if kept else 0)
    file.append({"step": step + 1, "loss/train": 0.5})
    file.close()
    assert jsonl.read(path) == [*kept, {"step": step + 1, "loss/train": 0.5}]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


@settings(deadline=None)  # the disk may be busy
@given(junk=st.lists(st.binary(max_size=30), max_size=4))
def test_lines_that_are_not_records_are_removed(tmp_path_factory: pytest.TempPathFactory, junk: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("junk") / "metrics.jsonl"
    good = _lines(3)
    path.write_bytes(good[0] + b"".join(j.replace(b"\n", b"") + b"\n" for j in junk) + good[1] + good[2])
    with_digits_only = [r for r in jsonl.read(path) if set(r) == {"step", "loss/train"}]
    assert [r["step"] for r in with_digits_only] == [1, 2, 3]
    file = jsonl.open_at(path, 2)
    file.close()
    assert file.cut_lines == len(junk) + 1
    assert path.read_bytes() == good[0] + good[1]


def test_an_untouched_file_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(_lines(3)))
    inode = path.stat().st_ino
    file = jsonl.open_at(path, 3)
    file.close()
    assert (path.stat().st_ino, file.cut_lines, file.last_step) == (inode, 0, 3)


def test_every_line_is_written_immediately(tmp_path: Path) -> None:
    file = jsonl.open_at(tmp_path / "metrics.jsonl", 0)
    file.append({"step": 1, "loss/train": 2.5})
    assert jsonl.read(file.path) == [{"step": 1, "loss/train": 2.5}]
    file.close()


def test_not_a_number_is_null(tmp_path: Path) -> None:
    file = jsonl.open_at(tmp_path / "metrics.jsonl", 0)
    file.append({"step": 1, "loss/train": math.nan, "grad_norm": math.inf})
    file.close()
    assert file.path.read_text() == '{"step": 1, "loss/train": null, "grad_norm": null}\n'
    assert math.isnan(jsonl.read(file.path)[0]["loss/train"])


def test_steps_must_increase(tmp_path: Path) -> None:
    file = jsonl.open_at(tmp_path / "metrics.jsonl", 0)
    file.append({"step": 2})
    with pytest.raises(AssertionError, match="not after step 2"):
        file.append({"step": 2})
    file.close()


def test_read_from_continues_at_its_offset(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(_lines(2)) + b'{"step": 3, ')
    records, offset = jsonl.read_from(path, 0)
    assert [r["step"] for r in records] == [1, 2]
    with path.open("ab") as file:
        file.write(b'"loss/train": 1}\n')
    assert [r["step"] for r in jsonl.read_from(path, offset)[0]] == [3]


def test_a_full_disk_is_one_clear_message() -> None:
    """/dev/full fails every write, as a full disk does."""
    file = jsonl.MetricsFile(Path("/dev/full"), last_step=0, cut_lines=0)
    with pytest.raises(UserError, match=r"/dev/full: cannot be written \(No space left on device\)"):
        file.append({"step": 1})
    file.close()


def test_a_directory_that_cannot_be_created_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        jsonl.open_at(tmp_path / "file" / "metrics.jsonl", 0)


DAMAGED = ['"text"', "[1, 2]", '{"a": 1}', "true", "1" + "0" * 400, "null"]


def test_a_damaged_value_is_a_gap_and_a_damaged_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "loss/train": {value}}}' for step, value in enumerate(DAMAGED, start=1)]
    no_steps = [f'{{"step": {value}, "loss/train": 1.0}}' for value in DAMAGED]
    path.write_text("\n".join([*lines, *no_steps, '{"step": -1}', "[" * 100_000, '{"step": 9, "loss/train": 2.5}', ""]))
    records = jsonl.read(path)
    assert [record["step"] for record in records] == [*range(1, len(DAMAGED) + 1), 9]
    assert all(math.isnan(record["loss/train"]) for record in records[:-1])
    assert records[-1]["loss/train"] == 2.5
