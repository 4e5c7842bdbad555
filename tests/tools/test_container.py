"""What the container recipe installs over an image, and what it must leave alone.

The image itself is not built here, for want of docker and of the network; what pip makes of the plan was tried by hand
with stand-in packages of an image's versions (local version labels and pre-releases).
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


def wanted() -> dict[str, str]:
    texts = [(ROOT / f"requirements{kind}.txt").read_text() for kind in ("", "-gpu")]
    return requirements_of(texts[0]) | requirements_of(texts[1])


def test_what_was_built_together_stays_and_the_rest_is_pinned_as_we_pin_it() -> None:
    made = plan(wanted(), IMAGE)
    names = {re.split(r"[=\[]", line)[0] for line in made.install}
    assert not names & {"torch", "numpy", "transformer-engine", "apex", "triton", "rich", "psutil"}
    assert {"megatron-core", "pydantic", "hydra-core", "flash-qla", "tilelang", "wandb"} <= names
    assert all("==" in line for line in made.install)
    assert f"torch=={IMAGE['torch']}" in made.keep
    assert {line.split("==")[0] for line in made.keep} == {
        *("apex", "numpy", "nvidia-cudnn-frontend", "pytorch-triton"),
        *("torch", "torchvision", "transformer-engine"),
    }
    assert made.remove == ["nvidia-resiliency-ext"]
    assert plan({}, {"nvidia-resiliency-ext": "0.6.0"}).remove == []


def test_a_bare_image_gets_every_requirement() -> None:
    made = plan(wanted(), {})
    assert sorted(made.install) == sorted(wanted().values())
    assert made.keep == made.remove == []
    assert any(line.startswith("transformer-engine[") for line in made.install)


def test_a_replaced_package_is_named() -> None:
    keep = plan({}, IMAGE).keep
    assert changed(keep, IMAGE) == []
    now = {**IMAGE, "torch": "2.11.0"}
    del now["apex"]
    assert changed(keep, now) == ["apex: was 0.1, is gone", f"torch: was {IMAGE['torch']}, is 2.11.0"]


def test_the_plan_of_this_environment_is_written_and_kept(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "tools/container/plan.py", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout

    run("--write", str(tmp_path), "requirements.txt")
    assert (tmp_path / "install.txt").read_text() == "", "this environment has all of it"
    assert "torch==" in (tmp_path / "keep.txt").read_text()
    assert run("--check", str(tmp_path)) == "nothing of the image was replaced\n"


def test_the_recipe_copies_what_it_uses_and_names_no_machine() -> None:
    recipe = (ROOT / "tools/container/Dockerfile").read_text()
    for copied in re.findall(r"^COPY (.+) \S+$", recipe, re.MULTILINE):
        assert all((ROOT / path).exists() for path in copied.split())
    assert "tools/doctor" in recipe.splitlines()[-1]
