"""Data preparation: order, atomicity, error messages; and the command line with its exit codes."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_q3n.config import UserError
from megatron_q3n.data import prepare as prepare_module
from megatron_q3n.data.encoding import EncodedDocuments, encode_documents
from megatron_q3n.data.folders import publish
from megatron_q3n.data.manifest import Manifest, token_dtype, verify_prepared
from megatron_q3n.data.prepare import Preparation, prepare
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.data.writer import PreparedWriter

TOOL = Path(__file__).parents[2] / "tools/prepare_data.py"
TEXTS = [f"text {i}: " + "spam and eggs, " * (i % 7) + "\n" for i in range(500)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def manifest_of(request: Preparation) -> Manifest:
    (manifest,) = prepare(request).manifests.values()
    return manifest


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


@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_files_are_those_of_megatron_core(tmp_path: Path, tokenizer: TextTokenizer, vocab_size: int) -> None:
    """Both token types, a single document, and batches with no document."""
    for name, lengths in (("many", [3, 1, 70, 5]), ("one", [4])):
        (tmp_path / f"{name}{vocab_size}").mkdir()
        writer = PreparedWriter(tmp_path / f"{name}{vocab_size}", tokenizer)
        writer._dtype = token_dtype(vocab_size)
        theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.dtype(writer._dtype).type)
        for part in ([], lengths[:2], lengths[2:]):
            ids = np.arange(sum(part)).astype(writer._dtype)
            writer.add(EncodedDocuments(ids, np.array(part, np.int64), 1, 0))
            for document in np.split(ids, np.cumsum(part)[:-1]) if part else []:
                theirs.add_document(document, [len(document)])
        theirs.finalize(str(tmp_path / "theirs.idx"))
        writer.finish([], {})
        for suffix in ("bin", "idx"):
            ours = (tmp_path / f"{name}{vocab_size}" / f"documents.{suffix}").read_bytes()
            assert ours == (tmp_path / f"theirs.{suffix}").read_bytes()


def test_bad_lines_are_skipped_up_to_the_bound(
    corpus: Path, tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "_BATCH_BYTES", 500)
    lines = corpus.read_text().splitlines(keepends=True)
    lines[100] = "{cut\n"
    lines[400] = '{"text": 5}\n'
    corpus.write_text("".join(lines))
    request = {"inputs": (str(corpus),), "tokenizer": tokenizer_path, "show_progress": False}
    for workers in (1, 2):
        output = tmp_path / f"out{workers}"
        prepared = prepare(Preparation(**request, output=output, workers=workers, max_bad_lines=2))
        manifest = prepared.manifests[output]
        assert (manifest.num_documents, manifest.num_bad_lines) == (len(TEXTS) - 2, 2)
        (line,) = prepared.left_out.lines()
        assert line.startswith(f"left out: 2 bad lines: {corpus} line 101: not JSON")
        assert f"{corpus} line 401: field 'text' is int" in line
        with pytest.raises(UserError, match=r"line 401: field.*1 bad lines were skipped before it.*--max-bad-lines"):
            prepare(Preparation(**request, output=tmp_path / "other", workers=workers, max_bad_lines=1))
    with pytest.raises(UserError, match=r"line 101: not JSON.*Correct or remove the line\.$"):
        prepare(Preparation(**request, output=tmp_path / "other", workers=1))
    trained = request | {"tokenizer": None, "train_tokenizer": 300}
    assert manifest_of(Preparation(**trained, output=tmp_path / "bpe", workers=1, max_bad_lines=2)).num_bad_lines == 2


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, tokenizer_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(7):
        (folder / f"empty{number}.txt").write_text(" \n")
    (folder / "a.txt").write_text("text")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".hidden").write_text("no")
    prepared = prepare(Preparation((str(folder),), tmp_path / "out", tokenizer=tokenizer_path, workers=1))
    empty, files = prepared.left_out.lines()
    assert empty.startswith(f"left out: 7 empty documents: {folder}/empty0.txt:1, ")
    assert empty.endswith("empty4.txt:1, …")
    assert files == f"left out: 1 files of an unknown format: {folder}/picture.png"


def test_a_share_is_held_out_by_the_hash_of_the_text(corpus: Path, tmp_path: Path, tokenizer_path: Path) -> None:
    corpus.write_text(corpus.read_text() * 2)
    request = {"inputs": (str(corpus),), "tokenizer": tokenizer_path, "show_progress": False}
    for workers in (1, 2):
        output = tmp_path / f"out{workers}"
        prepare(Preparation(**request, output=output, workers=workers, validation_percent=10))
    parts: dict[str, list[str]] = {}
    for part in ("train", "validation"):
        assert verify_prepared(output / part, full_hash=True).settings["part"] == part
        for name in ("documents.bin", "manifest.json"):
            assert (tmp_path / "out1" / part / name).read_bytes() == (tmp_path / "out2" / part / name).read_bytes()
        tokenizer = TextTokenizer.load(output / part)
        documents = IndexedDataset(str(output / part / "documents"))
        parts[part] = [tokenizer.decode(ids[:-1]) for ids in documents[:]]
    assert sorted(parts["train"] + parts["validation"]) == sorted(TEXTS * 2)
    assert not set(parts["train"]) & set(parts["validation"]), "equal texts are on one side"
    assert 50 < len(parts["validation"]) < 150
    with pytest.raises(UserError, match=r"already holds a prepared data set"):
        prepare(Preparation(**request, output=output))
    corpus.write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match=r"--validation-percent 0\.001 splits 2 documents into 2 for training and 0"):
        prepare(Preparation(**request, output=tmp_path / "small", workers=1, validation_percent=0.001))


def test_progress_in_a_log(corpus: Path, tmp_path: Path, tokenizer_path: Path) -> None:
    """Without a terminal the last line says 100 %; --quiet prints nothing."""
    arguments = [corpus, "--tokenizer", tokenizer_path, "--workers", "1", "--output"]
    done = run_tool(*arguments, tmp_path / "a", program=("-c", WATCHED))
    assert "tokenizing: 100 % of" in done.stderr
    assert done.returncode == 0
    assert "torch was imported" not in done.stdout, "torch and megatron-core are not needed"
    assert run_tool(*arguments, tmp_path / "b", "--quiet").stderr == ""


def test_workers_end_when_their_parent_is_killed(tmp_path: Path, tokenizer_path: Path) -> None:
    fifo = tmp_path / "slow.jsonl"
    fifo.write_text('{"text": "a"}\n')
    command = [sys.executable, "-c", KEPT_OPEN, str(TOOL), str(fifo), str(tokenizer_path), str(tmp_path / "out")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/")
    assert parent.stdout is not None
    assert parent.stdout.readline() == "workers run\n"
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 2
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


# a preparation whose input never ends, started as the tool's module so that its workers can import it
KEPT_OPEN = """
import itertools, sys
from pathlib import Path
from megatron_q3n.data import encoding_workers, prepare
def endless(sources, column):
    from megatron_q3n.data.readers import RawDocument
    for number in itertools.count(1):
        yield [RawDocument(Path("x"), number, "some text", 1)], 1
        if number == 9:
            print("workers run", flush=True)
            import time
            time.sleep(600)
prepare._batches = endless
_, tool, source, tokenizer, output = sys.argv
prepare.prepare(prepare.Preparation((source,), Path(output), tokenizer=Path(tokenizer), workers=2, show_progress=False))
"""


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
    assert manifest_of(Preparation(**request, force=True)).num_documents == 1
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
    manifest = manifest_of(Preparation((str(corpus),), tmp_path / "out", train_tokenizer=300, workers=1))
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
