"""Data preparation: order, atomicity, error messages; and the command line with its exit codes."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_q3n.config import UserError
from megatron_q3n.data import prepare as prepare_module
from megatron_q3n.data.encoding import encode_documents
from megatron_q3n.data.folders import publish
from megatron_q3n.data.manifest import token_dtype, verify_prepared
from megatron_q3n.data.prepare import Preparation, prepare
from megatron_q3n.data.tokenizer import TextTokenizer

TOOL = Path(__file__).parents[2] / "tools/prepare_data.py"
TEXTS = [f"text {i}: " + "spam and eggs, " * (i % 7) + "\n" for i in range(500)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def run_tool(*arguments: object, program: tuple[str, ...] = (str(TOOL),)) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=300)


def test_documents_are_the_texts_in_order_each_closed(
    corpus: Path, tmp_path: Path, tokenizer: TextTokenizer, tokenizer_path: Path
) -> None:
    prepare(Preparation((str(corpus),), tmp_path / "out", tokenizer=tokenizer_path, workers=1))
    documents = IndexedDataset(str(tmp_path / "out" / "documents"))
    assert documents.index.dtype == np.uint16
    assert len(documents) == len(documents.document_indices) - 1 == len(TEXTS)
    for text, ids in zip(TEXTS, documents[:]):
        assert ids[-1] == tokenizer.eod
        assert tokenizer.decode(ids[:-1]) == text


def test_the_number_of_workers_changes_nothing(
    corpus: Path, tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "_BATCH_BYTES", 500)  # many batches, so that they can overtake
    for workers in (1, 2):
        output = tmp_path / f"out{workers}"
        prepare(Preparation((str(corpus),), output, tokenizer=tokenizer_path, workers=workers))
    for name in ("documents.bin", "documents.idx", "tokenizer.json", "manifest.json"):
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_the_middle_leaves_nothing(
    corpus: Path, tmp_path: Path, tokenizer_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "_BATCH_BYTES", 500)
    corpus.write_text(corpus.read_text() + "{cut\n")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=f"line {len(TEXTS) + 1}: not JSON"):
        prepare(Preparation((str(corpus),), tmp_path / "out", tokenizer=tokenizer_path, workers=workers))
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_folder_is_replaced_only_by_force(corpus: Path, tmp_path: Path, tokenizer_path: Path) -> None:
    output = tmp_path / "out"
    # an empty folder is allowed
    output.mkdir()
    request = {"inputs": (str(corpus),), "output": output, "tokenizer": tokenizer_path, "workers": 1}
    prepare(Preparation(**request))
    corpus.write_text('{"text": "now only this"}\n')
    with pytest.raises(UserError, match=r"already holds a prepared data set.*--force"):
        prepare(Preparation(**request))
    assert prepare(Preparation(**request, force=True)).num_documents == 1
    assert verify_prepared(output).num_documents == 1
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.jsonl", "out"}
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "only_copy.txt").write_text("precious")
    with pytest.raises(UserError, match=r"is not a prepared data set.*untouched"):
        prepare(Preparation(**request | {"output": foreign}, force=True))
    assert (foreign / "only_copy.txt").read_text() == "precious"


def test_nothing_but_white_space_is_refused(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\n")
    with pytest.raises(UserError, match=r"holds no text: 1 documents in 1 files"):
        prepare(Preparation((str(tmp_path / "a.txt"),), tmp_path / "out", tokenizer=tokenizer_path, workers=1))
    assert not (tmp_path / "out").exists()


def test_training_a_tokenizer_on_the_input(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(Preparation((str(corpus),), tmp_path / "out", train_tokenizer=300, workers=1))
    assert manifest.tokenizer.vocab_size == TextTokenizer.load(tmp_path / "out").vocab_size == 300
    corpus.write_text("{cut\n")
    with pytest.raises(UserError, match="line 1: not JSON"):
        prepare(Preparation((str(corpus),), tmp_path / "other", train_tokenizer=300, workers=1))


def test_token_types_hold_every_id(tokenizer: TextTokenizer) -> None:
    assert (token_dtype(65536), token_dtype(65537)) == ("uint16", "int32")
    documents = encode_documents(tokenizer, ["ab", " ", "", "c"])
    assert documents.ids.dtype == np.uint16
    assert documents.lengths.tolist() == [3, 2]
    assert documents.num_skipped_empty == 2


def _fail_halfway(folder: Path, code: int) -> None:
    (folder / "half").touch()
    raise OSError(code, os.strerror(code), str(folder / "half"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_error_keeps_the_old_folder(tmp_path: Path, code: int) -> None:
    final = tmp_path / "out"
    final.mkdir()
    (final / "old").touch()
    with (
        pytest.raises(UserError, match=rf"out: cannot be written \({os.strerror(code)}.*--output"),
        publish(final, setting="--output", replace=True) as folder,
    ):
        _fail_halfway(folder, code)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in final.iterdir()] == ["old"]


def test_of_two_concurrent_publishes_the_first_is_kept(tmp_path: Path) -> None:
    final = tmp_path / "cache" / "corpus"
    with publish(final, setting="data.cache_dir") as slow:
        (slow / "slow").touch()
        with publish(final, setting="data.cache_dir") as quick:
            (quick / "quick").touch()
    assert [path.name for path in final.parent.iterdir()] == ["corpus"]
    assert [path.name for path in final.iterdir()] == ["quick"]


def test_a_file_in_the_way_of_the_cache_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"cannot be written.*data.cache_dir"),
        publish(tmp_path / "file" / "corpus", setting="data.cache_dir"),
    ):
        pass


def test_command_line_prepares_and_verifies(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = run_tool(corpus, "--output", output, "--train-tokenizer", "300", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert f"{output}: {len(TEXTS)} documents" in done.stdout
    assert "UserWarning" not in done.stderr
    assert run_tool("verify", output, "--full").returncode == 0
    with (output / "documents.bin").open("ab") as stream:
        stream.write(b"x")
    broken = run_tool("verify", output)
    assert (broken.returncode, broken.stdout) == (2, "")
    assert "documents.bin" in broken.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl", "--train-tokenizer", "300"], "no such file or folder"),
        (["{corpus}", "--train-tokenizer", "300", "--column", "txt"], "Did you mean 'text'?"),
        (["{corpus}", "--tokenizer", "nowhere"], "tokenizer nowhere: nowhere does not exist"),
        (["{corpus}"], "one of the arguments --tokenizer --train-tokenizer is required"),
        (["{corpus}", "--train-tokenizer", "300", "--workers", "-1"], "not a whole number above 0"),
        (["{corpus}", "--train-tokenizer", "3"], "257 or more"),
    ],
)
def test_command_line_refuses_before_loading_torch(
    corpus: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    filled = [argument.format(corpus=corpus) for argument in arguments]
    done = run_tool(*filled, "--output", tmp_path / "out", program=("-c", WATCHED))
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


WATCHED = f"""
import runpy, sys
try:
    runpy.run_path({str(TOOL)!r}, run_name="__main__")
finally:
    print("torch was imported\\n" * ("torch" in sys.modules), end="")
"""
