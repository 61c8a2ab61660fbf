"""A file of results grows by whole runs and survives a kill in the middle of a line."""

from __future__ import annotations

from synthrep_cli.comparison_rows import ResultRow, append_rows, missing_sets, read_rows


def result(dataset: str, key: str = "k", row: str = "stablerep", value: float = 0.5) -> ResultRow:
    return ResultRow(
        key=key, row=row, seed=0, dataset=dataset, protocol="linear", metric="accuracy",
        value=value, ci95=(0.4, 0.6), n_test=8, class_sizes=(4, 4), hits="f0",
    )  # fmt: skip


def test_rows_come_back_and_the_last_of_a_kind_holds(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    append_rows(path, [result("digits"), result("emoji")])
    append_rows(path, [result("digits", value=0.7)])
    assert [(r.dataset, r.value) for r in read_rows(path)] == [("digits", 0.7), ("emoji", 0.5)]


def test_a_torn_line_is_no_result_and_spoils_no_other(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [result("digits"), result("emoji")])
    path.write_bytes(path.read_bytes()[:-20] + b"\xff\0")
    assert [r.dataset for r in read_rows(path)] == ["digits"]
    append_rows(path, [result("fashion")])
    assert [r.dataset for r in read_rows(path)] == ["digits", "fashion"]


def test_missing_sets_are_those_without_a_line_of_the_same_key_and_row():
    rows = [result("digits"), result("emoji", key="other"), result("fashion", row="clip-real")]
    assert missing_sets(rows, "k", "stablerep", ("digits", "emoji", "fashion")) == [
        "emoji", "fashion",
    ]  # fmt: skip
