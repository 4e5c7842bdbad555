"""Ahead-of-time compilation: problems of a configuration, and helpers that fail, hang, or lose their parent.

The helpers are small programs, or the real one on a machine without its packages. That it compiles the kernels which
the check requests is tested on a GPU only.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_q3n.config import RunConfig, validate
from megatron_q3n.kernels.startup import compile_ahead
from megatron_q3n.kernels.startup.delta_rule_problems import DeltaRuleProblem, checked_problems, problems_to_compile

ROOT = Path(__file__).parents[3]
HEADS = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
PRINTS_DONE = "import sys; sys.stdin.readline(); print('done')"
# a helper with a child compiler, whose process id it writes
HANGS = """
import pathlib, subprocess, sys, time
from megatron_q3n.kernels.startup import delta_rule_compiler
import threading
sys.stdin.readline()
compiler = subprocess.Popen(["sleep", "60"])
threading.Thread(target=delta_rule_compiler._end_with_parent, daemon=True).start()
pathlib.Path(sys.argv[1]).write_text(str(compiler.pid))
time.sleep(60)
"""
STARTS_ONE = """
import sys, time
from megatron_q3n.kernels.startup import compile_ahead
compile_ahead.start_helper({"problems": 7}, [sys.executable, *sys.argv[1:]])
print("started", flush=True)
time.sleep(60)
"""


def program(text: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", text, *map(str, arguments)]


def config_of(**settings: Any) -> RunConfig:
    training = {"sequence_length": 2048, "micro_batch_size": 8, "global_batch_size": 8}
    arguments = {"model": HEADS, "training": training}
    return validate({**arguments, **settings})


@pytest.fixture(autouse=True)
def separate_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use locks and stamps apart from those of runs on this machine, and stop helpers that a test leaves."""
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(compile_ahead, "_report", None)
    yield
    compile_ahead.stop()


def test_rows_are_compiled_as_training_has_them_and_checked_with_fewer_tokens() -> None:
    small, training = DeltaRuleProblem(4, 192, 4, 8, 128, 128), (8, 2048, 4, 8, 128, 128)
    checked = DeltaRuleProblem(8, 1024, *training[2:])
    assert checked_problems(config_of()) == [small, checked]
    assert problems_to_compile(config_of()) == [small, checked, DeltaRuleProblem(*training)]


def test_a_row_of_documents_is_checked_as_one_document_and_as_several() -> None:
    training = {"sequence_length": 4096, "micro_batch_size": 1}
    packed = config_of(training=training, data={"mask_document_boundaries": True})
    bounds = [problem.bounds for problem in checked_problems(packed)]
    assert bounds == [(0, 1, 70, 192), (0, 4096), tuple(range(0, 4097, 512))]
    assert problems_to_compile(packed) == checked_problems(packed)
    plain = config_of(training=training)
    assert [problem.bounds for problem in checked_problems(plain)] == [None, None]


