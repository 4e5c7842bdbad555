"""Names of run directories, and files for results that cannot be written."""

import os
from pathlib import Path

import pytest

from megatron_q3n.config import UserError, validate
from megatron_q3n.run_directory import check_writable, choose
from tests.checkpoint.unprivileged import public_folder, unprivileged


@pytest.mark.parametrize("recipe", ["../../x", "/tmp/x", "a/b", ".hidden", "", "a\nb", "a" * 300, "-x"])
def test_a_recipe_that_leads_out_of_the_folder_of_runs_is_refused(recipe: str) -> None:
    with pytest.raises(UserError, match="recipe="):
        validate({"recipe": recipe})


def test_a_new_run_is_named_by_its_recipe(tmp_path: Path) -> None:
    config = validate({"recipe": "pretrain-80b_v1.5", "runs_dir": str(tmp_path)})
    run_dir = choose(config)
    assert run_dir.parent == tmp_path
    assert run_dir.name.startswith("pretrain-80b_v1.5-")


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_cannot_be_written_is_refused(replaced: bool) -> None:
    with public_folder() as folder:
        (folder / "file").write_text("content")
        for path in (folder, folder / "missing/file", folder / "file/below"):
            with pytest.raises(UserError, match=r"some\.output=.*Nothing was computed"):
                check_writable(path, "some.output", replaced=replaced)
        (folder / "file").chmod(0o444)
        for path in (folder / "file", folder / "new"):
            with unprivileged(), pytest.raises(UserError, match="Permission denied"):
                check_writable(path, "some.output", replaced=replaced)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_check_of_a_file_changes_nothing(tmp_path: Path, replaced: bool) -> None:
    (tmp_path / "file").write_text("content")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "new", "pipe"):
        check_writable(tmp_path / name, "some.output", replaced=replaced)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]
    assert (tmp_path / "file").read_text() == "content"


def test_a_file_in_a_closed_folder_can_be_written_but_not_replaced() -> None:
    with public_folder() as folder:
        (folder / "file").write_text("content")
        (folder / "file").chmod(0o666)
        folder.chmod(0o555)
        with unprivileged():
            check_writable(folder / "file", "some.output", replaced=False)
            with pytest.raises(UserError, match="Permission denied"):
                check_writable(folder / "file", "some.output", replaced=True)
        folder.chmod(0o755)
