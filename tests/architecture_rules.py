"""Rules of the architecture: allowed imports, allowed importers of each library, import circles, sizes, places, style.

Each rule is a function from a file (its path in the repository and its text), or from the whole tree, to complaints.
tests/test_architecture.py runs them over the repository and over planted violations. Names: tests/naming_rules.py.

A *part* of the package is a file or a folder directly below megatron_q3n/. Not covered: what a part does with an import
that is allowed, and imports under names computed at run time.
"""

import ast
import importlib.util
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parent.parent
PACKAGE = "megatron_q3n"

# Part -> parts it may import. Data flows one way (the list in megatron_q3n/__init__.py), so this is a graph without
# circles. A new edge is a change of the architecture and needs a reason in ARCHITECTURE.md.
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "packing": set(),
    "planner": {"config"},
    "device": {"config"},
    "parallel": {"config", "device"},
    "data": {"config", "packing"},
    "kernels": {"config", "device", "packing"},
    "metrics": {"config"},
    "run_directory": {"config", "device"},
    "run_lock": {"config"},
    # a table of names and shapes, without a model
    "hf": {"config"},
    # process groups are arguments
    "model": {"config", "device", "kernels", "packing"},
    "health": {"config", "parallel", "training"},
    "training": {"config", "device", "parallel", "data", "kernels", "model", "metrics", "packing"},
    "instruments": {"config", "model", "training", "packing"},
    "checkpoint": {"config", "parallel", "model", "training", "hf"},
    # from file to file, without a model; the tokenizer of a run is exported with its weights
    "conversion": {"config", "hf", "checkpoint", "data", "run_directory"},
    "inference": {"config", "device", "data", "kernels", "model"},
    "server": {"config", "data", "inference", "model"},
    "evaluation": {"config", "parallel", "data", "model", "metrics", "inference", "run_directory", "packing"},
    "rl": {"config", "device", "parallel", "data", "kernels", "model", "metrics", "training", "inference", "packing"},
    # composes all of the above, see below
    "stages": set(),
    "recipe": {"config"},
    # kernels: their compilation begins before torch is imported
    "train": {"config", "planner", "device", "kernels", "recipe", "run_directory", "stages"},
}
MAY_IMPORT["stages"] = set(MAY_IMPORT) - {"recipe", "stages", "train"}
PARTS = set(MAY_IMPORT)

# Outside library (or part of one) -> parts that may import it; an empty set: none, nor tools or tests. The longest
# matching name applies.
GPU_KERNELS = {"kernels", "model"}
ALLOWED_IMPORTERS: dict[str, set[str]] = {
    "hydra": {"recipe"},
    "omegaconf": {"recipe"},
    "wandb": {"metrics"},
    "wandb_workspaces": {"metrics"},
    # bad settings are refused before torch is imported
    "torch": PARTS - {"config", "planner", "recipe", "train"},
    "megatron": {
        *("device", "parallel", "data", "model", "training", "instruments"),
        *("checkpoint", "inference", "evaluation", "rl"),
    },
    "megatron.core.parallel_state": {"parallel"},
    # another name of parallel_state
    "megatron.core.mpu": {"parallel"},
    "megatron.training": set(),
    "megatron.legacy": set(),
    "starlette": {"server"},
    "uvicorn": {"server"},
    "prometheus_client": {"server"},
    # and by name from stages, when the settings name tasks
    "lm_eval": {"evaluation"},
    "transformer_engine": GPU_KERNELS,
    "fla": GPU_KERNELS,
    "flash_qla": GPU_KERNELS,
    "triton": GPU_KERNELS,
    "tilelang": GPU_KERNELS,
}

