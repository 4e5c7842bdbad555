"""Profile of a step: kernel time by group, number of kernel launches, busy time of the device.

The group follows from the kernel's name; the first match wins, and a name without a match is "other". The longest
kernels are listed by name, so that a wrong group is visible. Expert GEMMs that a contestant launches one by one have
the names of dense GEMMs and count as such. On a CPU, torch's operators take the place of kernels.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

OTHER = "other"
# group -> pattern of its kernels' names, most specific first
GROUPS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (group, re.compile(words, re.IGNORECASE))
    for group, words in (
        ("optimizer", r"adam|multi_tensor|optimizer"),
        ("GEMM grouped", r"grouped|GroupProblemShape|group_gemm|moe_gemm|ptr_?array"),
        (
            "GDN",
            r"delta|gdn|kkt|wy_|flash_qla|fwd_o_|fwd_h|bwd_dh|bwd_dqk|chunk_|solve_tril|conv1d|conv_bwd"
            r"|conv_fwd|l2norm|gated_norm|main_kernel|conv_depthwise|depthwise",
        ),
        ("attention", r"attention|flash|fmha|sdpa|rope|rotary"),
        ("loss", r"cross_entropy|nll|log_?softmax|online_softmax|embedding"),
        (
            "permute/router",
            r"permut|top_?k|router|sort|scatter|gather|index|histogram|row_id|bincount|radix|::scan|cumsum"
            r"|expert|softmax|moe|one_hot|unique|nonzero",
        ),
        ("GEMM dense", r"gemm|nvjet|cutlass|cublas|xmma|splitk|::(mm|bmm|addmm|baddbmm)\b|gemv"),
        ("copies", r"copy|memcpy|memset|fill|\bcat|catarray|transpose|zero_|::_?to_copy"),
        ("reductions", r"reduce|::sum|::mean|::norm\b"),
        (
            "norm/elementwise",
            r"norm|elementwise|vectorized|silu|swiglu|sigmoid|softplus|triton_|bias|distribution|normal"
            r"|::(add|mul|div|sub|neg|exp|rsqrt|pow|sqrt|where|sigmoid|silu)",
        ),
    )
)


@dataclass
class Profile:
    """Averages over the profiled steps, in milliseconds. `busy_ms` counts overlapping kernels once."""

    groups_ms: dict[str, float]
    busy_ms: float
    kernels: float
    launches: float
    # name, milliseconds per step, count per step
    longest: list[tuple[str, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Span:
    """One execution of a kernel."""

    name: str
    start_us: float
    microseconds: float


def group_of(name: str) -> str:
    """Return the group of a kernel."""
    return next((group for group, words in GROUPS if words.search(name)), OTHER)


def profiled(step: Callable[[], None], steps: int, *, is_cuda: bool) -> Profile:
    """Run a step under torch.profiler. The profiler slows kernel launches, so only kernel times are used."""
    activity = ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as recorded:
        for _ in range(steps):
            step()
        if is_cuda:
            torch.cuda.synchronize()
    spans, launches = (_device_spans if is_cuda else _host_spans)(recorded)
    return summarized(spans, launches, steps)


def summarized(spans: list[Span], launches: int, steps: int) -> Profile:
    """Sum the spans by group and by name."""
    groups: dict[str, float] = dict.fromkeys([*(group for group, _ in GROUPS), OTHER], 0.0)
    names: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for span in spans:
        groups[group_of(span.name)] += span.microseconds / 1000 / steps
        names[span.name][0] += span.microseconds / 1000 / steps
        names[span.name][1] += 1 / steps
    longest = sorted(names.items(), key=lambda item: -item[1][0])[:40]
    return Profile(
        groups,
        busy_ms=union_us(spans) / 1000 / steps,
        kernels=len(spans) / steps,
        launches=launches / steps,
        longest=[(name[:160], ms, count) for name, (ms, count) in longest],
    )


def union_us(spans: Iterable[Span]) -> float:
    """Return the time during which at least one span ran, in microseconds."""
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start_us):
        stop = span.start_us + span.microseconds
        total += max(0.0, stop - max(end, span.start_us))
        end = max(end, stop)
    return total


def _device_spans(recorded: profile) -> tuple[list[Span], int]:
    spans, launches = [], 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        name = event.name()
        if event.device_type() == DeviceType.CUDA:
            if not event.is_user_annotation():
                spans.append(Span(name, event.start_ns() / 1000, event.duration_ns() / 1000))
        elif "Launch" in name and name.startswith(("cuda", "cuLaunch")):
            launches += 1
    return spans, launches


def _host_spans(recorded: profile) -> tuple[list[Span], int]:
    """Return operators with their self times, which do not overlap, and their number."""
    events = [event for event in recorded.events() or [] if event.device_type == DeviceType.CPU]
    spans = [Span(event.name, event.time_range.start, event.self_cpu_time_total) for event in events]
    return spans, len(spans)
