"""Names in the documentation: each path, module, setting, recipe and metric that prose mentions must exist.

Prose is every docstring and comment of a Python file, and every line of a Markdown file. String literals of the code
(error messages, CLI help) are checked for paths below the top-level folders only. The rules are functions from a file
(its path and text) to complaints. One test runs them over the repository; the others plant a wrong name of each kind
and expect the complaint. Not covered: whether a sentence about an existing name is true.
"""

import ast
import functools
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
from pydantic import BaseModel

from megatron_q3n.config import RunConfig
from megatron_q3n.metrics import names
from tests.prose import Prose, prose_of

ROOT = Path(__file__).parent.parent
PACKAGE = "megatron_q3n"
CODE_FOLDERS = (PACKAGE, "tools", "slurm", "tests")
FOLDERS = (*CODE_FOLDERS, "recipes", "docs", ".ci")
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))

# Prefixes of files in libraries that may be absent here. Files of installed ones (megatron/core/…) must exist.
UPSTREAM = ("transformer_engine/", "fla/", "flash_qla/", "tilelang/", "cudnn/")
# Files of a run directory, of a folder that a command writes, or of a user; and x.py, which stands for any file.
OUTSIDE = re.compile(
    r"(runs|corpora|corpus|checkpoints|logs|wandb|out|exported|notes|RUN_DIR|PIPELINE_DIR|FOLDER|DIR|OUT|HF_DIR)(/.*)?"
    r"|slurm/(job\.(sbatch|json)|attempts\.jsonl|excluded_nodes\.txt|preflight/attempt-.*)"
    r"|code/.*|config\.yaml|model/imported\.yaml|remove\.txt|sitecustomize\.py"
    r"|x(_\w+)?\.py"
)
# Names of the form of a recipe that are none: studies of several runs, run directories, words of English.
NO_RECIPES = {"rl-gpu", "rl-study", "rl-gpu-grpo", "compare-mtp", "mtp-only", "pipeline-parallel", "rl-related"}
# Names of parameters in Hugging Face checkpoints that begin like a section of the settings.
NO_SETTINGS = {"mtp.fc"}
RESULT_FILES = (".json", ".jsonl", ".txt", ".log", ".html", ".npz", ".safetensors")
DOCUMENT_FILES = (".py", ".md", ".yaml", ".yml", ".toml", ".sh")