# Environment variable or function -> the one file that may name it; other files receive its value as an argument.
LAUNCH = f"{PACKAGE}/config/launch.py"
NAMED_ONLY_IN = {
    "RANK": LAUNCH,
    "LOCAL_RANK": LAUNCH,
    "WORLD_SIZE": LAUNCH,
    "SLURM_PROCID": LAUNCH,
    "SLURM_LOCALID": LAUNCH,
    "init_process_group": f"{PACKAGE}/parallel.py",
    "new_group": f"{PACKAGE}/parallel.py",
}

TOP_LEVEL = {
    *(".ci", ".github", ".gitignore", ".pre-commit-config.yaml"),
    *("ARCHITECTURE.md", "CONTRIBUTING.md", "LICENSE", "README.md"),
    *("docs", "megatron_q3n", "pyproject.toml", "recipes"),
    *("requirements-dev.txt", "requirements-eval.txt", "requirements-gpu.txt", "requirements.txt"),
    *("slurm", "tests", "tools"),
}
CODE_FOLDERS = (PACKAGE, "tools", "slurm", "tests")
# Where a kernel's availability is decided or recorded; everything else reads the ExecutionPlan.
CHOOSES_PATHS = tuple(
    f"{PACKAGE}/{path}"
    for path in ("config/", "device/", "kernels/startup/", "kernels/registry.py", "model/transformer_config.py")
)
PATH_PREDICATE = re.compile(r"_*(is_fused|fuses|fits|serves|supports(_\w+)?|can_(fuse|run)\w*|(takes|adds|goes)_\w+)")
LAYERS = ("model", "inference", "training", "rl", "evaluation", "instruments")
MAX_FILE_LINES = 400
# Without signature and docstring. P95: 95 % of the package's functions are no longer than this.
MAX_FUNCTION_LINES, P95_FUNCTION_LINES = 80, 28
MAX_FILE_BYTES = 1_000_000
VAGUE = re.compile(r"(^|/)(utils?|common|helpers?|misc|base)(\.\w+|/)")
# Paths of one machine, and package registries, which exist for one user only.
LOCAL = re.compile(r"(?<![\w.$}~/-])/(root|work|home)/\w|/opt/(pypi|wheels)|--(extra-)?index-url|--find-links")
# Files of rules, whose own text holds what the rules forbid.
RULE_FILES = ("tests/architecture_rules.py", "tests/test_architecture.py")


def repository_complaints(root: Path) -> Iterator[str]:
    """Check every file of the repository that git tracks or would add."""
    sources = {}
    for path in repository_files(root):
        file = root / path
        yield from place_complaints(path, file.stat().st_size)
        if file.stat().st_size <= MAX_FILE_BYTES:
            text = file.read_bytes().decode("utf-8", errors="replace")
            yield from text_complaints(path, text)
            if path.endswith(".py"):
                sources[path] = text
                yield from source_complaints(path, text)
    yield from tree_complaints({path: text for path, text in sources.items() if path.startswith(f"{PACKAGE}/")})


def repository_files(root: Path) -> list[str]:
    """List the tracked and the not ignored files, as paths from the root."""
    # safe.directory: CI often runs as root on a checkout that another user owns
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return [path for path in listed.stdout.split("\0") if (root / path).is_file()]


def place_complaints(path: str, size_bytes: int) -> Iterator[str]:
    """Check a file's folder, name and size."""
    if (top := path.split("/")[0]) not in TOP_LEVEL:
        yield f"{path}: {top} is not in the repository's fixed top level"
    if VAGUE.search(path):
        yield f"{path}: a vague name; name the file by the one thing it contains"
    if size_bytes > MAX_FILE_BYTES:
        yield f"{path}: {size_bytes} bytes are over the limit of {MAX_FILE_BYTES}"


def text_complaints(path: str, text: str) -> Iterator[str]:
    """Check a text file for what works on one machine only, and for exceptions from the formatter."""
    if path in RULE_FILES:
        return
    for number, line in enumerate(text.splitlines(), 1):
        if match := LOCAL.search(line):
            yield f"{path}:{number}: {match[0]!r} exists on one machine only"
        if path.endswith(".py") and re.search(r"#\s*fmt:\s*(skip|off)", line):
            yield f"{path}:{number}: an exception from the formatter; move the comment above the line"


