"""Words in the repository: names (identifiers, files, settings, metrics) and prose contain no forbidden words."""

import pytest

from megatron_q3n.metrics import names
from tests.architecture_rules import ROOT, repository_files
from tests.naming_rules import name_complaint, naming_complaints, prose_complaints


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Return the repository's files and their contents."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of the project's own files")
    return {path: (ROOT / path).read_bytes().decode("utf-8", errors="replace") for path in repository_files(ROOT)}


def test_no_name_has_a_forbidden_word(texts: dict[str, str]) -> None:
    found = [complaint for path, text in texts.items() for complaint in naming_complaints(path, text)]
    found += [complaint for metric in names.METRICS if (complaint := name_complaint(metric.name))]
    assert not found, "\n".join(["", *found])


def test_no_prose_has_a_forbidden_word(texts: dict[str, str]) -> None:
    found = [complaint for path, text in texts.items() for complaint in prose_complaints(path, text)]
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("tools/x.py", "def few_rows(): pass", "tools/x.py:1: few_rows: not few_rows; use decode_gemm"),
        ("tools/x.py", "\ndef _few_rows_kernel(): pass", "tools/x.py:2: _few_rows_kernel"),
        ("tools/x.py", "class Abilities: pass", "Abilities: not abilities"),
        ("tools/x.py", "class RouteTape: pass", "RouteTape: not tape"),
        ("tools/x.py", "def f(taps): pass", "not taps"),
        ("tools/x.py", "self.was_told = 1", "not told"),
        ("tools/x.py", "for heard in x: pass", "not heard"),
        ("tools/x.py", "import y as judge", "not judge"),
        ("rl/answer_server.py", "", "not answer_server"),
        ("recipes/x.yaml", "mtp:\n  own_drafts_start: 1\n", "recipes/x.yaml:2: own_drafts_start"),
        ("recipes/x.yaml", "common: [mtp.own_drafts_end=0.5]", "mtp.own_drafts_end: not own_drafts"),
    ],
)
def test_a_planted_name_is_found(path: str, text: str, complaint: str) -> None:
    found = list(naming_complaints(path, text))
    assert len(found) == 1, found
    assert complaint in found[0]


def test_a_planted_metric_is_found() -> None:
    assert "not even_groups; use zero_variance_groups" in str(name_complaint("reward/even_groups"))


@pytest.mark.parametrize(
    "name", ["returned", "layout", "paced", "spelling", "spaces", "reward/solved", "bedroom", "roomy"]
)
def test_other_words_are_accepted(name: str) -> None:
    assert name_complaint(name) is None


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("README.md", "a\n\n`train.py` is the one door.\n", "README.md:3: not 'door' in prose; use entry point"),
        ("docs/x.md", "Nobody waits.", "docs/x.md:1: not 'Nobody'"),
        (
            "tools/x.py",
            '"""The only room that composes the others."""',
            "tools/x.py:1: not 'room' in prose; use capacity",
        ),
        ("tools/x.py", 'def f():\n    """A.\n\n    The cache lets\n    go."""', "tools/x.py:4: not 'lets go'"),
        ("tools/x.py", 'class A:\n    b: int\n    """Why it was asked to stop."""', "tools/x.py:3: not 'asked'"),
        ("tools/x.py", "x = 1\n# every gradient is born divided\n", "tools/x.py:2: not 'born divided'"),
        ("tools/x.py", "x = 1  # the rank is told", "tools/x.py:1: not 'told'"),
        ("tests/x.py", "# somebody else's memory", "tests/x.py:1: not 'somebody'"),
        ("tests/x.py", "# the process dies", "tests/x.py:1: not 'dies'"),
        ("tests/x.py", "# a warp walks along its rows", "tests/x.py:1: not 'walks along'"),
    ],
)
def test_planted_prose_is_found(path: str, text: str, complaint: str) -> None:
    found = list(prose_complaints(path, text))
    assert len(found) == 1, found
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("README.md", "Headroom, in-house, the classroom, an outdoor scene, random walks, half-lives in tokens."),
        ("tools/x.py", '# it was returned\nraise ValueError("nobody asked")'),
        ("recipes/x.yaml", "# room"),
        ("tests/naming_rules.py", "# room"),
    ],
)
def test_other_prose_is_accepted(path: str, text: str) -> None:
    assert list(prose_complaints(path, text)) == []
