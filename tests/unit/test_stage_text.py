"""The summary of a stage as text: every number is shown, and the last line names the parts that are not shown."""

from jobs.stage_text import stage_text

SCORE = {
    "scored": {"reference": 345, "teacher": 12345},
    "tokens_per_second": {"teacher": 1234.5},
    "new_rejected": 0,
    "left_out": [],
    "too_many_rejects": False,
    "model": None,
}
PACK = {
    "packed": {
        "a/bpe": {"n_tokens": 7, "path": "file:///root/tables/packed/a", "skipped": True, "by_source": {"x": 1}},
        "b/bpe": {"n_tokens": 1200, "path": "s3a://bucket/b", "skipped": False, "by_source": {}},
    },
    "seconds": 6.0,
}


def test_numbers_by_name_are_one_line_and_what_is_empty_is_left_out() -> None:
    assert stage_text("score", SCORE).splitlines() == [
        "score:",
        "  scored             reference 345, teacher 12,345",
        "  tokens per second  teacher 1,234.5",
        "  new rejected       0",
    ]


def test_outputs_by_name_are_a_table_and_their_parts_are_named() -> None:
    assert stage_text("pack", PACK).splitlines() == [
        "pack:",
        "  packed  tokens  path                   skipped",
        "  a/bpe   7       /root/tables/packed/a  yes",
        "  b/bpe   1,200   s3a://bucket/b         no",
        "",
        "  --json prints these too: by source",
    ]


def test_texts_by_name_have_a_line_each() -> None:
    students = {"students": {"one": "file:///r/models/one", "two": "file:///r/models/two"}}
    assert stage_text("train", students).splitlines() == [
        "train:",
        "  students one  /r/models/one",
        "  students two  /r/models/two",
    ]


def test_a_value_that_is_printed_elsewhere_is_left_out() -> None:
    assert stage_text("ingest", {"said": "3 files", "files": 3}, ["3 files"]) == "ingest:\n  files  3"


def test_a_stage_without_a_summary_was_skipped() -> None:
    assert stage_text("reference", {}) == "reference: skipped"
