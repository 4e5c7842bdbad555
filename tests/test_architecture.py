"""Architecture of the repository: the rules of tests/architecture_rules.py hold, and each finds a planted violation.

One test runs the rules over the real tree. The others run them over sources with a violation, in strings and in a copy
of the tree, and expect the complaint: a rule that finds nothing would be detected.
"""

import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture_rules import (
    ALLOWED_IMPORTERS,
    MAX_FILE_BYTES,
    MAX_FILE_LINES,
    MAX_FUNCTION_LINES,
    MAY_IMPORT,
    NAMED_ONLY_IN,
    P95_FUNCTION_LINES,
    PACKAGE,
    PARTS,
    ROOT,
    parts_on_disk,
    repository_complaints,
    source_complaints,
    text_complaints,
    tree_complaints,
)


def test_the_repository_keeps_its_rules() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of the project's own files")
    complaints = list(repository_complaints(ROOT))
    assert not complaints, "\n".join(["", *complaints])


def test_the_allowed_imports_are_complete_and_have_no_circle() -> None:
    """Each part on disk has a row, rows name parts only, and no part imports itself by way of others."""
    assert parts_on_disk() <= PARTS
    assert set().union(*MAY_IMPORT.values(), *ALLOWED_IMPORTERS.values()) <= PARTS
    assert all((ROOT / path).is_file() for path in NAMED_ONLY_IN.values())
    # raises CycleError
    graphlib.TopologicalSorter(MAY_IMPORT).prepare()


@pytest.mark.parametrize("part", sorted(parts_on_disk() - ALLOWED_IMPORTERS["torch"]))
def test_part_is_imported_without_torch(part: str) -> None:
    """The rules forbid `import torch`; this also detects an import of torch by another library."""
    program = f"import sys, {PACKAGE}.{part}; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0


