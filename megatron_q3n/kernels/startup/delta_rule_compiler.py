"""Compile the delta rule's kernels side by side into TileLang's cache: the helper that `compile_ahead.py` starts.

Which kernels, with which of two dozen parameters, is FlashQLA's to say: it runs its own dispatch here, forward and
backward, over tensors without data and with kernels that only take note of how they were asked for. So the cache's keys
are those that training asks for, whatever the version; on an H200 they were found to be the same.

Lowering leaves Python's lock alone and nvcc is a process, so threads serve. The longest kernel begins first: of 74 s
of processor time at 8 heads, 30 are the backward kernel's (23 of them TVM's lowering, 7 nvcc's).

    one line of JSON on stdin: {"problems": [...], "stamp": file}, and then nothing until the parent ends
    one line for people on stdout; exit code 0 if all was compiled
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
    """A kernel as FlashQLA asks TileLang for it."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """What FlashQLA calls it."""
        return self.kernel.func.orig_func.__name__.removeprefix("tilelang_")


def main() -> int:
    """Read the request, compile, stamp, and say what was done.

    Returns: 0, or 1 if a kernel could not be compiled.
    """
    started = time.monotonic()
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the libraries' talk goes with the errors
    calls = noted_calls([problem_of(fields) for fields in request["problems"]])
    imported = time.monotonic() - started
    seconds, failures = compile_all(calls)
    for failure in failures:
        print(failure, file=sys.stderr)
    if failures:
        return 1
    _leave_stamp(Path(request["stamp"]))
    print(told(seconds, imported, time.monotonic() - started), file=answer, flush=True)
    return 0


def problem_of(fields: dict[str, Any]) -> DeltaRuleProblem:
    """Read a problem as JSON carries it."""
    bounds = fields["bounds"]
    return DeltaRuleProblem(**{**fields, "bounds": None if bounds is None else tuple(bounds)})


def noted_calls(problems: Sequence[DeltaRuleProblem]) -> list[KernelCall]:
    """Run FlashQLA's dispatch, forward and backward, and return the kernels it asks for, each once.

    Nothing is computed, and no memory of the GPU is taken but what CUDA itself needs to name the device.
    """
    # late: neither is there on a machine without a GPU, whose tests read this file
    import flash_qla
    from tilelang.jit import JITImpl

    calls: dict[Any, KernelCall] = {}

    def note(kernel: Any, *args: Any, **options: Any) -> Callable[..., None]:
        key = id(kernel), args, tuple(sorted(options.items()))
        calls.setdefault(key, KernelCall(kernel, args, options))
        return lambda *_: None

    compiles, JITImpl.__call__ = JITImpl.__call__, note
    try:
        for problem in problems:
            _pretend(problem, flash_qla.chunk_gated_delta_rule)
    finally:
        JITImpl.__call__ = compiles
    return list(calls.values())


def _pretend(problem: DeltaRuleProblem, rule: Callable[..., Any]) -> None:
    """Call the rule and its gradients with tensors that have shapes only."""
    import torch  # late, as above: the helper is started before anything imports it

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
    elif problem.rows == 1:  # what FlashQLA makes of a single row, but on the GPU
        bounds = torch.tensor([0, problem.tokens], dtype=torch.int32)
    output, _ = rule(*inputs, cu_seqlens=bounds)
    torch.autograd.grad(output, inputs, torch.empty_like(output))


def compile_all(calls: Sequence[KernelCall]) -> tuple[list[tuple[str, float]], list[str]]:
    """Compile side by side.

    Returns: name and seconds of each kernel, the longest first; and what went wrong, a line for each.
    """
    import tilelang  # late, as above

    seconds: list[tuple[str, float]] = []

    def compiled(call: KernelCall, function: Any) -> None:
        begun, kernel = time.monotonic(), call.kernel
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
        seconds.append((call.name, time.monotonic() - begun))

    in_order = sorted(calls, key=lambda call: len(call.kernel.func_source), reverse=True)
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        jobs = {}
        for call in in_order:  # this part holds Python's lock, so one after the other
            function = call.kernel.get_tir(*call.args, **call.options)
            jobs[pool.submit(compiled, call, function)] = call.name
    failures = [f"{name}: {job.exception()!r}" for job, name in jobs.items() if job.exception()]
    return sorted(seconds, key=lambda one: -one[1]), failures


def told(seconds: Sequence[tuple[str, float]], imported: float, whole: float) -> str:
    """Say it in a line."""
    each = ", ".join(f"{name} {took:.1f}" for name, took in seconds)
    return (
        f"{len(seconds)} kernels in {whole:.1f} s beside the imports "
        f"({imported:.1f} s of its own imports, then side by side: {each})"
    )


def _leave_stamp(stamp: Path) -> None:
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.touch()


def _end_with_parent() -> None:
    """Wait for the end of the pipe that the parent holds, then end, with every compiler that still runs."""
    while os.read(0, 4096):
        pass
    if os.getpgrp() == os.getpid():  # else somebody tries this by hand
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