def test_heads_are_those_of_one_rank() -> None:
    shared = config_of(parallel={"world_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True})
    assert {(one.key_heads, one.value_heads) for one in problems_to_compile(shared)} == {(2, 4)}


def test_without_a_gpu_nothing_is_started() -> None:
    if any(Path(trace).exists() for trace in compile_ahead._GPU_FILES):
        pytest.skip("this machine has a GPU")
    compile_ahead.start(config_of(precision={"compute": "bf16"}))
    assert compile_ahead.finish() is None


def test_the_helpers_output_is_reported() -> None:
    compile_ahead.start_helper({"problems": 1}, program(PRINTS_DONE))
    report = compile_ahead.finish()
    assert report is not None
    assert report.startswith("done; waited ")
    assert compile_ahead.finish() == report


def test_the_real_helper_where_flash_qla_is_missing_fails_and_the_run_goes_on() -> None:
    if compile_ahead._version("flash-qla"):
        pytest.skip("FlashQLA is installed")
    problem = {**vars(DeltaRuleProblem(4, 192, 4, 8, 128, 128))}
    compile_ahead.start_helper({"problems": [problem]})
    report = compile_ahead.finish() or ""
    assert "FAILED (1: ModuleNotFoundError: No module named 'flash_qla')" in report
    assert "the kernels are compiled during the check" in report


def test_a_helper_that_cannot_be_started_is_no_failure_either(tmp_path: Path) -> None:
    compile_ahead.start_helper({}, [str(tmp_path / "no-such-program")])
    assert (compile_ahead.finish() or "").startswith("NOT STARTED ([Errno 2] No such file")


def test_a_helper_that_exits_before_reading_is_reported() -> None:
    compile_ahead.start_helper({"problems": "x" * 2**20}, program("raise SystemExit('out of memory')"))
    assert "FAILED (1: out of memory)" in (compile_ahead.finish() or "")


def test_timeout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compile_ahead, "_TIMEOUT_SECONDS", 0.2)
    compile_ahead.start_helper({}, program("import time; time.sleep(60)"))
    assert "not done after 0 s and killed" in (compile_ahead.finish() or "")


def test_a_stamp_prevents_a_second_helper() -> None:
    leaves_stamp = (
        "import json, pathlib, sys; stamp = pathlib.Path(json.loads(sys.stdin.readline())['stamp']);"
        "stamp.parent.mkdir(parents=True); stamp.touch(); print('compiled')"
    )
    compile_ahead.start_helper({"problems": 1}, program(leaves_stamp))
    assert (compile_ahead.finish() or "").startswith("compiled")
    compile_ahead.start_helper({"problems": 1}, program("raise SystemExit('started again')"))
    assert compile_ahead.finish() is None
    compile_ahead.start_helper({"problems": 2}, program(PRINTS_DONE))
    assert (compile_ahead.finish() or "").startswith("done")


def test_the_helper_ends_with_a_killed_parent_and_takes_its_compilers_along(tmp_path: Path) -> None:
    """Meanwhile the other ranks of the machine wait for its lock, which only the helper holds."""
    number = tmp_path / "compiler"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen(program(STARTS_ONE, "-c", HANGS, number), env=environment, stdout=subprocess.PIPE)
    _until(lambda: number.exists() and bool(number.read_text()))
    compiler = int(number.read_text())
    os.environ["LOCAL_RANK"] = "1"
    try:
        compile_ahead.start_helper({"problems": 7}, program("raise SystemExit('rank 1 must not')"))
        helper = compile_ahead._helper
        assert helper is not None
        assert not compile_ahead._try_lock(helper.lock, compile_ahead.fcntl.LOCK_SH)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert (compile_ahead.finish() or "").startswith("by another process of this machine")
    finally:
        del os.environ["LOCAL_RANK"]
    _until(lambda: not _runs(compiler))


def test_stop_ends_the_helper_and_its_compilers(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    number = tmp_path / "compiler"
    compile_ahead.start_helper({}, program(HANGS, number))
    _until(lambda: number.exists() and bool(number.read_text()))
    compile_ahead.stop()
    _until(lambda: not _runs(int(number.read_text())))


def _until(holds: Any) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(number: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


COMPILES_AHEAD = """
import pathlib, sys
import megatron_q3n.recipe as recipe
from megatron_q3n.kernels.startup import compile_ahead
from megatron_q3n.kernels.startup.delta_rule_problems import checked_problems
recipe.register_defaults()
config = recipe.configure(sys.argv[2:])
compile_ahead.start(config)
print(compile_ahead.finish())
cache = pathlib.Path(sys.argv[1])
found = lambda: sorted(path.parent.name for path in cache.rglob("executable.so"))
before = found()
import torch
from megatron_q3n.kernels.startup.delta_rule_check import check_delta_rule
verdict = check_delta_rule(torch.device("cuda", 0), torch.bfloat16, checked_problems(config))
print(verdict)
assert verdict.startswith("fla: "), verdict
assert before and found() == before, f"compiled by the check: {set(found()) - set(before)}"
"""


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("data.mask_document_boundaries=true", "training.micro_batch_size=1")])
def test_the_check_finds_every_kernel_compiled(tmp_path: Path, settings: tuple[str, ...]) -> None:
    """From an empty cache; a minute each."""
    pytest.importorskip("flash_qla")
    arguments = [str(tmp_path / "cache"), "--config-name", "pretrain-small", *settings]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    completed = subprocess.run(
        program(COMPILES_AHEAD, *arguments), env=environment, cwd=ROOT, capture_output=True, text=True
    )
    print(completed.stdout)
    assert completed.returncode == 0, completed.stderr[-3000:]


def test_fla_is_imported_without_its_models() -> None:
    pytest.importorskip("triton")
    if compile_ahead._version("fla-core") is None:
        pytest.skip("flash-linear-attention is not installed")
    look = (
        "import sys\nfrom megatron_q3n.kernels.gated_delta.fla_core import without_models\n"
        "with without_models():\n    import fla.ops.gated_delta_rule\n"
        "assert 'transformers' not in sys.modules\nimport fla.layers\n"
    )
    subprocess.run(program(look), check=True, cwd=ROOT)
