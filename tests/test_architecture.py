"""The tree is the architecture: who may import whom, the one door of each outside library, sizes and names.

The rules are plain functions from a file (its path in the repository and its text) to complaints. One test runs them
over the real tree; the others plant violations, in source strings and in a copy of the tree, and expect the complaint,
so that a rule that stopped seeing anything would itself be seen.

Not covered: what a room does with what it may import, and imports under computed names.
"""

import ast
import graphlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "megatron_q3n"

# Room -> rooms it may import. Data flows one way (the map in megatron_q3n/__init__.py), so this is a graph without
# cycles; a new edge is a change of the architecture and is argued for in ARCHITECTURE.md. A room is a file or a folder.
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "planner": {"config"},
    "device": {"config"},
    "parallel": {"config", "device"},
    "data": {"config"},
    "kernels": {"config", "device"},
    "metrics": {"config"},
    "run_directory": {"config", "device"},
    "hf": {"config"},  # a table of names and shapes; it never holds a model
    "model": {"config", "device", "kernels"},  # process groups are handed to it
    "health": {"config", "parallel"},
    "training": {"config", "device", "parallel", "data", "kernels", "model", "metrics"},
    "instruments": {"config", "model", "training"},
    "checkpoint": {"config", "parallel", "model", "training", "hf"},
    "conversion": {"config", "hf", "checkpoint"},  # file to file: builds no model
    "inference": {"config", "device", "data", "kernels", "model"},
    "evaluation": {"config", "parallel", "data", "model", "metrics", "inference", "run_directory"},
    "rl": {"config", "device", "parallel", "data", "kernels", "model", "metrics", "training", "inference"},
    "stages": set(),  # composes all of the above, see below
    "recipe": {"config"},
    "train": {
        "config",
        "planner",
        "device",
        "kernels",
        "recipe",
        "run_directory",
        "stages",
    },  # compiling begins before torch
}
MAY_IMPORT["stages"] = set(MAY_IMPORT) - {"recipe", "stages", "train"}
ROOMS = set(MAY_IMPORT)

# Outside library (or part of one) -> rooms that may import it. The longest name rules.
GPU_KERNELS = {"kernels", "model"}
DOORS: dict[str, set[str]] = {
    "hydra": {"recipe"},
    "omegaconf": {"recipe"},
    "wandb": {"metrics"},
    "wandb_workspaces": {"metrics"},
    "torch": ROOMS - {"config", "planner", "recipe", "train"},  # bad settings are refused before torch loads
    "megatron": {
        "device",
        "parallel",
        "data",
        "model",
        "training",
        "instruments",
        "checkpoint",
        "inference",
        "evaluation",
        "rl",
    },
    "megatron.core.parallel_state": {"parallel"},
    "megatron.core.mpu": {"parallel"},  # its other name
    "megatron.training": set(),
    "megatron.legacy": set(),
    "lm_eval": {"evaluation"},  # and by name from stages, when tasks are asked for
    "transformer_engine": GPU_KERNELS,
    "fla": GPU_KERNELS,
    "flash_qla": GPU_KERNELS,
    "triton": GPU_KERNELS,
    "tilelang": GPU_KERNELS,
}

# Name of an environment variable or function -> the one file that may spell it; the others are handed what it says.
LAUNCH = f"{PACKAGE}/config/launch.py"
SPELLED_IN = {
    "RANK": LAUNCH,
    "LOCAL_RANK": LAUNCH,
    "WORLD_SIZE": LAUNCH,
    "SLURM_PROCID": LAUNCH,
    "SLURM_LOCALID": LAUNCH,
    "init_process_group": f"{PACKAGE}/parallel.py",
    "new_group": f"{PACKAGE}/parallel.py",
}

