"""`miniplm corpus` and `miniplm maintain`: their command lines, and what they print."""

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import pytest

from jobs import cli, corpus, corpus_text, maintain, session
from miniplm_udf.corpora import versions
from miniplm_udf.upkeep import preflight
from miniplm_udf.upkeep.maintain import Maintained, MaintainedTable

CONF = Path(__file__).resolve().parents[2] / "conf"
COUNTS = {"web": {"n_instances": 1200, "n_tokens": 34000}, "code": {"n_instances": 2, "n_tokens": 5}}


@pytest.mark.parametrize("word", list(corpus.ACTIONS))
def test_every_word_has_help_and_names_what_it_takes(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["corpus", word, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: miniplm corpus {word}" in shown
    takes = {"list": [], "take-down": [], "diff": ["version", "other"]}.get(word, ["version"])
    assert all(f" {name} " in shown for name in takes)


@pytest.mark.parametrize("arguments", [[], ["shwo"], ["show"], ["diff", "-c", "x", "one"], ["list"]])
def test_a_wrong_command_line_is_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["corpus", *arguments])
    assert ended.value.code == 2
    assert "usage: miniplm corpus" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["corpus", "restore"], ["corpus", "diff", "a@1"], ["inspect"], ["export", "--to", "parquet"], ["explore"]]
)
def test_a_version_after_the_overrides_is_a_usage_error_that_says_so(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "-c", str(CONF / "demo.yaml"), "root=/data/run1", "difference@1"])
    assert ended.value.code == 2
    assert "expected a version (NAME, NAME@NUMBER or NAME@TAG) before the overrides, found 'root=/data/run1'" in (
        capsys.readouterr().err
    )


def test_options_and_overrides_stand_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def run(config: Any, arguments: Any) -> dict[str, Any]:
        seen.extend([config.root, arguments.version, arguments.other, arguments.examples])
        return {"from": "a@1", "to": "b@2", "added": {}, "removed": {}, "both": {}, "added_examples": [],
                "removed_examples": []}  # fmt: skip

    monkeypatch.setitem(corpus.ACTIONS, "diff", dataclasses.replace(corpus.ACTIONS["diff"], run=run))
    arguments = ["a@1", "--examples", "5", "b", "-c", str(CONF / "demo.yaml"), f"root={tmp_path}"]
    assert cli.main(["corpus", "diff", *arguments]) == 0
    assert seen == [f"file://{tmp_path}", "a@1", "b", 5]
    assert "a@1 -> b@2" in capsys.readouterr().out


def test_an_action_with_spark_checks_the_root_first_and_stops_its_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    class StoppedSession:
        def stop(self) -> None:
            seen.append("stopped")

    def unpin(spark: Any, root: str, address: str) -> tuple[str, int]:
        seen.append(address)
        return "a", 1

    monkeypatch.setattr(session, "make_session", lambda config, name: StoppedSession())
    monkeypatch.setattr(preflight, "check", lambda session, config, needed: seen.append(needed))
    monkeypatch.setattr(versions, "unpin", unpin)
    assert cli.main(["corpus", "unpin", "a@1", "-c", str(CONF / "demo.yaml"), f"root={tmp_path}"]) == 0
    assert seen == [(), "a@1", "stopped"]
    assert "a@1 is not pinned any more" in capsys.readouterr().out


def test_a_difference_is_told_by_source_with_texts_on_one_line() -> None:
    example = {"instance_id": "i" * 32, "source": "web", "score": 0.123456789, "text": "one\n\ttwo"}
    difference = {
        "from": "a@1", "to": "b@2", "added": COUNTS, "removed": {"web": COUNTS["code"]}, "both": {},
        "added_examples": [example], "removed_examples": [{**example, "text": None}],
    }  # fmt: skip
    lines = corpus_text.diff(difference).splitlines()
    assert [line.split() for line in lines if line.startswith(("web", "code", "all"))] == [
        ["code", "2", "5", "0", "0", "0", "0"],
        ["web", "1,200", "34,000", "2", "5", "0", "0"],
        ["all", "1,202", "34,005", "2", "5", "0", "0"],
    ]
    assert f"added {'i' * 32} web 0.123457" in lines
    assert "  one two" in lines
    assert "  (no such instance)" in lines


def test_a_version_without_its_rows_is_still_shown() -> None:
    now = datetime.datetime(2026, 1, 2, 3, 4, 5)
    version = {
        "name": "kept", "version": 3, "created_at": now, "pinned": False, "tag": None, "n_instances": 10,
        "n_candidates": 2000, "n_tokens": 5, "candidate_tokens": 6, "threshold": None, "fingerprint": "f",
        "code_revision": "c", "config": {"select": {"rule": "random", "ratio": 0.5, "threshold": None}},
        "inputs": {"matrix_version": 7, "model_revisions": {"teacher": "r"}, "derived": {"by": "restore"}},
        "by_source": None,
    }  # fmt: skip
    text = corpus_text.show(version)
    assert "10 of 2,000 candidates" in text
    assert "rule random, ratio 0.5" in text
    assert "its rows are gone" in text
    assert "by restore" in text
    assert "input matrix_version" in text


def test_maintenance_is_told_a_line_a_table() -> None:
    result = Maintained(
        [MaintainedTable("instances", 168.0, 1234, True), MaintainedTable("refined/kept", None, 0, False, "why")],
        ["kept@3"],
        ["score-x"],
    )
    lines = maintain.text(result).splitlines()
    assert lines[1].split() == ["instances", "1,234", "168", "yes"]
    assert lines[2].split() == ["refined/kept", "0", "-", "-", "why"]
    assert lines[3:] == ["pinned: kept@3, which a model was trained on", "removed: score-x"]
