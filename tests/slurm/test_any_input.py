"""Any content of the files that this folder reads: a result or one UserError; and no value changes a script's shape."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_q3n.config import UserError, validate
from slurm import pipeline, status
from slurm.pipeline import Stage
from slurm.script import sbatch_script
from slurm.site import Site, load_site

FEW = settings(derandomize=True, max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8)
NAMES = st.sampled_from(
    ["stages", "a", "recipe", "tool", "from", "nodes", "time", "name", "steps", "event", "begin", "partition", "setup"]
)
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=4)
)
PIPELINES = st.fixed_dictionaries({"stages": st.dictionaries(st.text(max_size=5), TREES, max_size=3) | TREES})
CONFIG = validate({})


def answers(call: Callable[[], Any]) -> bool:
    """Return whether the call has a result; a UserError is the only other answer allowed."""
    try:
        call()
    except UserError:
        return False
    return True


def in_file(name: str, content: bytes, call: Callable[[Path], Any]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return answers(lambda: call(path))


@FEW
@given(st.binary(max_size=60))
def test_bytes_in_yaml_files(content: bytes) -> None:
    in_file("pipeline-x.yaml", content, pipeline.read_recipe)
    in_file("site.yaml", content, lambda path: load_site(str(path)))


@FEW
@given(TREES | PIPELINES)
def test_trees_in_yaml_files(tree: Any) -> None:
    text = yaml.safe_dump(tree).encode()
    in_file("pipeline-x.yaml", text, pipeline.read_recipe)
    in_file("site.yaml", text, lambda path: load_site(str(path)))


FILES = (
    "slurm/job.json",
    "slurm/attempts.jsonl",
    "metrics.jsonl",
    "summary.json",
    "logs/outcome.json",
    "pipeline.json",
)


@FEW
@given(st.sampled_from(FILES), st.binary(max_size=40) | TREES.map(lambda tree: json.dumps(tree).encode() + b"\n"))
def test_files_of_a_run_directory(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        for part in ("slurm", "logs"):
            (run_dir / part).mkdir()
        (run_dir / "slurm" / "job.json").write_text('{"steps": 3}')
        (run_dir / name).write_bytes(content)
        answers(lambda: status.rows(pipeline.read_lineage(run_dir)))


@FEW
@given(st.sampled_from(["partition", "account", "qos", "memory_per_node", "time"]), st.text(max_size=20))
def test_no_value_changes_the_shape_of_a_script(setting: str, value: str) -> None:
    def script(site: Site) -> list[str]:
        return sbatch_script(Stage("x", Path("/r"), Path("/r/code"), CONFIG), site).splitlines()

    if answers(lambda: load_from(setting, value)):
        lines, plain = script(load_from(setting, value)), script(load_from(setting, "1"))
        assert len(lines) == len(plain)
        assert sum(line.startswith("#SBATCH ") for line in lines) == sum(line.startswith("#SBATCH ") for line in plain)
        assert [i for i, line in enumerate(lines) if line not in plain] == [
            i for i, line in enumerate(plain) if line not in lines
        ]


def load_from(setting: str, value: str) -> Site:
    """Return the site of a file with this setting."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "site.yaml"
        path.write_text(json.dumps({setting: value}))
        return load_site(str(path))