def source_complaints(path: str, text: str) -> Iterator[str]:
    """Check a Python file: sizes, imports and sys.path everywhere, allowed imports inside the package."""
    tree, part = ast.parse(text), part_of(path)
    if (lines := len(text.splitlines())) > MAX_FILE_LINES:
        yield f"{path}: {lines} lines are over the limit of {MAX_FILE_LINES}; split it by subject"
    for line, name, count in function_lengths(tree):
        if count > MAX_FUNCTION_LINES:
            yield f"{path}:{line}: {name} has {count} lines, the limit is {MAX_FUNCTION_LINES}"
    for line, name in imports_of(tree):
        if name.startswith("."):
            yield f"{path}:{line}: a relative import; write it absolute"
        yield from import_complaints(f"{path}:{line}", part, name)
    yield from missing_module_complaints(path, tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.path.insert", "sys.path.append"):
            yield f"{path}:{node.lineno}: {ast.unparse(node)}; the checkout is installed, import by the full name"
    if part:
        yield from single_file_complaints(path, tree)
        yield from path_choice_complaints(path, tree)


def path_choice_complaints(path: str, tree: ast.AST) -> Iterator[str]:
    """Check that a file leaves the choice of kernels and paths to the ExecutionPlan (config/execution_rules.py)."""
    if path.startswith(CHOOSES_PATHS):
        return
    where = f"belongs to the rules of {PACKAGE}/config/execution_rules.py; read a field of the plan"
    for line, name in imports_of(tree):
        if name.startswith(f"{PACKAGE}.kernels.registry"):
            yield f"{path}:{line}: the registry of kernels {where}"
    for node in ast.walk(tree):
        is_layer = part_of(path) in ("kernels", *LAYERS)
        if is_layer and isinstance(node, ast.FunctionDef) and PATH_PREDICATE.fullmatch(node.name):
            yield f"{path}:{node.lineno}: {node.name} {where}"
        if part_of(path) in LAYERS and isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.endswith(("cuda.is_available", ".is_cuda")) and not name.endswith("device.is_cuda"):
                yield f"{path}:{node.lineno}: {name} {where}"


def part_of(path: str) -> str | None:
    """Return the part of a file of the package; None for its __init__.py, the tools and the tests."""
    parts = PurePosixPath(path).parts
    if parts[0] != PACKAGE or parts[1] == "__init__.py":
        return None
    return parts[1].removesuffix(".py")


def parts_on_disk() -> set[str]:
    """Return the parts that contain code."""
    return {part for p in (ROOT / PACKAGE).rglob("*.py") if (part := part_of(str(p.relative_to(ROOT))))}


def import_complaints(where: str, part: str | None, name: str) -> Iterator[str]:
    """Check one import. For files outside the package only libraries without allowed importers are forbidden."""
    if part is not None and part not in MAY_IMPORT:
        yield f"{where}: {part} is not a part listed in tests/architecture_rules.py"
        return
    library = max((lib for lib in ALLOWED_IMPORTERS if f"{name}.".startswith(f"{lib}.")), key=len, default=None)
    if library and (part not in ALLOWED_IMPORTERS[library] if part else not ALLOWED_IMPORTERS[library]):
        allowed = sorted(ALLOWED_IMPORTERS[library]) or "none"
        yield f"{where}: {part or 'this file'} must not import {name}; allowed importers of {library}: {allowed}"
    target = name.split(".")[1] if name.startswith(f"{PACKAGE}.") else part
    if part and target != part and target not in MAY_IMPORT[part]:
        yield f"{where}: {part} must not import {target} ({name}); it may import {sorted(MAY_IMPORT[part])}"


def imports_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import, including those inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif name := _imported_by_name(node):
            yield node.lineno, name  # type: ignore[attr-defined]


def _imported_by_name(node: ast.AST) -> str | None:
    """Return the module of import_module("…")."""
    if not (isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__") and node.args):
        return None
    first = node.args[0]
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None


def missing_module_complaints(path: str, tree: ast.AST) -> Iterator[str]:
    """Check that modules of the checkout exist, and that a module imported by its name in a string can be found."""
    for node in ast.walk(tree):
        name = node.module if isinstance(node, ast.ImportFrom) and not node.level else _imported_by_name(node)
        if not name or "." not in name:
            continue
        top, file = name.split(".")[0], ROOT / f"{name.replace('.', '/')}.py"
        is_known = top in ALLOWED_IMPORTERS or importlib.util.find_spec(top) is not None
        if (top in CODE_FOLDERS and not (file.is_file() or file.with_suffix("").is_dir())) or not is_known:
            yield f"{path}:{node.lineno}: there is no module {name}"  # type: ignore[attr-defined]


def single_file_complaints(path: str, tree: ast.AST) -> Iterator[str]:
    """Check the variables and functions that only one file may name."""
    for node in ast.walk(tree):
        name = node.value if isinstance(node, ast.Constant) else _name(node)
        if isinstance(name, str) and NAMED_ONLY_IN.get(name, path) != path:
            yield f"{path}:{getattr(node, 'lineno', 0)}: {name} belongs to {NAMED_ONLY_IN[name]}"


def _name(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def function_lengths(tree: ast.AST) -> Iterator[tuple[int, str, int]]:
    """Yield (line, name, lines of the body without the docstring) of every function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.body[0].lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            yield node.lineno, node.name, lines


def tree_complaints(sources: Mapping[str, str]) -> Iterator[str]:
    """Check the package as a whole: import circles between files and between folders, and the lengths of functions."""
    trees = {path: ast.parse(text) for path, text in sources.items()}
    files = file_graph(trees)
    for circle in circles(files):
        yield f"import circle of files: {' -> '.join(circle)}"
    for circle in circles(folder_graph(files)):
        yield f"import circle of folders: {' -> '.join(circle)}"
    lengths = sorted(count for tree in trees.values() for _, _, count in function_lengths(tree))
    p95 = lengths[int(0.95 * len(lengths))] if lengths else 0
    if p95 > P95_FUNCTION_LINES:
        yield f"5 % of the package's functions have {p95} lines or more, the limit is {P95_FUNCTION_LINES}"


def file_graph(trees: Mapping[str, ast.AST]) -> dict[str, set[str]]:
    """Return for each file the files it imports: at the top, inside functions or under TYPE_CHECKING."""
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in trees}
    graph = {}
    for path, tree in trees.items():
        graph[path] = set()
        for _, name in imports_of(tree):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            graph[path] |= {modules[name]} - {path} if name else set()
    return graph


def folder_graph(files: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return for each folder the folders it imports. A folder and those below it count as one where they meet."""
    graph: dict[str, set[str]] = {}
    for path, targets in files.items():
        own = f"{PurePosixPath(path).parent}/"
        others = {f"{PurePosixPath(target).parent}/" for target in targets}
        related = {other for other in others if other.startswith(own) or own.startswith(other)}
        graph.setdefault(own, set()).update(others - related)
    return graph


def circles(graph: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """Yield a shortest circle through each node that is on one, each circle once."""
    reported: set[frozenset[str]] = set()
    for start in sorted(graph):
        paths = {start: [start]}
        queue = [start]
        while queue:
            node = queue.pop(0)
            for target in sorted(graph.get(node, ())):
                if target == start and frozenset(paths[node]) not in reported:
                    reported.add(frozenset(paths[node]))
                    yield [*paths[node], start]
                if target not in paths:
                    paths[target] = [*paths[node], target]
                    queue.append(target)
