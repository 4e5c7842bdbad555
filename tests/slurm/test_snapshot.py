"""Code snapshot: what it takes of a checkout, and the user's own modules that a recipe names."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_q3n.config import UserError, validate
from slurm import snapshot
from slurm.site import Site
from slurm.user_code import user_files
from tests.slurm.test_refused import dry_run

TRACKED = {"slurm/submit.py", "recipes/tiny.yaml", "megatron_q3n/data/tokenizer.py", "tools/keys.txt"}
NEW_MODULES = {"megatron_q3n/new_module.py", "tools/monkey_patch.py"}
NEVER = {
    "slurm/.env",
    "slurm/sites/cluster.env",
    "tools/.netrc.py",
    "tools/wandb_api_key.py",
    "tools/id_rsa",
    "megatron_q3n/.hidden/module.py",
    "recipes/ignored.py",
}
LEFT_OUT = {"slurm/sites/cluster.yaml", "tools/notes.txt"}


def write(root: Path, names: set[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that the snapshot takes for its checkout, with tracked files committed."""
    root = tmp_path / "checkout"
    write(root, TRACKED)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main", "-C", str(root)]
    (root / ".gitignore").write_text("ignored.py\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    write(root, NEW_MODULES | NEVER | LEFT_OUT)
    (root / "tools" / "linked.py").symlink_to(root / "slurm" / ".env")
    monkeypatch.setattr(snapshot, "ROOT", root)
    return root


def test_tracked_files_and_new_modules_are_taken(checkout: Path, tmp_path: Path) -> None:
    left_out = snapshot.take_snapshot(tmp_path / "code")
    assert files_of(tmp_path / "code") == TRACKED | NEW_MODULES | {"COMMIT"}
    assert set(left_out) >= LEFT_OUT
    assert "recipes/ignored.py" not in left_out


def test_without_git_no_credentials_are_taken(checkout: Path, tmp_path: Path) -> None:
    subprocess.run(["rm", "-r", str(checkout / ".git")], check=True)
    snapshot.take_snapshot(tmp_path / "code")
    taken = files_of(tmp_path / "code")
    assert taken >= TRACKED - {"tools/keys.txt"}
    assert not taken & (NEVER - {"recipes/ignored.py"})


def rl_config(function: str) -> object:
    # only the section of rewards is read, and a whole recipe takes a second
    config = validate({})
    reward = config.rl.reward.model_copy(update={"kind": "function", "function": function})
    return config.model_copy(update={"stage": "rl", "rl": config.rl.model_copy(update={"reward": reward})})


def test_a_users_reward_function_is_taken_with_its_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"unrelated.py", "answers/__init__.py", "answers/numbers.py"})
    (tmp_path / "my_rewards.py").write_text("import json\nimport numpy\nfrom answers import numbers\n")
    monkeypatch.chdir(tmp_path)
    files = user_files(rl_config("my_rewards:score"), Site())
    assert set(files) == {"my_rewards.py", "answers/__init__.py", "answers/numbers.py"}
    assert set(user_files(rl_config("answers.numbers:score"), Site())) == set(files) - {"my_rewards.py"}
    assert user_files(rl_config("numpy:score"), Site()) == {}, "an installed package"
    snapshot.add_files(tmp_path / "code", files)
    command = [sys.executable, "-c", "import my_rewards; print(my_rewards.numbers.__file__)"]
    done = subprocess.run(command, cwd=tmp_path / "code", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "code" / "answers" / "numbers.py")


@pytest.mark.parametrize("function", ["no_such_module:score", "answers.no_such:score", "tools.rewards:score"])
def test_a_reward_function_that_no_job_could_import_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    write(tmp_path, {"answers/__init__.py", "tools/rewards.py"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"rl\.reward\.function: "):
        user_files(rl_config(function), Site())


def test_a_dry_run_checks_the_reward_function(tmp_path: Path) -> None:
    overrides = ["rl.rl.reward.kind=function", "rl.rl.reward.function=no_such_module:score"]
    done = dry_run("--config-name", "pipeline-tiny", *overrides)
    assert done.returncode == 2
    assert "stage rl: rl.reward.function: there is no module no_such_module" in done.stderr
