"""Packed ingest: a document is packed once, whichever files, micro-batches and queries hold its copies."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.ingest import run
from miniplm_udf import schemas
from miniplm_udf.corpora.takedown import Takedown, take_down
from miniplm_udf.errors import ConfigError
from miniplm_udf.ingestion import batches
from miniplm_udf.ingestion.summary import OBSERVED
from miniplm_udf.store import tables
from miniplm_udf.streams.runner import QueryRunner
from miniplm_udf.upkeep.verify import verify
from tests.support.ingest_roots import ROWS, Make, instances, jsonl

# The second file repeats documents of the first between its own, and one of its own; two are other documents.
NEW = [{"id": f"n{i}", "text": f"Another document, {i}. It has words; some.\n", "source": "s0"} for i in range(6)]
FIRST = [*ROWS[:12], ROWS[3]]
SECOND = [NEW[0], ROWS[5], NEW[1], NEW[2], ROWS[3], NEW[2], {**ROWS[4], "id": "other"}, {**ROWS[4], "text": "New."}]
DISTINCT = {(row["id"], row["text"]) for row in [*FIRST, *SECOND]}


def write(folder: Path, name: str, rows: list[dict[str, Any]], time: float) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(jsonl(rows))
    os.utime(folder / name, (time, time))


def occurrences(rows: list[Any]) -> list[tuple[str, str]]:
    """(id, text) of each document, as often as the instances hold it, put together from the slices in their order."""
    found: list[tuple[str, str]] = []
    for row in sorted(rows, key=lambda row: (row.stream_id, row.ordinal)):
        raw, bounds = row.text.encode(), [0, *row.segment_ends, row.n_bytes]
        for i, document in enumerate(row.document_ids):
            part = raw[bounds[i] : bounds[i + 1]].decode()
            if i == 0 and not row.starts_document:
                assert found[-1][0] == document
                found[-1] = (document, found[-1][1] + part)
            else:
                found.append((document, part))
    return sorted(found)


def ids(spark: Any, config: Any) -> list[str]:
    return sorted(row.instance_id for row in instances(spark, config))


def check_root(spark: Any, config: Any) -> None:
    assert [check for check in verify(spark, config.root) if not check.ok] == []


@pytest.mark.long
def test_copies_are_packed_once(spark: Any, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one micro-batch, over several, and after a lost checkpoint; the earliest file's copy is kept."""
    # The earlier file is the later one by name.
    write(tmp_path / "in", "z.jsonl", FIRST, 1e9)
    write(tmp_path / "in", "a.jsonl", SECOND, 1.5e9)
    together, apart = make(str(tmp_path / "in"), root="together"), make(str(tmp_path / "in"), max_files_per_trigger=1)
    summary = run(spark, together)
    assert summary.documents == len(DISTINCT)
    assert occurrences(instances(spark, together)) == sorted(DISTINCT)
    counts = []
    add = QueryRunner._add

    def listen(runner: Any, one: Any, progress: dict[str, Any]) -> None:
        counts.append(progress["observedMetrics"][OBSERVED]["documents"])
        add(runner, one, progress)

    monkeypatch.setattr(QueryRunner, "_add", listen)
    run(spark, apart)
    assert counts == [len(FIRST), len(SECOND)]
    assert ids(spark, apart) == ids(spark, together)
    keys = tables.read(spark, apart.layout.table("document_keys")).collect()
    assert len({row.document_key for row in keys}) == len(keys) == len(DISTINCT)
    # The old rule packed every copy: its roots are refused.
    place = tmp_path / "together/tables/instances.json"
    settled = json.loads(place.read_text())
    del settled["chunking"]["copies"]
    place.write_text(json.dumps(settled))
    with pytest.raises(ConfigError, match=r"copies: None there.*packs each document once.*into a new root"):
        run(spark, together)

    # The checkpoint is lost, and by now an older file has copies: they would be packed with other neighbours.
    before = ids(spark, apart)
    write(tmp_path / "in", "old.jsonl", [NEW[4], ROWS[7], NEW[1], NEW[5]], 5e8)
    shutil.rmtree(tmp_path / "root/_checkpoints")
    again = run(spark, apart)
    assert again.documents == len(DISTINCT) + 2
    assert set(before) < set(ids(spark, apart))
    assert occurrences(instances(spark, apart)) == sorted(DISTINCT | {(row["id"], row["text"]) for row in NEW[4:]})
    check_root(spark, apart)


@pytest.mark.long
def test_a_replay_packs_the_same_and_what_a_changed_file_has_more(
    spark: Any,
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed behind each table, an ingest ends as one that was not; where a file has changed, without copies."""
    write(tmp_path / "in", "a.jsonl", [*FIRST, {"id": "none"}], 1e9)
    write(tmp_path / "in", "b.jsonl", SECOND, 1.5e9)
    config, undisturbed = make(str(tmp_path / "in")), make(str(tmp_path / "in"), root="undisturbed")
    run(spark, undisturbed)
    append = tables.append
    for table in (schemas.DOCUMENT_KEYS, schemas.INSTANCES, schemas.REJECTS):

        def die_behind(frame: Any, uri: str, written: schemas.Table, *rest: Any, at: str = table.name) -> None:
            append(frame, uri, written, *rest)
            if written.name == at:
                raise KeyError("killed behind a table")

        with monkeypatch.context() as patched:
            patched.setattr(batches.tables, "append", die_behind)
            with pytest.raises(Exception, match="killed behind"):
                run(spark, config)
    kept = ids(spark, config)
    # As the replay finds it, the file has lost, gained and moved documents.
    write(tmp_path / "in", "a.jsonl", [NEW[3], *reversed(FIRST[2:]), NEW[4]], 1e9)
    assert kept == ids(spark, undisturbed)
    run(spark, config)
    assert set(kept) < set(ids(spark, config))
    # The rows of the first run stay; of the changed file, only the new documents are added.
    assert occurrences(instances(spark, config)) == sorted(DISTINCT | {(row["id"], row["text"]) for row in NEW[3:5]})
    # The table knows documents that the new state store does not know.
    write(tmp_path / "in", "c.jsonl", [NEW[5], *FIRST[:3]], 2e9)
    assert run(spark, config).documents == len(DISTINCT) + 3


@pytest.mark.long
def test_what_was_taken_down_stays_away_without_moving_cuts(spark: Any, make: Make, tmp_path: Path) -> None:
    write(tmp_path / "in", "a.jsonl", FIRST, 1e9)
    config = make(str(tmp_path / "in"))
    run(spark, config)
    kept = {row.instance_id for row in instances(spark, config) if "d5" not in row.document_ids}
    take_down(spark, config, ["d5"], Takedown("test"))
    assert set(ids(spark, config)) == kept
    check_root(spark, config)
    # A copy comes in another file, and after that the checkpoint is lost.
    write(tmp_path / "in", "b.jsonl", SECOND, 2e9)
    run(spark, config)
    found = ids(spark, config)
    assert not any("d5" in row.document_ids for row in instances(spark, config))
    check_root(spark, config)
    shutil.rmtree(tmp_path / "root/_checkpoints")
    run(spark, config)
    assert ids(spark, config) == found
