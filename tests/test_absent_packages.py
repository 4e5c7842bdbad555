"""Runs without the optional packages wandb, datasets and pyarrow: one message each, and an error where one is needed.

In the tested programs and every process they start, the import of these packages fails as if they were not installed.
Not covered: a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ABSENT = ("wandb", "datasets", "pyarrow")
SMALL = [
    "--config-name",
    "pretrain-tiny",
    "data=blend",
    "training.steps=3",
    "training.sequence_length=32",
    "validation.interval_steps=2",
    "validation.batches=1",
    "validation.bigram_baseline=false",
    "schedule.warmup_steps=1",
    "samples.count=1",
    "samples.tokens=8",
]


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return environment variables under which Python finds none of ABSENT."""
    folder = tmp_path_factory.mktemp("without")
    # None in sys.modules: `import` raises ModuleNotFoundError, find_spec finds nothing
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n")
    path = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
    environment = {**os.environ, "PYTHONPATH": path}
    # this variable would request wandb
    environment.pop("WANDB_MODE")
    return environment


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, timeout=240
    )


@pytest.mark.parametrize("package", ABSENT)
def test_absence_is_real(package: str, without: dict[str, str]) -> None:
    assert "ModuleNotFoundError" in run(without, "-c", f"import {package}").stderr


def test_a_run_from_text_to_report(without: dict[str, str], tmp_path: Path) -> None:
    texts = [f"def f{i}(x):\n    return x + {i}\n" * 5 for i in range(60)]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus, run_dir = tmp_path / "corpus", tmp_path / "run"
    options = ["--output", str(corpus), "--train-tokenizer", "300", "--workers", "1"]
    prepared = run(without, str(ROOT / "tools/prepare_data.py"), str(source), *options)
    assert prepared.returncode == 0, prepared.stderr
    data = [f"data.{part}=[{{path: {corpus}}}]" for part in ("train", "validation")]
    data += [f"run_dir={run_dir}", f"data.cache_dir={tmp_path / 'cache'}"]
    done = run(without, "-m", "megatron_q3n.train", *SMALL, *data)
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    for package in ABSENT:
        assert output.count(f"{package}: not installed") == (package == "wandb"), output
    assert "Traceback" not in output
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert (run_dir / "report.html").stat().st_size > 10_000
    assert not (run_dir / "wandb").exists()


def test_parquet_without_pyarrow_is_refused_by_name(without: dict[str, str], tmp_path: Path) -> None:
    table = tmp_path / "part.parquet"
    table.write_bytes(b"PAR1")
    options = ["--output", str(tmp_path / "out"), "--train-tokenizer", "300"]
    done = run(without, str(ROOT / "tools/prepare_data.py"), str(table), *options)
    assert done.returncode == 2
    assert "needs pyarrow, which is not installed" in done.stderr
    assert "Traceback" not in done.stderr
