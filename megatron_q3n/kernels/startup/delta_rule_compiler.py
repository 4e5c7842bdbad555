"""Helper process of `compile_ahead.py`: compiles the delta rule's kernels in parallel into TileLang's cache.

The set of kernels, with their two dozen parameters, is determined by FlashQLA itself: its dispatch runs here, forward
and backward, on meta tensors and with kernels that only record their arguments. So the cache keys are those that
training requests, whatever the version; on an H200 they were found to be identical.

Lowering releases Python's lock and nvcc is a process, so threads suffice. The largest kernel starts first: of 74 s of
processor time at 8 heads, 30 are the backward kernel's (23 of them TVM's lowering, 7 nvcc's).

Protocol: one line of JSON on stdin, {"problems": [...], "stamp": file}; then stdin stays open until the parent ends.
One summary line on stdout; exit code 0 if all kernels were compiled.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_q3n.kernels.startup.delta_rule_problems import DeltaRuleProblem


@dataclass(frozen=True)
class KernelCall:
    """A kernel with the arguments that FlashQLA passes to TileLang."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """FlashQLA's name of the kernel."""
        return self.kernel.func.orig_func.__name__.removeprefix("tilelang_")


def main() -> int:
    """Read the request, compile, write the stamp, and print a summary.

    Returns: 0, or 1 if a kernel could not be compiled.
    """
    started = time.monotonic()
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    stdout = os.fdopen(os.dup(1), "w")
    # the libraries' output goes to stderr
    os.dup2(2, 1)
    calls = record_calls([problem_of(fields) for fields in request["problems"]])
    imported = time.monotonic() - started
    seconds, failures = compile_all(calls)
    for failure in failures:
        print(failure, file=sys.stderr)
    if failures:
        return 1
    _write_stamp(Path(request["stamp"]))
    print(summarize(seconds, imported, time.monotonic() - started), file=stdout, flush=True)
    return 0


def problem_of(fields: dict[str, Any]) -> DeltaRuleProblem:
    """Return a problem from its JSON fields."""
    bounds = fields["bounds"]
    return DeltaRuleProblem(**{**fields, "bounds": None if bounds is None else tuple(bounds)})


def record_calls(problems: Sequence[DeltaRuleProblem]) -> list[KernelCall]:
    """Run FlashQLA's dispatch, forward and backward, and return the kernels it requests, without duplicates.

    Nothing is computed, and no GPU memory is allocated except by CUDA's initialization.
    """
    # late: neither is installed on a machine without a GPU, whose tests import this module
    import flash_qla
    from tilelang.jit import JITImpl

    calls: dict[Any, KernelCall] = {}

    def record(kernel: Any, *args: Any, **options: Any) -> Callable[..., None]:
        key = id(kernel), args, tuple(sorted(options.items()))
        calls.setdefault(key, KernelCall(kernel, args, options))
        return lambda *_: None

    original_call, JITImpl.__call__ = JITImpl.__call__, record
    try:
        for problem in problems:
            _run_on_meta(problem, flash_qla.chunk_gated_delta_rule)
    finally:
        JITImpl.__call__ = original_call
    return list(calls.values())


def _run_on_meta(problem: DeltaRuleProblem, rule: Callable[..., Any]) -> None:
    """Call the rule and its gradients with meta tensors."""
    import torch  # late, as above: the helper starts before torch is imported

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        leading = problem.rows, problem.tokens
        return torch.empty(*leading, *shape, dtype=dtype, device="meta", requires_grad=True)

    key = problem.key_heads, problem.key_dim
    decay = tensor(problem.value_heads, dtype=torch.float32)
    value = tensor(problem.value_heads, problem.value_dim)
    inputs = [tensor(*key), tensor(*key), value, decay, tensor(problem.value_heads)]
    bounds = None
    if problem.bounds is not None:
        bounds = torch.tensor(problem.bounds)
    elif problem.rows == 1:
        # as FlashQLA does for a single row, but not on the GPU
        bounds = torch.tensor([0, problem.tokens], dtype=torch.int32)
    output, _ = rule(*inputs, cu_seqlens=bounds)
    torch.autograd.grad(output, inputs, torch.empty_like(output))


def compile_all(calls: Sequence[KernelCall]) -> tuple[list[tuple[str, float]], list[str]]:
    """Compile the kernels in parallel.

    Returns: name and seconds of each kernel, the slowest first; and one line per failure.
    """
    import tilelang  # late, as above

    seconds: list[tuple[str, float]] = []

    def compile_one(call: KernelCall, function: Any) -> None:
        started, kernel = time.monotonic(), call.kernel
        tilelang.compile(
            function,
            kernel.out_idx,
            kernel.execution_backend,
            kernel.target,
            kernel.target_host,
            kernel.verbose,
            kernel.pass_configs,
            kernel.compile_flags,
        )
        seconds.append((call.name, time.monotonic() - started))

    largest_first = sorted(calls, key=lambda call: len(call.kernel.func_source), reverse=True)
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        jobs = {}
        # this part holds Python's lock, so it is sequential
        for call in largest_first:
            function = call.kernel.get_tir(*call.args, **call.options)
            jobs[pool.submit(compile_one, call, function)] = call.name
    failures = [f"{name}: {job.exception()!r}" for job, name in jobs.items() if job.exception()]
    return sorted(seconds, key=lambda one: -one[1]), failures


def summarize(seconds: Sequence[tuple[str, float]], imported: float, total: float) -> str:
    """Return a one-line summary."""
    kernels = ", ".join(f"{name} {duration:.1f}" for name, duration in seconds)
    return (
        f"{len(seconds)} kernels in {total:.1f} s in parallel to the imports "
        f"({imported:.1f} s for the helper's own imports, then in parallel: {kernels})"
    )


def _write_stamp(stamp: Path) -> None:
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.touch()


def _end_with_parent() -> None:
    """Block until the parent closes the pipe, then kill this process group, with every compiler that still runs."""
    while os.read(0, 4096):
        pass
    # a process that was started manually may not be the group leader
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
