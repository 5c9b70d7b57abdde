"""`miniplm inspect` and `miniplm export`: command lines, what they print, and the cuts that distances are from."""

import contextlib
from pathlib import Path
from typing import Any

import pytest

from jobs import cli, export, inspect_corpus
from miniplm_udf.corpora.inspection import Question, cuts_of
from miniplm_udf.errors import ConfigError
from miniplm_udf.store import corpus_records

CONF = Path(__file__).resolve().parents[2] / "conf"
ROW = {
    "instance_id": "i" * 32, "source": "web", "score": 0.123456789, "cut_distance": -0.5, "n_tokens": 1200,
    "n_bytes": 3, "teacher_nll_mean": 2.25, "teacher_n_tokens": 1200, "reference_nll_mean": None,
    "document_ids": ["one", "two"], "start_byte": 4096, "metadata": None, "text": "a\tb\n\nc\x1b[31m", "is_cut": True,
}  # fmt: skip
FOUND = {
    "version": "kept@3", "side": "dropped", "threshold": 0.6, "order": "nearest to the cut", "n_matching": 1234,
    "rows": [ROW],
}  # fmt: skip


def test_a_row_is_shown_with_its_score_and_its_text_set_in() -> None:
    assert inspect_corpus.text(FOUND).split("\n") == [
        "kept@3, dropped: 1 of 1,234 rows, nearest to the cut; threshold 0.6",
        "",
        f"1. web  score 0.123457 (cut -0.5)  1,200 tokens, 3 bytes  {'i' * 32}",
        "   teacher_nll_mean 2.25  documents one, two from byte 4,096",
        "   | a\tb",
        "   | ",
        "   | c\\x1b[31m ...",
    ]


def test_the_documents_of_a_row_are_named() -> None:
    def second_line(**changes: Any) -> str:
        return inspect_corpus.text({**FOUND, "rows": [{**ROW, **changes}]}).split("\n")[3]

    assert second_line(document_ids=["172"], start_byte=0) == "   teacher_nll_mean 2.25  document 172"
    assert second_line(document_ids=["a", "b"], start_byte=0) == "   teacher_nll_mean 2.25  documents a, b"


def test_a_row_without_a_score_and_one_without_an_instance_are_shown() -> None:
    bare = {key: ROW[key] for key in ("instance_id", "source", "n_tokens", "n_bytes")}
    rows = [{**ROW, "score": None, "cut_distance": None}, {**bare, "score": 1.0, "cut_distance": None, "text": None}]
    shown = inspect_corpus.text({**FOUND, "threshold": None, "rows": rows})
    assert "score none  1,200 tokens" in shown
    assert "score 1  1,200 tokens" in shown
    assert "   | (no such instance)" in shown
    assert "threshold" not in shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("naïve 終 🙂\n\ta\u00a0b", "naïve 終 🙂\n\ta\u00a0b"),
        ("a\rb\x1b]0;title\x07\x7f", "a\\rb\\x1b]0;title\\x07\\x7f"),
        ("\u202eback\u2028\ufeff", "\\u202eback\\u2028\\ufeff"),
    ],
)
def test_a_terminal_is_not_commanded(text: str, expected: str) -> None:
    assert inspect_corpus.visible(text) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "kept", "-n", "0"], "-n: expected 1 to 1000 rows, found 0"),
        (["inspect", "kept", "--chars", "0"], "--chars: expected at least 1 character, found 0"),
        (["export", "kept", "--to", "parquet", "--rows-per-file", "0"], "--rows-per-file: expected 1 to 250000 rows"),
    ],
)
def test_a_number_out_of_range_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments, "-c", str(CONF / "demo.yaml")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "kept"],
        ["export", "kept", "--to", "csv"],
        ["inspect", "kept", "--side", "both"],
        ["inspect"],
        ["inspect", "kept", "--highest", "--lowest"],
        ["inspect", "kept", "--near-cut", "--highest"],
        ["inspect", "kept", "--lowest", "--near-cut"],
    ],
)
def test_a_wrong_command_line_is_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "-c", str(CONF / "demo.yaml")])
    assert ended.value.code == 2
    assert f"usage: miniplm {arguments[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "order"),
    [([], "sample"), (["--near-cut"], "near_cut"), (["--highest"], "highest"), (["--lowest"], "lowest")],
)
def test_an_option_chooses_the_order(arguments: list[str], order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Question] = []

    def answer(spark: object, root: str, address: str, question: Question) -> dict[str, Any]:
        asked.append(question)
        return FOUND

    monkeypatch.setattr(inspect_corpus, "command_session", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(inspect_corpus, "inspect", answer)
    assert inspect_corpus.main(["kept", "-c", str(CONF / "demo.yaml"), *arguments]) == 0
    assert [question.order for question in asked] == [order]


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ConfigError, match="order: expected one of sample, near_cut, highest, lowest, found 'first'"):
        Question(order="first")


def test_what_was_exported_is_told_on_one_line() -> None:
    found = {
        "corpus": "kept", "version": 3, "n_instances": 1234, "n_tokens": 5678, "text_bytes": 9999, "n_bytes": 4321,
        "files": [{}, {}], "to": "jsonl.zst", "path": "file:///out",
    }  # fmt: skip
    assert export.text(found) == (
        "kept@3: 1,234 instances, 5,678 tokens, 9,999 bytes of text, as 2 files of 4,321 bytes (jsonl.zst) in file:///out"
    )


def known(**changes: Any) -> corpus_records.Provenance:
    plain = corpus_records.Provenance(
        corpus="kept", config={"select": {"per_source": None}}, inputs={}, model_revisions={}, threshold=0.5,
        n_candidates=0, candidate_tokens=0, n_unscorable=0, n_instances=0, n_tokens=0, fingerprint="", code_revision="",
        kept_share_by_source={},
    )  # fmt: skip
    return corpus_records.Provenance(**{**vars(plain), **changes})


def test_distances_are_from_the_cuts_that_were_made() -> None:
    assert cuts_of(known()) == {None: [0.5]}
    assert cuts_of(known(followed={"cut": {"score": 0.25}})) == {None: [0.25]}
    assert cuts_of(known(cuts={"all sources": {"down_to": [0.4, "i"]}})) == {None: [0.4]}
    band = {"down_to": [0.2, "i"], "below": [0.8, "j"]}
    assert cuts_of(known(cuts={"all sources": band})) == {None: [0.2, 0.8]}
    by_source = known(config={"select": {"per_source": "same"}}, cuts={"web": {"down_to": [1, "i"]}, "code": band})
    assert cuts_of(by_source) == {"web": [1.0], "code": [0.2, 0.8]}
