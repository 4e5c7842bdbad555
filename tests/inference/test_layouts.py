"""Tensor- and expert-parallel ranks generate the same as one process, also where only some of them have prompts."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.inference.layout_ranks import LAYOUTS, PROMPTS, RUNS


@pytest.fixture(scope="module")
def results_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    done = forked.run("tests.inference.layout_ranks", folder, seconds=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def load_results(folder: Path, layout: str, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"{layout}-{rank}.json").read_text())


@pytest.mark.multiprocess
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_layout_generates_the_same_as_one_process(results_folder: Path, layout: str) -> None:
    expected = load_results(results_folder, "single", 0)["all"]
    ranks = [load_results(results_folder, layout, rank) for rank in (0, 1)]
    for share in ranks[0]:
        for run in RUNS:
            merged = {**ranks[0][share][run], **ranks[1][share][run]}
            assert len(merged) == len(PROMPTS)
            assert merged == expected[run], f"{share} {run}"
    for rank in ranks:
        assert rank["all"] == expected, "every rank has all completions it requested"


@pytest.mark.multiprocess
def test_the_runs_differ_from_each_other_and_some_stop_early(results_folder: Path) -> None:
    """Otherwise the comparison above would be weak."""
    single = load_results(results_folder, "single", 0)["all"]
    assert single["greedy"] == single["greedy-drafts"]
    assert single["greedy"] != single["sampled-drafts"]
    lengths = {len(tokens) for tokens in single["sampled-drafts"].values()}
    assert len(lengths) > 1
