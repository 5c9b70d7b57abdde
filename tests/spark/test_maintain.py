"""Maintenance: pinned versions outlive every retention, queries find what they have not read, the rest goes."""

import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs import maintain as job
from jobs import refine
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig, SelectConfig
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.corpora import listing, versions
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.lease import Lease
from miniplm_udf.store import corpus_records, tables
from miniplm_udf.store.delta_files import parquet_files
from miniplm_udf.upkeep import checks, maintain, verify_versions
from tests.support.matrices import ALIASES, DIFFERENCE, matrix_rows, with_corpora, write_matrix, write_record
from tests.support.model_records import write_training
from tests.support.score_tables import experiment, texts, write_instances

YEARS = 11 * 365 * 86400
CORPUS = CorpusConfig(score=DIFFERENCE, select=SelectConfig(ratio=0.5))


def files(uri: str) -> int:
    return len(list(Path(storage.local_path(uri)).glob("*.parquet")))


def done(found: maintain.Maintained, table: str) -> maintain.MaintainedTable:
    return next(one for one in found.tables if one.table == table)


def rewrite(spark: Any, config: ExperimentConfig, times: int) -> None:
    """New versions of the corpus, with another row less each."""
    uri = config.layout.refined("kept")
    for _ in range(times):
        newest = corpus_records.newest(uri)
        assert newest is not None
        assert newest.provenance is not None
        rows = tables.read(spark, uri)
        rows = rows.where(f"instance_id > '{rows.selectExpr('min(instance_id)').collect()[0][0]}'")
        found = versions.recounted(newest.provenance, rows)
        versions.commit_derived(spark, config, rows, found, newest, {"by": "restore", "from_version": 1})


@pytest.mark.long
def test_a_pinned_version_outlives_every_retention(spark: Any, tmp_path: Path) -> None:
    models = {alias: ModelConfig(path="/nowhere") for alias in ALIASES}
    config = with_corpora(experiment(tmp_path / "root", models), kept=CORPUS)
    write_matrix(spark, config, matrix_rows(60))
    for alias in ALIASES:
        write_record(config, alias)
    first = refine.run(spark, config).refined["kept"].version
    before = corpus_records.read_corpus(spark, config.root, "kept").orderBy("instance_id").collect()
    versions.pin(spark, config.root, f"kept@{first}")
    uri = config.layout.refined("kept")
    spark.sql(f"ALTER TABLE delta.`{uri}` SET TBLPROPERTIES ('delta.checkpointInterval' = '3')")
    rewrite(spark, config, 2)
    lost = listing.listing(config.root)[1]["version"]
    # A version that a student was trained on; one that was not is to go.
    lineage = {"corpus": "kept", "refined_version": listing.listing(config.root)[2]["version"]}
    write_training(config, "student", lineage=lineage)
    rewrite(spark, config, 1)

    by_default = maintain.maintain(spark, config)
    assert (done(by_default, "refined/kept").n_removed, by_default.pinned) == (0, [])
    looked = maintain.maintain(spark, config, retain_hours=0, dry_run=True)
    assert corpus_records.read_corpus(spark, config.root, "kept", lost).count() == len(before) - 1
    found = maintain.maintain(spark, config, retain_hours=0)
    assert done(looked, "refined/kept").n_removed == done(found, "refined/kept").n_removed == 3
    assert looked.pinned == found.pinned == [f"kept@{lineage['refined_version']}"]
    assert "refined/kept" in job.text(found)
    assert files(uri) == 1

    log = Path(storage.local_path(uri)) / "_delta_log"
    for path in log.iterdir():
        # Each by as much: Delta's clean-up asks for times that rise with the versions.
        written = path.stat().st_mtime
        os.utime(path, (written - YEARS, written - YEARS))
    rewrite(spark, config, 6)
    assert not (log / f"{first:020}.json").exists(), "the log has ended since"
    maintain.maintain(spark, config, retain_hours=0)
    assert corpus_records.read_corpus(spark, config.root, "kept", first).orderBy("instance_id").collect() == before
    assert corpus_records.read_corpus(spark, config.root, "kept", lineage["refined_version"]).count() == len(before) - 2
    with pytest.raises(CorpusError, match="they are gone"):
        corpus_records.read_corpus(spark, config.root, "kept", lost)
    assert listing.show(config.root, f"kept@{lost}")["by_source"] is None
    at = checks.CheckedRoot(spark, config.root)
    checked = [*verify_versions.corpora_of(at), *verify_versions.pinned(at)]
    assert [check for check in checked if not check.ok] == []
    assert {check.note for check in checked} == {"", "removed by maintenance or a take-down"}
    # A version whose files are gone can be made again from its record, if it was refined in one pass.
    assert versions.rebuild(spark, config, f"kept@{first}", dry_run=True).n_instances == len(before)


