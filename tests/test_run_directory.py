"""Names of run directories."""

from pathlib import Path

import pytest

from megatron_q3n.config import UserError, validate
from megatron_q3n.run_directory import choose


@pytest.mark.parametrize("recipe", ["../../x", "/tmp/x", "a/b", ".hidden", "", "a\nb", "a" * 300, "-x"])
def test_a_recipe_that_leads_out_of_the_folder_of_runs_is_refused(recipe: str, tmp_path: Path) -> None:
    config = validate({"recipe": recipe, "runs_dir": str(tmp_path)})
    with pytest.raises(UserError, match=r"recipe=.* begins the name of the run directory"):
        choose(config)


def test_a_new_run_is_named_by_its_recipe(tmp_path: Path) -> None:
    config = validate({"recipe": "pretrain-80b_v1.5", "runs_dir": str(tmp_path)})
    run_dir = choose(config)
    assert run_dir.parent == tmp_path
    assert run_dir.name.startswith("pretrain-80b_v1.5-")
