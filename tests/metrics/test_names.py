"""Table of metric names: unique, documented, unknown names rejected."""

import pytest

from megatron_q3n.metrics import names


def test_names_are_unique_and_described() -> None:
    rows = [metric.name for metric in names.METRICS]
    assert len(set(rows)) == len(rows)
    assert all(m.unit and m.meaning and m.group for m in names.METRICS)


@pytest.mark.parametrize("name", ["loss/train", "loss/mtp_1", "loss/mtp_12", "loss/validation/web_2", "throughput/mfu"])
def test_known_names_are_found(name: str) -> None:
    assert names.check(name).group in names.GROUPS


@pytest.mark.parametrize(
    "name", ["loss", "loss/mtp_", "loss/mtp_x", "loss/mtp_1/x", "loss/validation/a/b", "xloss/train"]
)
def test_unknown_names_are_rejected(name: str) -> None:
    with pytest.raises(AssertionError, match="has no row"):
        names.check(name)


def test_every_name_is_in_the_markdown_table() -> None:
    table = names.markdown_table()
    assert all(f"| `{metric.name}` |" in table for metric in names.METRICS)
    assert {line.count("|") for line in table.splitlines()} == {5}