LONG_FILE = "x = 1\n" * (MAX_FILE_LINES + 1)
LONG_FUNCTION = "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES + 1)
LONG_DOCSTRING = 'def f():\n    """A\n' + "    line\n" * MAX_FUNCTION_LINES + '    """\n'


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("config/model.py", "import torch", "config must not import torch"),
        ("config/model.py", "import torch.nn", "config must not import torch.nn"),
        ("planner/plan.py", "from torch import nn", "planner must not import torch.nn"),
        ("train.py", "import torch", "train must not import torch"),
        ("recipe.py", "import torch", "recipe must not import torch"),
        ("model/build.py", "from megatron_q3n.training import state", "must not import training"),
        ("model/build.py", "from megatron_q3n import data", "model must not import data"),
        ("model/build.py", "import megatron_q3n.parallel", "model must not import parallel"),
        ("data/batch.py", "def f():\n    import megatron_q3n.model", "batch.py:2: data must not"),
        ("hf.py", "if TYPE_CHECKING:\n    import megatron_q3n.model", "hf must not import model"),
        ("stages/sft.py", "import megatron_q3n.train", "stages must not import train"),
        ("config/run.py", "from megatron_q3n.metrics import x", "config must not import metrics"),
        ("stages/sft.py", "from omegaconf import DictConfig", "must not import omegaconf"),
        ("stages/sft.py", "import hydra", "allowed importers of hydra: ['recipe']"),
        ("training/fit.py", "import wandb", "allowed importers of wandb: ['metrics']"),
        ("training/fit.py", "importlib.import_module('wandb')", "allowed importers of wandb: ['metrics']"),
        ("device/selection.py", "import transformer_engine.pytorch", "allowed importers of transformer_engine"),
        ("training/loss.py", "import triton", "allowed importers of triton: ['kernels', 'model']"),
        ("training/loss.py", "from fla.ops import x", "allowed importers of fla: ['kernels', 'model']"),
        ("rl/loss.py", "import flash_qla", "allowed importers of flash_qla: ['kernels', 'model']"),
        ("hf.py", "from megatron.core import dist_checkpointing", "hf must not import megatron"),
        ("kernels/norm.py", "import megatron.core", "kernels must not import megatron.core"),
        ("training/fit.py", "from megatron.core import parallel_state", "['parallel']"),
        ("training/fit.py", "from megatron.core.parallel_state import x", "['parallel']"),
        ("training/fit.py", "from megatron.core import mpu", "['parallel']"),
        ("training/fit.py", "from megatron.training import x", "allowed importers of megatron.training: none"),
        ("training/fit.py", "import megatron.legacy.model", "allowed importers of megatron.legacy: none"),
        ("training/fit.py", 'os.environ["RANK"]', "RANK belongs to megatron_q3n/config/launch.py"),
        ("metrics/sink.py", 'os.environ.get("LOCAL_RANK", 0)', "LOCAL_RANK belongs to"),
        ("data/blend.py", 'os.getenv("WORLD_SIZE")', "WORLD_SIZE belongs to"),
        ("stages/sft.py", "dist.init_process_group()", "belongs to megatron_q3n/parallel.py"),
        ("model/build.py", "from .spec import x", "a relative import"),
        ("model/build.py", "from . import spec", "a relative import"),
        ("trainer.py", "import os", "trainer is not a part listed in tests/architecture_rules.py"),
        ("model/build.py", "from megatron_q3n.model.no_such_file import x", "there is no module megatron_q3n.model.no"),
        ("model/build.py", "importlib.import_module('megatron_q3n.model.nothing')", "there is no module megatron_q3n"),
        ("model/build.py", "importlib.import_module('no_such_package.x')", "there is no module no_such_package.x"),
        ("model/build.py", "import sys\nsys.path.insert(0, '')", "build.py:2: sys.path.insert"),
        ("model/moe/layer.py", "from megatron_q3n.kernels import registry", "read a field of the plan"),
        ("kernels/norms.py", "def _fits(x):\n    return True", "_fits belongs to the rules"),
        ("model/moe/layer.py", "def takes_tokens(self):\n    return True", "takes_tokens belongs to the rules"),
        ("model/norms.py", "def f(x):\n    return x.is_cuda", "x.is_cuda belongs to the rules"),
        ("inference/engine.py", "if torch.cuda.is_available(): pass", "is_available belongs to the rules"),
        ("model/build.py", LONG_FILE, "401 lines are over the limit"),
        ("model/build.py", LONG_FUNCTION, "f has 81 lines"),
    ],
)
def test_a_planted_violation_in_the_package_is_found(path: str, source: str, complaint: str) -> None:
    found = "\n".join(source_complaints(f"{PACKAGE}/{path}", source))
    assert complaint in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("device/selection.py", "import importlib.util\nimportlib.util.find_spec('triton')"),
        ("model/spec.py", "from megatron_q3n.model.norms import Norm\nimport torch"),
        ("parallel.py", "from megatron.core import parallel_state\ndist.init_process_group()"),
        ("recipe.py", "import hydra\nfrom megatron_q3n import config"),
        ("config/launch.py", 'os.environ["WORLD_SIZE"]\nimport torchlike'),
        ("model/build.py", LONG_DOCSTRING),
        ("model/transformer_config.py", "from megatron_q3n.kernels import registry"),
        ("training/state.py", "def f(device):\n    return device.is_cuda"),
        ("__init__.py", '"""The package."""'),
    ],
)
def test_legal_source_gets_no_complaint(path: str, source: str) -> None:
    assert list(source_complaints(f"{PACKAGE}/{path}", source)) == []


def test_tools_and_tests_have_limits_of_size_and_forbidden_libraries_only() -> None:
    assert list(source_complaints("tools/benchmarks/bench.py", "import torch, hydra, wandb")) == []
    assert "allowed importers of megatron.training: none" in "".join(
        source_complaints("tools/benchmarks/bench.py", "import megatron.training")
    )
    assert "401 lines" in "".join(source_complaints("tests/test_x.py", LONG_FILE))
    assert "sys.path.append" in "".join(source_complaints("tools/x.py", "import sys\nsys.path.append('')"))


