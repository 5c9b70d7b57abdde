"""Documents are taken down from every table and from the disk, and do not come back; what is left still adds up."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs import corpus, corpus_text, refine
from miniplm_udf import schemas, storage
from miniplm_udf.corpora import takedown, versions
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.lease import Lease
from miniplm_udf.packing.corpus import pack_corpus
from miniplm_udf.store import corpus_records, pins, tables, takedowns
from miniplm_udf.store.delta_files import parquet_files
from miniplm_udf.store.takedowns import Takedown
from tests.support.model_records import write_training
from tests.support.score_tables import experiment, texts, write_instances
from tests.support.takedown_roots import ASKED, TakedownRoot, file_rows
from trainer.loader.data import open_delta


@pytest.fixture(scope="module")
def made(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> TakedownRoot:
    world = TakedownRoot(spark, tmp_path_factory.mktemp("takedown"))
    world.deliver("first", texts(12))
    world.ingest()
    world.score()
    refine.run(spark, world.config)
    versions.pin(spark, world.config.root, "kept", "all")
    packed = pack_corpus(spark, world.config, "kept", "bpe")
    write_training(world.config, "student", packed_uri=storage.redact(packed.path))
    assert max(len(row["document_ids"]) for row in world.rows("instances")) > 1
    return world


@pytest.fixture
def world(made: TakedownRoot, tmp_path: Path) -> TakedownRoot:
    """The same root again, under the same inputs, for one test."""
    copied = TakedownRoot.__new__(TakedownRoot)
    copied.spark, copied.folder = made.spark, tmp_path
    shutil.copytree(storage.local_path(made.config.root), tmp_path / "root")
    for path in made.folder.glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    ingesting = dataclasses.replace(made.config.ingest, input=f"{tmp_path}/*.jsonl")
    copied.config = dataclasses.replace(made.config, root=str(tmp_path / "root"), ingest=ingesting)
    return copied


def test_it_goes_from_every_table_and_from_the_disk(spark: Any, world: TakedownRoot) -> None:
    config = world.config
    holding = [row for row in world.rows("instances") if "text 3" in row["document_ids"]]
    gone = {row["instance_id"] for row in holding}
    counts = takedown.preview(spark, config.root, ["text 3", "nobody's"])
    assert counts.instances == len(gone)
    assert counts.not_found == ["nobody's"]
    assert counts.other_documents == len({one for row in holding for one in row["document_ids"]}) - 1 > 0
    before = len(world.rows("refined/kept"))

    found = takedown.take_down(spark, config, ["text 3", "nobody's"], ASKED)
    by_table = {name: len(gone) for name in ("instances", "score_matrix", "refined/kept", "pinned/kept/1")}
    by_table |= {"scores": 2 * len(gone), "packed/kept/bpe": found.removed["packed/kept/bpe"]}
    assert found.removed == by_table
    assert found.students == ["student"]
    assert "(not changed): student" in corpus_text.taken_down(found)

    for name in ("instances", "scores", "score_matrix", "refined/kept", "pinned/kept/1"):
        left = world.on_disk(name)
        assert left
        assert gone.isdisjoint(row["instance_id"] for row in left), name
    assert world.on_disk("packed/kept/bpe") == []
    assert "text 3" not in world.documents()
    record = [row for row in world.rows("takedowns") if row["table"] not in ("documents", "packed/kept/bpe")]
    assert {row["key"] for row in record} == gone
    assert {row["table"]: row["n_rows"] for row in world.rows("takedowns") if row["key"] == "nobody's"} == {
        "documents": 0
    }
    assert {(row["takedown_id"], row["reason"]) for row in world.rows("takedowns")} == {(ASKED.id, ASKED.reason)}

    newest = corpus_records.newest(config.layout.refined("kept"))
    assert newest is not None
    assert newest.provenance is not None
    assert newest.provenance.n_instances == before - len(gone)
    assert newest.provenance.derived == {"by": "take-down", "from_version": 1, "takedown_id": ASKED.id}
    assert world.wrong() == []
    (pin,) = pins.find(spark, config.root)
    assert pin.n_instances == before - len(gone)


@pytest.mark.long
def test_what_is_made_from_a_pinned_version_has_no_such_rows(spark: Any, world: TakedownRoot) -> None:
    config, before = world.config, len(world.rows("refined/kept"))
    n_gone = takedown.take_down(spark, config, ["text 3"], ASKED).removed["instances"]
    refine.run(spark, config)
    versions.restore(spark, config, "kept@all")
    packed = pack_corpus(spark, config, "kept", "bpe")
    assert (packed.n_instances, packed.skipped) == (before - n_gone, False)
    assert world.wrong() == []
    again = takedown.take_down(spark, config, ["text 3"], Takedown("another"))
    assert again.removed == {}
    assert world.wrong() == []


@pytest.mark.long
def test_it_does_not_come_back(spark: Any, world: TakedownRoot) -> None:
    config = world.config
    takedown.take_down(spark, config, ["text 5"], ASKED)
    before = world.documents()
    # The same file under another name: the query knows all its instances, so none is new.
    shutil.copy(world.folder / "first.jsonl", world.folder / "again.jsonl")
    again = world.ingest()
    assert (again.new_instances, world.documents()) == (0, before)
    assert world.wrong() == []
    # Its checkpoint is lost: the record alone knows; and a document that has never been there was asked for, too.
    shutil.rmtree(storage.local_path(config.layout.checkpoint("ingest-jsonl")))
    takedown.take_down(spark, config, ["text 20"], ASKED)
    world.deliver("new", texts(1, start=20))
    found = world.ingest()
    assert (found.new_instances, world.documents()) == (0, before)
    rejected = [row for row in world.rows("rejects") if row["reason"] == "taken_down"]
    assert len(rejected) == found.new_rejected + again.new_rejected >= 2
    assert all(row["raw"] is None and row["instance_id"] is None for row in rejected)
    assert {row["detail"].split(": ")[1] for row in rejected} == {"text 5", "text 20"}
    assert set(world.score().new_scored.values()) == {0}
    assert world.wrong() == []


FEATURES = {
    "enableDeletionVectors": "true", "columnMapping.mode": "name", "enableChangeDataFeed": "true",
    "enableRowTracking": "true", "checkpointPolicy": "v2", "enableTypeWidening": "true",
    "feature.deletionVectors": "supported",
}  # fmt: skip


def test_new_tables_have_no_feature_that_files_do_not_show(spark: Any, tmp_path: Path) -> None:
    config = experiment(tmp_path / "root", {})
    uri, prefix = config.layout.table("instances"), "spark.databricks.delta.properties.defaults."
    # As a property file sets them (sessions that are made later have them too), and as a session does.
    conf = spark.sparkContext._jsc.sc().conf()
    try:
        for key, value in FEATURES.items():
            conf.set(prefix + key, value)
            spark.conf.set(prefix + key, value)
        write_instances(spark, config, texts(3))
        made = tables.detail(spark, uri)
        other = dataclasses.replace(schemas.CORPORA, statistics=("name",))
        frame = spark.createDataFrame([], other.spark_schema())
        tables.overwrite(frame, uri, other)
        replaced = tables.detail(spark, uri)
    finally:
        for key in FEATURES:
            conf.remove(prefix + key)
            spark.conf.unset(prefix + key)
    for found in (made, replaced):
        assert found is not None
        assert set(found["tableFeatures"]) <= {"appendOnly", "invariants"}
        assert found["properties"]["delta.enableDeletionVectors"] == "false"


@pytest.mark.long
def test_it_goes_from_the_files_of_tables_with_deletion_vectors(spark: Any, world: TakedownRoot) -> None:
    config, features = world.config, ("instances", "scores", "score_matrix", "refined/kept", "pinned/kept/1")
    for name in features:
        on = "'delta.enableDeletionVectors' = 'true', 'delta.enableChangeDataFeed' = 'true'"
        spark.sql(f"ALTER TABLE delta.`{config.layout.table(name)}` SET TBLPROPERTIES ({on})")
    gone = {row["instance_id"] for row in world.rows("instances") if "text 3" in row["document_ids"]}
    # As somebody did who knew of no take-down: the row is hidden, and its text is in the file.
    spark.sql(f"DELETE FROM delta.`{config.layout.table('scores')}` WHERE instance_id = '{min(gone)}'")
    assert gone & {row["instance_id"] for row in world.on_disk("scores")} == gone
    with pytest.raises(CorpusError, match=r"deletion vectors.*miniplm maintain"):
        open_delta(config.layout.table("scores"), None, "score")
    old = [path.read_bytes() for path in Path(storage.local_path(config.layout.table("instances"))).glob("*.parquet")]

    takedown.take_down(spark, config, ["text 3"], ASKED)
    for name in features:
        left = world.on_disk(name)
        assert left
        assert gone.isdisjoint(row["instance_id"] for row in left), name
        files = parquet_files(config.layout.table(name))
        assert sorted(row["instance_id"] for path in files for row in file_rows(Path(path))) == sorted(
            row["instance_id"] for row in world.rows(name)
        )
    assert not any("text 3 " in row["text"] for row in world.on_disk("instances"))
    assert world.wrong() == []

    # A file that no table lists, and one of a change feed.
    for number, folder in enumerate(("instances", "instances/_change_data")):
        place = Path(storage.local_path(config.layout.table(folder)))
        place.mkdir(exist_ok=True)
        for content in old:
            (place / f"old-{number}.parquet").write_bytes(content)
    assert {check.name.split(":")[0] for check in world.wrong()} == {
        "tables/instances", "tables/instances/_change_data"
    }  # fmt: skip


@pytest.mark.long
def test_a_query_that_is_behind_begins_again_without_it(spark: Any, world: TakedownRoot) -> None:
    config = world.config
    world.deliver("more", texts(16, start=12))
    world.ingest()
    found = takedown.take_down(spark, config, ["text 13"], ASKED)
    (begun_anew,) = found.begun_anew
    assert begun_anew.startswith("score-")
    scored = {row["instance_id"] for row in world.rows("scores")}
    world.score()
    assert world.wrong() == []
    new = {row["instance_id"] for row in world.rows("scores")} - scored
    assert new == {row["instance_id"] for row in world.rows("instances")} - scored
    assert len(new) > 0
    # A query that has read everything continues, past the commit that removes rows.
    assert takedown.take_down(spark, config, ["text 26"], ASKED).begun_anew == []
    world.deliver("last", texts(2, start=30))
    world.ingest()
    world.score()
    assert world.wrong() == []
    assert {"text 30", "text 31"} <= world.documents()
    assert {"text 13", "text 26"}.isdisjoint(world.documents())


@pytest.mark.long
def test_one_that_was_killed_is_finished(spark: Any, world: TakedownRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    delete = tables.delete_matching

    def killed(spark: Any, uri: str, *arguments: Any) -> None:
        if uri.endswith("/scores"):
            raise KeyboardInterrupt
        delete(spark, uri, *arguments)

    monkeypatch.setattr(tables, "delete_matching", killed)
    with pytest.raises(KeyboardInterrupt):
        takedown.take_down(spark, world.config, ["text 7"], ASKED)
    assert "text 7" in world.documents()
    assert {check.name.split(":")[0] for check in world.wrong()} >= {"instances", "scores"}
    monkeypatch.undo()
    found = takedown.take_down(spark, world.config, ["text 7"], Takedown("again"))
    assert set(found.removed) == {"scores", "instances"}
    assert "text 7" not in world.documents()
    assert world.wrong() == []


def test_what_is_refused(spark: Any, world: TakedownRoot, tmp_path: Path) -> None:
    with Lease(world.config.layout.lease("ingest"), "ingest"), pytest.raises(CorpusError, match="run by process"):
        takedown.take_down(spark, world.config, ["text 1"], ASKED)
    assert takedowns.document_ids(spark, world.config.root) == []
    for ids in ([], [""]):
        with pytest.raises(ConfigError, match="expected ids of documents"):
            takedown.preview(spark, world.config.root, ids)
    with pytest.raises(ConfigError, match="--ids-from"):
        corpus._read_ids(str(tmp_path / "nowhere"))
    (tmp_path / "ids").write_text("text 1\n\ntext 2\n")
    assert corpus._read_ids(str(tmp_path / "ids")) == ["text 1", "text 2"]