PATH = re.compile(r"(?<![\w./<>{}$~-])(?:[\w.<>*…-]+/)*[\w.<>*…-]*[\w>*…]/?(?![\w/])")
DOTTED = re.compile(rf"(?<![\w./-])(?:{'|'.join(CODE_FOLDERS)})(?:\.\w+)+")
CODE_SPAN = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"```.*?```", re.DOTALL)
URL = re.compile(r"\w+://\S+|\]\(#[^)]*\)")
SECTIONS = {
    name: field.annotation
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}
SETTING = re.compile(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.(\w+|\*)((?:\.\w+)*)(=)?")
METRIC_GROUPS = sorted({metric.name.split("/")[0] for metric in names.METRICS if "/" in metric.name})
METRIC = re.compile(rf"(?<![\w./-])(?:{'|'.join(METRIC_GROUPS)})/[a-z][\w<>]*(?![\w/.(*-])")
EVALUATED = re.compile(r"(recall/(accuracy|loss)|text/(loss|bits_per_byte))(_from)?(_[\w<>]+)?")


def repository_files() -> list[str]:
    """List the files that git tracks or would add, as paths from the root."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for path in listed.split("\0") if (ROOT / path).is_file()]


def complaints(path: str, text: str) -> Iterator[str]:
    """Check all names that a file's prose mentions."""
    for prose in prose_of(path, text):
        without_urls = URL.sub(lambda match: " " * len(match[0]), prose.text)
        for offset, complaint in _complaints(path, prose, without_urls):
            yield f"{path}:{prose.line + prose.text.count(chr(10), 0, offset)}: {complaint}"


def _complaints(path: str, prose: Prose, text: str) -> Iterator[tuple[int, str]]:
    folder = str(PurePosixPath(path).parent)
    for match in PATH.finditer(text):
        name = match[0].rstrip(".,")
        if is_path(name, prose.is_literal) and not path_exists(name, folder):
            yield match.start(), f"there is no file or folder {name}"
    if prose.is_literal:
        return
    for match in DOTTED.finditer(text):
        if not module_exists(match[0]):
            yield match.start(), f"there is no module or name {match[0]}"
    spans = [(m.start(1), m[1]) for m in CODE_SPAN.finditer(text)] + [(m.start(), m[0]) for m in FENCE.finditer(text)]
    for match in SETTING.finditer(text):
        is_code = any(start <= match.start() < start + len(span) for start, span in spans)
        if (match[4] or is_code) and not setting_exists(match):
            yield match.start(), f"there is no setting {match[0].rstrip('=')}"
    for match in _recipe_pattern().finditer(text):
        if match[0] not in NO_RECIPES and not recipe_exists(match[0]):
            yield match.start(), f"there is no recipe {match[0]}"
    for match in METRIC.finditer(text):
        if not metric_exists(match[0]) and not path_exists(match[0], folder):
            yield match.start(), f"there is no metric {match[0]}"
    for start, span in spans:
        is_pair = re.fullmatch(r"[a-z_]+/[a-z][a-z_]*(_<\w+>|_\d+)?", span) and not OUTSIDE.fullmatch(span)
        if is_pair and not (metric_exists(span) or path_exists(span, folder)):
            yield start, f"there is no metric or path {span}"


def is_path(name: str, is_literal: bool) -> bool:
    """Return whether a word is meant as a path of the repository, or as a file that a command reads or writes."""
    is_below_folder = name.startswith(tuple(f"{top}/" for top in FOLDERS)) and not name.endswith("…")
    is_document = name.endswith(DOCUMENT_FILES) and not name.startswith(".")
    if is_literal:
        return is_below_folder and is_document
    is_file = is_document or name.endswith(RESULT_FILES)
    return (is_file or is_below_folder) and not (OUTSIDE.fullmatch(name) or name.startswith(UPSTREAM))


def path_exists(name: str, folder: str) -> bool:
    """Return whether a word names an existing file or folder, a name in a module (tools/report.main), or a result file.

    `folder`: that of the file which mentions it; a path may begin there, at the root, in the package or in a library.
    """
    pattern, is_result = _glob(name), name.endswith(RESULT_FILES)
    if not pattern.strip("*./") or any(next(base.glob(pattern), None) for base in _bases(folder)):
        return True
    if PurePosixPath(name).name in _written_files() or (is_result and "*" in pattern):
        return True
    module, _, attribute = name.rpartition(".")
    return bool(attribute) and any(_defines(base / f"{module}.py", attribute) for base in _bases(folder))


def _bases(folder: str) -> list[Path]:
    return [ROOT / folder, ROOT, ROOT / PACKAGE, SITE_PACKAGES]


def _glob(name: str) -> str:
    """Turn placeholders (<name>, NAME, …) into wildcards."""
    parts = re.sub(r"<[^>/]*>|…|\{[^}]*\}", "*", name).rstrip("/").split("/")
    capitals = re.compile(r"[A-Z]{2,}[A-Z_]*(?=\.|$|-)|(?<=_)[A-Z](?=\.)")
    return "/".join(part if (ROOT / part).exists() else capitals.sub("*", part) for part in parts)


@functools.cache
def _written_files() -> frozenset[str]:
    """Return the file names in string literals of the code: what commands read or write."""
    found = set()
    for path in repository_files():
        endings = RESULT_FILES if path.startswith("tests/") else (*RESULT_FILES, ".md", ".yaml")
        # this file plants wrong names
        if path.endswith(".py") and ROOT / path != Path(__file__):
            for node in ast.walk(ast.parse((ROOT / path).read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 200:
                    found |= {PurePosixPath(word).name for word in node.value.split() if word.endswith(endings)}
    return frozenset(found)


@functools.cache
def _defines(path: Path, name: str) -> bool:
    """Return whether a file defines, assigns or imports a name."""
    if not path.is_file():
        return False
    defined: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {alias.asname or alias.name for alias in node.names}
    return name in defined


def module_exists(dotted: str) -> bool:
    """Return whether a dotted name is a module of the checkout, or a name in one."""
    parts = dotted.split(".")
    if parts[1:] in (["py"], ["md"], ["egg-info"]):
        return True
    for count in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:count])
        file = base.with_name(f"{base.name}.py") if count > 1 else base
        if file.is_file() or base.is_dir():
            rest = parts[count:]
            source = file if file.is_file() else base / "__init__.py"
            return not rest or _defines(source, rest[0])
    return False


def setting_exists(match: re.Match[str]) -> bool:
    """Return whether section.field is a setting, or a module, of the package."""
    section, field = SECTIONS[match[1]], match[2]
    if (
        match[0] in NO_SETTINGS
        or field == "*"
        or f".{field}" in (*DOCUMENT_FILES, *RESULT_FILES)
        or field in section.model_fields
    ):
        return True
    return module_exists(f"{PACKAGE}.{match[0].rstrip('=')}")


@functools.cache
def _recipes() -> frozenset[str]:
    return frozenset(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@functools.cache
def _recipe_pattern() -> re.Pattern[str]:
    """Return the pattern of recipe names: a stage, or another first word of a recipe, and what follows it."""
    stages = {path.stem for path in (ROOT / "recipes" / "stage").glob("*.yaml")} | {"ablation", "pipeline"}
    models = "|".join(sorted(path.stem for path in (ROOT / "recipes" / "model").glob("*.yaml")))
    first = "|".join(sorted(stages))
    return re.compile(rf"(?<![\w./<-])(?:{first})-(?:{models}|[a-z][a-z0-9_]*)(?:-[a-z0-9_]+)*(?![\w.*<-])")


def recipe_exists(name: str) -> bool:
    """Return whether a recipe of this name exists. A name that no sentence uses for a recipe counts as existing."""
    second = name.split("-")[1]
    models = {path.stem for path in (ROOT / "recipes" / "model").glob("*.yaml")}
    is_recipe = second in models or name.startswith(("ablation-", "pipeline-"))
    return name in _recipes() or not is_recipe


def metric_exists(name: str) -> bool:
    """Return whether a name is in the table of metrics, or one that the evaluate stage reports."""
    filled = re.sub(r"<\w+>", "1", name)
    in_group = any(metric.name.startswith(f"{name}_") for metric in names.METRICS)
    return names.find(filled) is not None or in_group or bool(EVALUATED.fullmatch(name))


def checked_files() -> list[str]:
    """List the Python and Markdown files of the repository."""
    return [path for path in repository_files() if path.endswith((".py", ".md"))]


def test_every_name_in_the_documentation_exists() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of the project's own files")
    found = [complaint for path in checked_files() for complaint in complaints(path, (ROOT / path).read_text())]
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("see model/no_such_file.py", "no file or folder model/no_such_file.py"),
        ("`kernels/fused/norm.py`", "no file or folder kernels/fused/norm.py"),
        ("no_such_file.py", "no file or folder no_such_file.py"),
        ("tests/layouts", "no file or folder tests/layouts"),
        ("docs/no_such_page.md.", "no file or folder docs/no_such_page.md"),
        ("recipes/no_such_*.yaml", "no file or folder recipes/no_such_*.yaml"),
        ("`no_such_result.json`", "no file or folder no_such_result.json"),
        ("megatron/core/no_such_file.py", "no file or folder megatron/core/no_such_file.py"),
        ("stages/pretrain.no_such_function", ""),
        ("tools/report.no_such_function", "no file or folder tools/report.no_such_function"),
        ("megatron_q3n.no_such_module.x", "no module or name megatron_q3n.no_such_module.x"),
        ("tools.report.no_such_function", "no module or name tools.report.no_such_function"),
        ("training.stesp=3", "no setting training.stesp"),
        ("`schedule.rate`", "no setting schedule.rate"),
        ("`health.no_such_action=stop`", "no setting health.no_such_action"),
        ("pretrain-tiny and ablation-nothing", "no recipe ablation-nothing"),
        ("`rl-80b_a3b-nothing`", "no recipe rl-80b_a3b-nothing"),
        ("the metric loss/no_such_part", "no metric loss/no_such_part"),
        ("`reward/no_such_number_<k>`", "no metric reward/no_such_number_<k>"),
        ("`no_such/name`", "no metric or path no_such/name"),
    ],
)
@pytest.mark.parametrize("path", ["README.md", "megatron_q3n/model/build.py"])
def test_a_planted_name_is_found(path: str, text: str, complaint: str) -> None:
    for source in [text] if path.endswith(".md") else [f"# {text}\n", f'x = 1\ndef f():\n    """{text}"""\n']:
        found = list(complaints(path, source))
        assert bool(found) == bool(complaint), found
        assert complaint in "".join(found)