TOP_LEVEL = {
    ".ci",
    ".github",
    ".gitignore",
    ".pre-commit-config.yaml",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "docs",
    "megatron_q3n",
    "pyproject.toml",
    "recipes",
    "requirements-dev.txt",
    "requirements-eval.txt",
    "requirements-gpu.txt",
    "requirements.txt",
    "slurm",
    "tests",
    "tools",
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80  # its signature and docstring not counted
MAX_FILE_BYTES = 1_000_000
VAGUE = re.compile(r"(^|/)(utils?|common|helpers?|misc|base)(\.\w+|/)")
# Paths of one machine and package registries: nobody else has them.
LOCAL = re.compile(r"(?<![\w.$}~/-])/(root|work|home)/\w|/opt/(pypi|wheels)|--(extra-)?index-url|--find-links")


def repository_complaints(root: Path) -> Iterator[str]:
    """Check every file of the repository that git tracks or would add."""
    for path in repository_files(root):
        file = root / path
        yield from place_complaints(path, file.stat().st_size)
        if file.stat().st_size <= MAX_FILE_BYTES:
            text = file.read_bytes().decode("utf-8", errors="replace")
            yield from text_complaints(path, text)
            if path.endswith(".py"):
                yield from source_complaints(path, text)


def repository_files(root: Path) -> list[str]:
    """List the tracked and the not ignored files, as paths from the root."""
    # safe.directory: CI often runs as root on a checkout that somebody else owns.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(
        [*command, "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    )
    return [path for path in listed.stdout.split("\0") if (root / path).is_file()]


def place_complaints(path: str, size_bytes: int) -> Iterator[str]:
    """Check where a file lies, what it is called and how big it is."""
    if (top := path.split("/")[0]) not in TOP_LEVEL:
        yield f"{path}: {top} is not in the repository's fixed top level"
    if VAGUE.search(path):
        yield f"{path}: a vague name; a file is called by the one noun it holds"
    if size_bytes > MAX_FILE_BYTES:
        yield f"{path}: {size_bytes} bytes are over the limit of {MAX_FILE_BYTES}"


def text_complaints(path: str, text: str) -> Iterator[str]:
    """Check a text file for what works on one machine only."""
    for number, line in enumerate(text.splitlines(), 1):
        if path != "tests/test_architecture.py" and (found := LOCAL.search(line)):
            yield f"{path}:{number}: {found[0]!r} exists on one machine only"


def source_complaints(path: str, text: str) -> Iterator[str]:
    """Check a Python file: sizes everywhere, imports and doors inside the package."""
    tree = ast.parse(text)
    if (lines := len(text.splitlines())) > MAX_FILE_LINES:
        yield f"{path}: {lines} lines are over the limit of {MAX_FILE_LINES}; split it by noun"
    yield from function_complaints(path, tree)
    for line, name in imports_of(tree):
        if name.startswith("."):
            yield f"{path}:{line}: a relative import; write it absolute"
        yield from import_complaints(f"{path}:{line}", room_of(path), name)
    if room_of(path):
        yield from spelling_complaints(path, tree)


def room_of(path: str) -> str | None:
    """Return the room of a file of the package; None for its __init__.py, the tools and the tests."""
    parts = PurePosixPath(path).parts
    if parts[0] != PACKAGE or parts[1] == "__init__.py":
        return None
    return parts[1].removesuffix(".py")


def rooms_on_disk() -> set[str]:
    """Return the rooms that hold code."""
    return {room for p in (ROOT / PACKAGE).rglob("*.py") if (room := room_of(str(p.relative_to(ROOT))))}


def import_complaints(where: str, room: str | None, name: str) -> Iterator[str]:
    """Check one import. Outside the package only doors that are closed to all are closed."""
    if room is not None and room not in MAY_IMPORT:
        yield f"{where}: {room} is not a room on the map of {Path(__file__).name}"
        return
    door = max((lib for lib in DOORS if f"{name}.".startswith(f"{lib}.")), key=len, default=None)
    if door and (room not in DOORS[door] if room else not DOORS[door]):
        allowed = sorted(DOORS[door]) or "closed to all"
        yield f"{where}: {room or 'this file'} must not import {name}; the door of {door}: {allowed}"
    there = name.split(".")[1] if name.startswith(f"{PACKAGE}.") else room
    if room and there != room and there not in MAY_IMPORT[room]:
        yield f"{where}: {room} must not import {there} ({name}); it may: {sorted(MAY_IMPORT[room])}"


def imports_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import, those inside functions and TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            given = [part.value for part in node.args if isinstance(part, ast.Constant)]
            yield from ((node.lineno, str(name)) for name in given[:1])


def spelling_complaints(path: str, tree: ast.AST) -> Iterator[str]:
    """Check the names of variables and functions that belong to one file."""
    for node in ast.walk(tree):
        name = node.value if isinstance(node, ast.Constant) else _name(node)
        if isinstance(name, str) and SPELLED_IN.get(name, path) != path:
            yield f"{path}:{getattr(node, 'lineno', 0)}: {name} belongs to {SPELLED_IN[name]}"


def _name(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def function_complaints(path: str, tree: ast.AST) -> Iterator[str]:
    """Check the length of every function: its body, without the signature and the docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.body[0].lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines, the limit is {MAX_FUNCTION_LINES}"


def test_the_repository_keeps_its_rules() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of the project's own files")
    complaints = list(repository_complaints(ROOT))
    assert not complaints, "\n".join(["", *complaints])


def test_the_map_is_complete_and_has_no_cycle() -> None:
    """The rooms on disk are on the map, its edges and doors name rooms, and no path leads back."""
    assert rooms_on_disk() <= ROOMS
    assert set().union(*MAY_IMPORT.values(), *DOORS.values()) <= ROOMS
    assert all((ROOT / path).is_file() for path in SPELLED_IN.values())
    graphlib.TopologicalSorter(MAY_IMPORT).prepare()  # raises CycleError


@pytest.mark.parametrize("room", sorted(rooms_on_disk() - DOORS["torch"]))
def test_room_loads_without_torch(room: str) -> None:
    """The doors above forbid `import torch`; this also sees it come in through another library."""
    program = f"import sys, {PACKAGE}.{room}; sys.exit('torch' in sys.modules)"
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
        ("stages/sft.py", "import hydra", "the door of hydra: ['recipe']"),
        ("training/fit.py", "import wandb", "the door of wandb: ['metrics']"),
        ("training/fit.py", "importlib.import_module('wandb')", "the door of wandb: ['metrics']"),
        ("device/facts.py", "import transformer_engine.pytorch", "door of transformer_engine"),
        ("training/loss.py", "import triton", "the door of triton: ['kernels', 'model']"),
        ("training/loss.py", "from fla.ops import x", "the door of fla: ['kernels', 'model']"),
        ("rl/loss.py", "import flash_qla", "the door of flash_qla: ['kernels', 'model']"),
        ("hf.py", "from megatron.core import dist_checkpointing", "hf must not import megatron"),
        ("kernels/norm.py", "import megatron.core", "kernels must not import megatron.core"),
        ("training/fit.py", "from megatron.core import parallel_state", "['parallel']"),
        ("training/fit.py", "from megatron.core.parallel_state import x", "['parallel']"),
        ("training/fit.py", "from megatron.core import mpu", "['parallel']"),
        ("training/fit.py", "from megatron.training import x", "closed to all"),
        ("training/fit.py", "import megatron.legacy.model", "closed to all"),
        ("training/fit.py", 'os.environ["RANK"]', "RANK belongs to megatron_q3n/config/launch.py"),
        ("metrics/sink.py", 'os.environ.get("LOCAL_RANK", 0)', "LOCAL_RANK belongs to"),
        ("data/blend.py", 'os.getenv("WORLD_SIZE")', "WORLD_SIZE belongs to"),
        ("stages/sft.py", "dist.init_process_group()", "belongs to megatron_q3n/parallel.py"),
        ("model/build.py", "from .spec import x", "a relative import"),
        ("model/build.py", "from . import spec", "a relative import"),
        ("trainer.py", "import os", "trainer is not a room on the map"),
        ("model/build.py", LONG_FILE, "401 lines are over the limit"),
        ("model/build.py", LONG_FUNCTION, "f has 81 lines"),
    ],
)
def test_a_planted_violation_in_the_package_is_seen(path: str, source: str, complaint: str) -> None:
    found = "\n".join(source_complaints(f"{PACKAGE}/{path}", source))
    assert complaint in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("device/facts.py", "import importlib.util\nimportlib.util.find_spec('triton')"),
        ("model/spec.py", "from megatron_q3n.model.norms import Norm\nimport torch"),
        ("parallel.py", "from megatron.core import parallel_state\ndist.init_process_group()"),
        ("recipe.py", "import hydra\nfrom megatron_q3n import config"),
        ("config/launch.py", 'os.environ["WORLD_SIZE"]\nimport torchlike'),
        ("model/build.py", LONG_DOCSTRING),
        ("__init__.py", '"""The map."""'),
    ],
)
def test_legal_source_gets_no_complaint(path: str, source: str) -> None:
    assert list(source_complaints(f"{PACKAGE}/{path}", source)) == []


def test_tools_and_tests_keep_to_sizes_and_closed_doors_only() -> None:
    assert list(source_complaints("tools/benchmarks/bench.py", "import torch, hydra, wandb")) == []
    assert "closed to all" in "".join(source_complaints("tools/benchmarks/bench.py", "import megatron.training"))
    assert "401 lines" in "".join(source_complaints("tests/test_x.py", LONG_FILE))


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
        (f"{PACKAGE}/training/fit.py", "import wandb\n", "the door of wandb"),
    ],
)
def test_a_planted_file_is_seen(tmp_path: Path, path: str, text: str, complaint: str) -> None:
    """The whole walk, in a repository that is clean but for the planted file."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    plant(tmp_path / ".gitignore", "/runs/\n")
    plant(tmp_path / "runs/ignored.txt", "/root/corpus")
    plant(tmp_path / PACKAGE / "training/state.py", "from megatron_q3n.model import spec\n")
    assert list(repository_complaints(tmp_path)) == []
    plant(tmp_path / path, text)
    found = list(repository_complaints(tmp_path))
    assert len(found) == 1, found
    assert complaint in found[0]
