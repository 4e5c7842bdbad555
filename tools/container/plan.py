"""Plan of the packages to install into an image whose torch, TransformerEngine and apex were built for each other.

    python3 tools/container/plan.py --write DIR requirements.txt requirements-gpu.txt
    python3 tools/container/plan.py --check DIR

--write creates in DIR: install.txt (requirements that the image lacks or has in another version), keep.txt
(constraints: packages compiled together keep their versions, whatever our pins are) and remove.txt (packages to
uninstall). --check compares the installed packages with DIR/keep.txt, and imports nothing.

Only the standard library. Exit status: 0, 1 if --check finds a kept package changed, 2 bad arguments.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# compiled against each other in NVIDIA's images: a newer version of one breaks the others
BUILT_TOGETHER = re.compile(
    r"(torch|torchvision|torchaudio|torch-tensorrt|(pytorch-)?triton|transformer-engine(-\w+)?|apex|flash-attn(-\w+)?"
    r"|numpy|nvidia-(?!resiliency-ext).*|cuda-\w+)"
)
# megatron-core 0.19 cannot be imported with older versions than this; it does not need the package
RESILIENCY, RESILIENCY_AT_LEAST = "nvidia-resiliency-ext", (0, 6)


@dataclass(frozen=True)
class Plan:
    """Sorted lines for pip: requirements, constraints, names to uninstall."""

    install: list[str]
    keep: list[str]
    remove: list[str]


def canonical(name: str) -> str:
    """Return a package's name in the normalized form of the package index."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements_of(text: str) -> dict[str, str]:
    """Return {name: requirement line} of a requirements file, without comments and options."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    matches = [re.match(r"([A-Za-z0-9][\w.-]*)", line) for line in lines]
    return {canonical(match[1]): line for match, line in zip(matches, lines) if match}


def plan(requirements: Mapping[str, str], installed: Mapping[str, str]) -> Plan:
    """Return the plan for {name: requirement line} and {name: version} of the image's packages."""
    kept = {n: v for n, v in installed.items() if BUILT_TOGETHER.fullmatch(n)}
    missing = [
        line
        for name, line in requirements.items()
        if name not in kept and not line.endswith(f"=={installed.get(name)}")
    ]
    old = installed.get(RESILIENCY)
    remove = [RESILIENCY] if old and _numbers(old) < RESILIENCY_AT_LEAST else []
    keep = [f"{name}=={version}" for name, version in kept.items()]
    return Plan(sorted(missing), sorted(keep), remove)


def installed_packages() -> dict[str, str]:
    """Return {name: version} of every package of this Python."""
    return {canonical(d.metadata["Name"]): d.version for d in metadata.distributions()}


def changed(keep: Iterable[str], installed: Mapping[str, str]) -> list[str]:
    """Return a sentence for each kept package whose version has changed."""
    pairs = [line.split("==", 1) for line in keep]
    return [
        f"{name}: was {version}, is {installed.get(name, 'gone')}"
        for name, version in pairs
        if installed.get(name) != version
    ]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def main() -> int:
    """Write a plan, or check that the kept packages are unchanged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--write", type=Path, metavar="DIR")
    task.add_argument("--check", type=Path, metavar="DIR")
    parser.add_argument("requirements", type=Path, nargs="*")
    options = parser.parse_args()
    if options.check:
        problems = changed((options.check / "keep.txt").read_text().split(), installed_packages())
        print("\n".join(problems) or "no package of the image was replaced")
        return 1 if problems else 0
    requirements: dict[str, str] = {}
    for path in options.requirements:
        requirements |= requirements_of(path.read_text())
    result = plan(requirements, installed_packages())
    options.write.mkdir(parents=True, exist_ok=True)
    for name in ("install", "keep", "remove"):
        lines = getattr(result, name)
        (options.write / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
        print(f"{name}: {', '.join(lines) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