def test_an_exception_from_the_formatter_is_found() -> None:
    for exception in ("skip", "off"):
        assert "tools/x.py:2: an exception" in "".join(
            text_complaints("tools/x.py", f"x = 1\ny = 2  # fmt: {exception}")
        )


def package(**files: str) -> dict[str, str]:
    """Return the sources of a package with these modules; __ in a name stands for /."""
    return {f"{PACKAGE}/{name.replace('__', '/')}.py": text for name, text in files.items()}


IMPORT = f"from {PACKAGE}.%s import x"


@pytest.mark.parametrize(
    "late",
    [
        IMPORT % "model.a",
        f"import {PACKAGE}.model.a",
        f"from {PACKAGE}.model import a",
        f"def f():\n    {IMPORT % 'model.a'}",
        f"if TYPE_CHECKING:\n    {IMPORT % 'model.a'}",
        f"import_module('{PACKAGE}.model.a')",
    ],
)
def test_an_import_circle_of_files_is_found(late: str) -> None:
    """However the import that closes the circle is written."""
    sources = package(model__a=IMPORT % "model.b", model__b=IMPORT % "model.c", model__c=late, model__d=late)
    (found,) = tree_complaints(sources)
    circle = " -> ".join(f"{PACKAGE}/model/{name}.py" for name in "abca")
    assert found == f"import circle of files: {circle}"


def test_an_import_circle_of_folders_is_found() -> None:
    """Two folders may import each other through different files; a folder and the ones below it may, too."""
    sources = package(model__a=IMPORT % "model.moe.b", model__moe__c=IMPORT % "model.d", model__moe__b="", model__d="")
    assert list(tree_complaints(sources)) == []
    sources |= package(model__mtp__e=IMPORT % "model.moe.b", model__mtp__f="", model__moe__g=IMPORT % "model.mtp.f")
    (found,) = tree_complaints(sources)
    assert found == f"import circle of folders: {PACKAGE}/model/moe/ -> {PACKAGE}/model/mtp/ -> {PACKAGE}/model/moe/"


def test_long_functions_are_found_when_they_are_many() -> None:
    long = "\n".join(["def f():", *["    x = 1"] * (P95_FUNCTION_LINES + 1), ""])
    (found,) = tree_complaints(package(a=long * 6 + "def g(): pass\n" * 94))
    assert f"functions have {P95_FUNCTION_LINES + 1} lines or more" in found
    assert list(tree_complaints(package(a=long * 4 + "def g(): pass\n" * 96))) == []


def plant(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("notes.md", "", "notes.md is not in the repository's fixed top level"),
        ("scripts/run.sh", "", "scripts is not in the repository's fixed top level"),
        (f"{PACKAGE}/utils.py", "", "a vague name"),
        (f"{PACKAGE}/model/common/norm.py", "", "a vague name"),
        ("tests/helper.py", "", "a vague name"),
        ("tests/data/corpus.bin", "x" * (MAX_FILE_BYTES + 1), "over the limit of 1000000"),
        ("slurm/train.sbatch", "cd /work/main", "slurm/train.sbatch:1: '/work/m'"),
        ("recipes/data/text.yaml", "path: /root/corpus", "exists on one machine only"),
        ("requirements.txt", "torch\n--index-url https://x", "requirements.txt:2: '--index-url'"),
        (f"{PACKAGE}/training/fit.py", "import wandb\n", "allowed importers of wandb"),
    ],
)
def test_a_planted_file_is_found(tmp_path: Path, path: str, text: str, complaint: str) -> None:
    """The whole check, in a repository whose only violation is the planted file."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    plant(tmp_path / ".gitignore", "/runs/\n")
    plant(tmp_path / "runs/ignored.txt", "/root/corpus")
    plant(tmp_path / PACKAGE / "training/state.py", "from megatron_q3n.model import spec\n")
    assert list(repository_complaints(tmp_path)) == []
    plant(tmp_path / path, text)
    found = list(repository_complaints(tmp_path))
    assert len(found) == 1, found
    assert complaint in found[0]
