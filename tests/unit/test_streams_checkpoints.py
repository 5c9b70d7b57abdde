"""Checkpoints as they lie in a root: whose they are, how far they are, and the leases that keep their queries out."""

import dataclasses
import datetime
import json
import re
from pathlib import Path

import pytest

from miniplm_udf import lease, storage
from miniplm_udf.errors import CorpusError
from miniplm_udf.layout import Root
from miniplm_udf.lease import Lease, is_held
from miniplm_udf.streams import checkpoints, facts
from miniplm_udf.streams.facts import QueryFacts


def write_checkpoint(root: Path, name: str, n_finished: int, n_begun: int) -> None:
    folder = root / "_checkpoints" / name
    for kind, n in (("commits", n_finished), ("offsets", n_begun)):
        (folder / kind).mkdir(parents=True)
        for batch_id in range(n):
            offset = json.dumps({"reservoirVersion": batch_id + 5, "index": -1, "isStartingVersion": False})
            (folder / kind / str(batch_id)).write_text(f"v1\n{{}}\n{offset}")
    (folder / "metadata").write_text(json.dumps({"id": f"0-0-{name}"}))


def test_checkpoints_of_older_roots_are_told_by_their_names(tmp_path: Path) -> None:
    for name in (
        "ingest-jsonl",
        "score-a",
        "score-a-1e-05",
        "score_matrix-b",
        "follow-half",
        "proxy-c",
        "generate-d-0.5",
    ):
        write_checkpoint(tmp_path, name, 12 if name == "score-a" else 0, 13)
    (tmp_path / "_checkpoints/train/model").mkdir(parents=True)
    found = {one.name: one for one in checkpoints.find(str(tmp_path))}
    assert {name: (one.source, one.lease) for name, one in found.items()} == {
        "ingest-jsonl": (None, "ingest"),
        "score-a": ("instances", "score-a"),
        "score-a-1e-05": ("instances", "score-a-1e-05"),
        "generate-d-0.5": ("instances", "generate-d"),
        "score_matrix-b": ("scores", "score_matrix"),
        "follow-half": ("score_matrix", "follow-half"),
        "proxy-c": ("instances", "proxy_scores"),
    }
    assert {name: one.sample for name, one in found.items() if one.sample != 1} == {
        "score-a-1e-05": 1e-05, "generate-d-0.5": 0.5,
    }  # fmt: skip
    assert [one.stage for one in found.values()] == [
        "follow",
        "generate",
        "ingest",
        "proxy",
        "score",
        "score",
        "score_matrix",
    ]
    score = found["score-a"]
    assert (score.id, score.batch_id) == ("00scorea", 11)
    assert score.offset is not None
    assert score.offset["reservoirVersion"] == 16
    assert (found["follow-half"].batch_id, found["follow-half"].offset) == (None, None)
    assert datetime.datetime.now(datetime.UTC) - score.moved_at() < datetime.timedelta(minutes=5)


def test_recorded_facts_count_and_the_name_does_not(tmp_path: Path) -> None:
    recorded = QueryFacts(stage="score", lease="a lease", source="proxy_scores", sample=0.25, revisions={"m": "r"})
    write_checkpoint(tmp_path, "follow-half", 1, 1)
    uri = Root(str(tmp_path)).checkpoint("follow-half")
    facts.record(uri, recorded)
    (checkpoint,) = checkpoints.find(str(tmp_path))
    assert checkpoint.facts == recorded
    assert (checkpoint.stage, checkpoint.lease, checkpoint.source, checkpoint.sample) == (
        "score", "a lease", "proxy_scores", 0.25,
    )  # fmt: skip
    place = tmp_path / "_checkpoints/follow-half.json"
    before = place.stat()
    facts.record(uri, recorded)
    assert place.stat() == before
    facts.record(uri, dataclasses.replace(recorded, sample=0.5))
    assert facts.read(uri).sample == 0.5
    checkpoint.remove()
    assert list((tmp_path / "_checkpoints").iterdir()) == []


def test_a_copied_checkpoint_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("score-a", "score-a-old"):
        write_checkpoint(tmp_path, name, 1, 1)
    assert [checkpoint.name for checkpoint in checkpoints.find(str(tmp_path))] == ["score-a"]
    assert re.search(r"score-a-old: expected a folder named .*move it out", caplog.text)


@pytest.mark.parametrize("content", ["{", "{}", "[1]"])
def test_damaged_facts_are_named_and_taken_from_the_name(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, "score-a", 1, 1)
    record = tmp_path / "_checkpoints/score-a.json"
    record.write_text(content)
    (checkpoint,) = checkpoints.find(str(tmp_path))
    assert (checkpoint.facts.stage, checkpoint.facts.source) == ("score", "instances")
    assert "/_checkpoints/score-a.json is damaged" in caplog.text
    facts.record(f"{tmp_path}/_checkpoints/score-a", checkpoint.facts)
    assert json.loads(record.read_text())["stage"] == "score"


def test_facts_of_a_later_release_are_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "score-a", 1, 1)
    (tmp_path / "_checkpoints/score-a.json").write_text('{"stage": "score", "lease": "x", "color": 1}')
    (checkpoint,) = checkpoints.find(str(tmp_path))
    assert checkpoint.facts == QueryFacts(stage="score", lease="x")


def test_the_input_format_of_ingest_is_recorded_and_an_older_record_takes_it_from_the_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "ingest-delta", 1, 1)
    record = tmp_path / "_checkpoints/ingest-delta.json"
    for plain in ({}, {"input_format": "delta"}):
        record.write_text(json.dumps({"stage": "ingest", "lease": "ingest", **plain}))
        (checkpoint,) = checkpoints.find(str(tmp_path))
        assert checkpoint.facts == QueryFacts(stage="ingest", lease="ingest", input_format="delta")
    record.write_text('{"stage": "ingest", "lease": "ingest", "input_format": "jsonl"}')
    assert next(checkpoints.find(str(tmp_path))).facts.input_format == "jsonl"
    record.unlink()
    assert next(checkpoints.find(str(tmp_path))).facts.input_format == "delta"


@pytest.mark.slow
def test_alone_keeps_the_queries_out_and_is_refused_where_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.0)
    root = storage.to_uri(str(tmp_path))
    write_checkpoint(tmp_path, "score-a", 1, 1)
    (tmp_path / "tables/refined/half").mkdir(parents=True)
    names = ("ingest", "score-a", "score_matrix", "follow-half", "refined-half")
    with checkpoints.alone(root):
        assert all(is_held(Root(root).lease(name)) for name in names)
    assert not any(is_held(Root(root).lease(name)) for name in names)
    with Lease(Root(root).lease("score-a"), "score"):
        with pytest.raises(CorpusError, match="run by process"), checkpoints.alone(root):
            pass
        assert not is_held(Root(root).lease("ingest"))


def test_a_folder_lists_its_names_and_an_absent_one_none(tmp_path: Path) -> None:
    for name in ("b", ".hidden", "a"):
        (tmp_path / name).mkdir()
    assert storage.list_folder(storage.to_uri(str(tmp_path))) == ["a", "b"]
    assert storage.list_folder(str(tmp_path / "nowhere")) == []
