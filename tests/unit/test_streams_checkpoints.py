"""Checkpoints as they lie in a root: whose they are, how far they are, and the leases that keep their queries out."""

import datetime
import json
from pathlib import Path

import pytest

from miniplm_udf import storage
from miniplm_udf.errors import CorpusError
from miniplm_udf.streams import checkpoints, lease
from miniplm_udf.streams.lease import Lease, is_held, lease_uri


def write_checkpoint(root: Path, name: str, n_finished: int, n_begun: int) -> None:
    folder = root / "_checkpoints" / name
    for kind, n in (("commits", n_finished), ("offsets", n_begun)):
        (folder / kind).mkdir(parents=True)
        for batch_id in range(n):
            offset = json.dumps({"reservoirVersion": batch_id + 5, "index": -1, "isStartingVersion": False})
            (folder / kind / str(batch_id)).write_text(f"v1\n{{}}\n{offset}")
    (folder / "metadata").write_text(json.dumps({"id": f"0-0-{name}"}))


def test_checkpoints_are_told_by_their_names(tmp_path: Path) -> None:
    for name in ("ingest-jsonl", "score-a", "score-a-1e-05", "score_matrix-b", "follow-half", "proxy-c"):
        write_checkpoint(tmp_path, name, 12 if name == "score-a" else 0, 13)
    (tmp_path / "_checkpoints/train/model").mkdir(parents=True)
    found = {one.name: one for one in checkpoints.find(str(tmp_path))}
    assert {name: (one.source, one.lease) for name, one in found.items()} == {
        "ingest-jsonl": (None, "ingest"),
        "score-a": ("instances", "score-a"),
        "score-a-1e-05": ("instances", "score-a-1e-05"),
        "score_matrix-b": ("scores", "score_matrix"),
        "follow-half": ("score_matrix", "follow-half"),
        "proxy-c": ("instances", "proxy_scores"),
    }
    assert {name: one.sample for name, one in found.items() if one.sample != 1} == {"score-a-1e-05": 1e-05}
    score = found["score-a"]
    assert (score.id, score.batch_id) == ("00scorea", 11)
    assert score.offset is not None
    assert score.offset["reservoirVersion"] == 16
    assert (found["follow-half"].batch_id, found["follow-half"].offset) == (None, None)
    assert datetime.datetime.now(datetime.UTC) - score.moved_at() < datetime.timedelta(minutes=5)


def test_alone_keeps_the_queries_out_and_is_refused_where_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.0)
    root = storage.to_uri(str(tmp_path))
    write_checkpoint(tmp_path, "score-a", 1, 1)
    (tmp_path / "tables/refined/half").mkdir(parents=True)
    names = ("ingest", "score-a", "score_matrix", "follow-half", "refined-half")
    with checkpoints.alone(root):
        assert all(is_held(lease_uri(root, name)) for name in names)
    assert not any(is_held(lease_uri(root, name)) for name in names)
    with Lease(lease_uri(root, "score-a"), "score"):
        with pytest.raises(CorpusError, match="run by process"), checkpoints.alone(root):
            pass
        assert not is_held(lease_uri(root, "ingest"))


def test_a_folder_lists_its_names_and_an_absent_one_none(tmp_path: Path) -> None:
    for name in ("b", ".hidden", "a"):
        (tmp_path / name).mkdir()
    assert storage.list_folder(storage.to_uri(str(tmp_path))) == ["a", "b"]
    assert storage.list_folder(str(tmp_path / "nowhere")) == []
