"""Standard library corpus: its files, its split, and its cache.

Not covered here: preparing the whole library (five seconds), which the quickstart covers.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_q3n.config import UserError
from megatron_q3n.data.folders import cache_root
from megatron_q3n.data.manifest import verify_prepared
from megatron_q3n.data.stdlib import is_validation, prepare_stdlib, stdlib_files

ROOT = Path(__file__).parents[2]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Write a folder shaped like a standard library."""
    root = tmp_path / "lib"
    for name in [f"module_{i}.py" for i in range(30)] + ["json/decoder.py", "_sysconfigdata_x.py"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"'''Module {name}.'''\n\nVALUE = {name!r}\n" * 3)
    for name in ("test/test_x.py", "json/tests/y.py", "site-packages/z.py", "encodings/cp1.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("never = 'seen'\n")
    (root / "latin.py").write_bytes(b"# caf\xe9\n")
    return root


def test_this_python_has_a_corpus() -> None:
    files = stdlib_files()
    assert len(files) > 300
    assert {"ast.py", "decoder.py"} <= {file.name for file in files}
    assert not {"test", "idlelib", "site-packages"} & {part for file in files for part in file.parts}
    assert files == sorted(files, key=str)


def test_split_is_by_file_and_stable(library: Path, tmp_path: Path) -> None:
    corpus = prepare_stdlib(tmp_path / "cache", 280, 20.0, root=library)
    train, validation = (verify_prepared(corpus.train, True), verify_prepared(corpus.validation, True))
    names = {
        part: {Path(source.path).relative_to(library).as_posix() for source in manifest.sources}
        for part, manifest in (("train", train), ("validation", validation))
    }
    assert names["validation"] == {n for n in names["train"] | names["validation"] if is_validation(n, 20.0)}
    assert not names["train"] & names["validation"]
    assert len(names["train"]) + len(names["validation"]) == 31
    assert train.tokenizer == validation.tokenizer
    assert train.settings["num_files_not_utf8"] == 1
    # the split must never move: these come from SHA-256 of the names, not from this machine
    assert [n for n in ("ast.py", "json/decoder.py", "turtle.py") if is_validation(n, 50.0)] == ["json/decoder.py"]


def test_cache_is_used_and_follows_settings_and_sources(library: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = prepare_stdlib(cache, 280, 20.0, root=library)
    stamp = (first.train / "documents.bin").stat().st_mtime_ns
    assert prepare_stdlib(cache, 280, 20.0, root=library) == first
    assert (first.train / "documents.bin").stat().st_mtime_ns == stamp
    others = {first.train, prepare_stdlib(cache, 281, 20.0, root=library).train}
    others.add(prepare_stdlib(cache, 280, 30.0, root=library).train)
    (library / "module_1.py").write_text("changed = 'size'\n")
    others.add(prepare_stdlib(cache, 280, 20.0, root=library).train)
    assert len(others) == 4


def test_packages_are_added_and_split_by_folder(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        for name in ("one.py", "two.py", "tests/three.py"):
            file = tmp_path / "site/shelf_of_books" / f"shelf_{number}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"TITLE = {str(file)!r}\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    corpus = prepare_stdlib(tmp_path / "cache", 280, 30.0, root=library, packages=["shelf_of_books"])
    alone = prepare_stdlib(tmp_path / "cache", 280, 30.0, root=library)
    both = verify_prepared(corpus.train, True), verify_prepared(corpus.validation, True)
    shelves = [{Path(s.path).parent.name for s in part.sources if "shelf_of_books" in s.path} for part in both]
    assert shelves[0]
    assert shelves[1]
    assert not shelves[0] & shelves[1]
    books = [s.path for part in both for s in part.sources if "shelf_of_books" in s.path]
    assert len(books) == 24
    assert not [path for path in books if "tests" in path]
    assert both[0].tokenizer == verify_prepared(alone.train).tokenizer, "the library's own"
    assert "shelf_of_books" not in sys.modules
    for package in ("no_such_package", "os.path", "stat"):  # missing, no package's name, no folder
        with pytest.raises(UserError, match=rf"stdlib_packages: {package} is not installed"):
            prepare_stdlib(tmp_path / "cache", 280, 30.0, root=library, packages=[package])


def test_a_warm_cache_needs_no_torch(library: Path, tmp_path: Path) -> None:
    prepare_stdlib(tmp_path / "cache", 280, 20.0, root=library)
    code = (
        "import sys; from pathlib import Path; from megatron_q3n.data.stdlib import prepare_stdlib;"
        f"prepare_stdlib(Path({str(tmp_path / 'cache')!r}), 280, 20.0, root=Path({str(library)!r}));"
        "sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_damaged_cache_and_hopeless_split(library: Path, tmp_path: Path) -> None:
    corpus = prepare_stdlib(tmp_path / "cache", 280, 20.0, root=library)
    (corpus.train / "documents.bin").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"documents.bin: 3 bytes.*delete .* and run again"):
        prepare_stdlib(tmp_path / "cache", 280, 20.0, root=library)
    with pytest.raises(UserError, match=r"stdlib_validation_percent=0.001 splits .* 0 for validation"):
        prepare_stdlib(tmp_path / "cache", 280, 0.001, root=library)
    with pytest.raises(UserError, match="holds no Python source"):
        prepare_stdlib(tmp_path / "cache", 280, 5.0, root=tmp_path / "nothing")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("Q3N_CACHE", "/from/environment")
    assert cache_root(None) == Path("/from/environment")
    assert cache_root("~/mine") == Path.home() / "mine"
    monkeypatch.delenv("Q3N_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / ".cache" / "megatron_q3n"
