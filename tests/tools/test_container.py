"""Container image: the packages that the Dockerfile installs into the base image, and those that it must not replace.

The image is not built, since that needs docker and a network. pip's handling of the plan was tested by hand with
stand-in packages of an image's versions (local version labels and pre-releases).
"""

import re
import subprocess
import sys
from pathlib import Path

from tools.container.plan import changed, plan, requirements_of

ROOT = Path(__file__).parents[2]
IMAGE = {
    "torch": "2.11.0a0+eb65b36914.nv26.2",
    "torchvision": "0.26.0a0",
    "pytorch-triton": "3.6.0+git9844da95",
    "transformer-engine": "2.12.0+5671fd3",
    "apex": "0.1",
    "numpy": "2.1.0",
    "nvidia-cudnn-frontend": "1.18.0",
    "nvidia-resiliency-ext": "0.5.0",
    "pydantic": "2.12.0",
    "rich": "15.0.0",
    "psutil": "7.2.2",
}


def requirements() -> dict[str, str]:
    texts = [(ROOT / f"requirements{kind}.txt").read_text() for kind in ("", "-gpu")]
    return requirements_of(texts[0]) | requirements_of(texts[1])


def test_packages_built_together_are_kept_and_the_others_get_our_pins() -> None:
    result = plan(requirements(), IMAGE)
    names = {re.split(r"[=\[]", line)[0] for line in result.install}
    assert not names & {"torch", "numpy", "transformer-engine", "apex", "triton", "rich", "psutil"}
    assert {"megatron-core", "pydantic", "hydra-core", "flash-qla", "tilelang", "wandb"} <= names
    assert all("==" in line for line in result.install)
    assert f"torch=={IMAGE['torch']}" in result.keep
    assert {line.split("==")[0] for line in result.keep} == {
        *("apex", "numpy", "nvidia-cudnn-frontend", "pytorch-triton"),
        *("torch", "torchvision", "transformer-engine"),
    }
    assert result.remove == ["nvidia-resiliency-ext"]
    assert plan({}, {"nvidia-resiliency-ext": "0.6.0"}).remove == []


def test_a_bare_image_gets_every_requirement() -> None:
    result = plan(requirements(), {})
    assert sorted(result.install) == sorted(requirements().values())
    assert result.keep == result.remove == []
    assert any(line.startswith("transformer-engine[") for line in result.install)


def test_a_replaced_package_is_named() -> None:
    keep = plan({}, IMAGE).keep
    assert changed(keep, IMAGE) == []
    now = {**IMAGE, "torch": "2.11.0"}
    del now["apex"]
    assert changed(keep, now) == ["apex: was 0.1, is gone", f"torch: was {IMAGE['torch']}, is 2.11.0"]


def test_the_plan_of_this_environment_is_written_and_checked(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "tools/container/plan.py", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout

    run("--write", str(tmp_path), "requirements.txt")
    assert (tmp_path / "install.txt").read_text() == "", "this environment has all of it"
    assert "torch==" in (tmp_path / "keep.txt").read_text()
    assert run("--check", str(tmp_path)) == "no package of the image was replaced\n"


def test_the_dockerfile_copies_existing_files_and_ends_with_the_doctor() -> None:
    dockerfile = (ROOT / "tools/container/Dockerfile").read_text()
    for copied in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / path).exists() for path in copied.split())
    assert "tools/doctor" in dockerfile.splitlines()[-1]