def test_a_planted_path_in_a_message_is_found_with_its_line() -> None:
    source = 'def f():\n    raise ValueError("run tools/no_such_tool.py, or no_such_tool.py")\n'
    assert list(complaints("tools/report.py", source)) == [
        "tools/report.py:2: there is no file or folder tools/no_such_tool.py"
    ]
    assert list(complaints("README.md", "a\n\nb `training.stesp`\n")) == [
        "README.md:3: there is no setting training.stesp"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "model/build.py, megatron_q3n/model/build.py, train.py and tools/quickstart",
        "stages/pretrain.run, megatron_q3n.config.RunConfig, tools.report.main",
        "recipes/<stage>-<model>[-<layout>].yaml, recipes/ablation-*.yaml, slurm/sites/NAME.yaml",
        "runs/latest/checkpoints/step_0000200, slurm/job.sbatch, `logs/stacks/`, runs/<recipe>-<utc>-<id>/",
        "megatron/core/optimizer/distrib_optimizer.py, transformer_engine/pytorch/tensor/x.py",
        "`training.steps=3`, `alerts.*`, model.decoder.layers, `model.megatron.<field>=value`",
        "pretrain-tiny, rl-1/, sft-1, pipeline-parallel, <stage>-<model>, and/or, key/value, 1/2, TFLOP/s",
        "`loss/train`, loss/mtp_<k>, `recall/accuracy_<L>`, text/loss_from_64, https://example.com/no/such/page.md",
        "metrics.jsonl, report.html and `environment.json` of a run",
    ],
)
def test_existing_names_and_other_words_are_accepted(text: str) -> None:
    source = f'"""{text}"""\n'
    assert list(complaints("megatron_q3n/train.py", source)) == []
    assert list(complaints("README.md", text)) == []