def read_stream(spark: Any, config: ExperimentConfig, name: str) -> list[str]:
    """Runs a stream over `instances` to the end of what is there; the texts that it gets."""
    seen: list[str] = []
    stream = spark.readStream.format("delta").option("skipChangeCommits", "true").load(config.layout.table("instances"))
    writer = stream.writeStream.foreachBatch(lambda batch, _: seen.extend(row["text"] for row in batch.collect()))
    writer = writer.option("checkpointLocation", config.layout.checkpoint(name))
    writer.trigger(availableNow=True).start().awaitTermination()
    return seen


def test_a_query_finds_what_it_has_not_read(spark: Any, tmp_path: Path) -> None:
    config = experiment(tmp_path / "root", {})
    uri = config.layout.table("instances")
    write_instances(spark, config, texts(3))
    write_instances(spark, config, texts(3, start=3), batch_id=1)
    assert len(read_stream(spark, config, "score-one")) == 6
    for batch_id in (2, 3):
        write_instances(spark, config, texts(3, start=3 * batch_id), batch_id=batch_id)
    n_small = files(uri)
    found = maintain.maintain(spark, config, retain_hours=0)
    assert done(found, "instances").is_merged
    assert "score-one" in done(found, "instances").note
    # All small files were merged to one, and are there still.
    assert len(tables.read(spark, uri).inputFiles()) == 1
    assert files(uri) == n_small + 1
    assert sorted(read_stream(spark, config, "score-one")) == sorted(texts(6, start=6))
    found = maintain.maintain(spark, config, retain_hours=0)
    assert (done(found, "instances").n_removed, files(uri)) == (n_small, 1)
    assert done(found, "instances").note == ""

    # An abandoned query that is behind does not hold back the maintenance for ever.
    write_instances(spark, config, texts(2, start=12), batch_id=4)
    status = Path(storage.local_path(config.root)) / "_status/score-two.json"
    storage.write_json(str(status), {"query": "score", "lease": "score-two", "run_id": "r"})
    assert maintain.maintain(spark, config, dry_run=True, abandoned_days=0).forgotten == [
        "score-one",
        "status of score-two",
    ]
    assert maintain.maintain(spark, config).forgotten == ["status of score-two"]
    assert maintain.maintain(spark, config, abandoned_days=0).forgotten == ["score-one"]
    assert not status.exists()
    assert len(read_stream(spark, config, "score-one")) == 14


def test_who_writes_is_not_disturbed(spark: Any, tmp_path: Path) -> None:
    config = experiment(tmp_path / "root", {})
    for batch_id in range(2):
        write_instances(spark, config, texts(1, start=batch_id), batch_id=batch_id)
    n_small = files(config.layout.table("instances"))
    with Lease(config.layout.lease("ingest"), "ingest"):
        found = done(maintain.maintain(spark, config), "instances")
        assert (found.is_merged, found.note) == (False, "not merged: a query writes it")
        with pytest.raises(CorpusError, match="run by process"):
            maintain.maintain(spark, config, retain_hours=1)
    assert files(config.layout.table("instances")) == n_small
    with pytest.raises(ConfigError, match="at least 0"):
        maintain.maintain(spark, config, retain_hours=-1)


@pytest.mark.long
def test_a_table_whose_files_do_not_show_its_rows_is_rewritten(spark: Any, tmp_path: Path) -> None:
    """Columns of another type and of another name, and a removed row; afterwards the files are the table."""
    config = experiment(tmp_path / "root", {})
    uri = config.layout.refined("kept")
    spark.range(6).selectExpr("id", "cast(id AS int) AS n").coalesce(1).write.format("delta").save(uri)
    features = ("enableTypeWidening' = 'true", "enableDeletionVectors' = 'true", "columnMapping.mode' = 'name")
    for change in (
        *(f"SET TBLPROPERTIES ('delta.{feature}')" for feature in features),
        "ALTER COLUMN n TYPE bigint",
        "RENAME COLUMN n TO m",
        "SET TBLPROPERTIES ('delta.enableTypeWidening' = 'false')",
    ):
        spark.sql(f"ALTER TABLE delta.`{uri}` {change}")
    spark.sql(f"DELETE FROM delta.`{uri}` WHERE id = 3")
    with pytest.raises(CorpusError, match=r"column mapping \(name\).*type widening.*miniplm maintain"):
        parquet_files(uri)
    assert "rewritten for readers of files" in str(done(maintain.maintain(spark, config), "refined/kept").note)
    rows = [row for file in parquet_files(uri) for row in pq.read_table(file).to_pylist()]
    assert sorted(rows, key=lambda row: row["id"]) == [{"id": i, "m": i} for i in (0, 1, 2, 4, 5)]
    assert {str(pq.read_schema(file).field("m").type) for file in parquet_files(uri)} == {"int64"}
    assert "rewritten" not in str(done(maintain.maintain(spark, config), "refined/kept").note)
