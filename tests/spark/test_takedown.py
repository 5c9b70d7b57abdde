"""Documents are taken down from every table and from the disk, and do not come back; what is left still adds up."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs import corpus, corpus_text, ingest, refine, score
from miniplm_udf import corpora, pins, removals, storage, tables
from miniplm_udf.config import (
    ChunkingConfig,
    CorpusConfig,
    IngestConfig,
    PackConfig,
    SelectConfig,
    SplitConfig,
    TokenizerConfig,
)
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.pack import pack_corpus
from miniplm_udf.removals import Takedown
from miniplm_udf.streams.lease import Lease, lease_uri
from miniplm_udf.upkeep import takedown, verify, versions
from tests.spark.score_tables import FakeFactory, experiment, texts, two_models

ASKED = Takedown("a test", "a court says so")


class World:
    """A root that went through ingest (packed: instances of several documents), score, refine, pin and pack."""

    def __init__(self, spark: Any, folder: Path) -> None:
        self.spark, self.folder = spark, folder
        everything = CorpusConfig(where="true", select=SelectConfig(ratio=1.0))
        self.config = dataclasses.replace(
            experiment(folder / "root", two_models(folder), {"kept": everything}),
            ingest=IngestConfig(
                input=f"{folder}/*.jsonl", chunking=ChunkingConfig(mode="packed", max_tokens=700),
                split=SplitConfig(reference=0, heldout=0), state_partitions=1,
            ),
            tokenizers={"bpe": TokenizerConfig(vocab_size=300)},
            pack=PackConfig(sequence_length=16),
        )  # fmt: skip

    def deliver(self, name: str, documents: list[str]) -> None:
        rows = [{"id": text.split(" w")[0], "text": text} for text in documents]
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def ingest(self) -> dict[str, Any]:
        return ingest.run(self.spark, self.config)

    def score(self) -> dict[str, Any]:
        log = str(self.folder / "calls.log")
        factories = {"teacher": FakeFactory(1.0, log), "reference": FakeFactory(2.0, log)}
        return score.run(self.spark, self.config, factories)

    def rows(self, name: str) -> list[Any]:
        return list(tables.read(self.spark, self.config.table_uri(name)).collect())

    def documents(self) -> set[str]:
        return {one for row in self.rows("instances") for one in row["document_ids"]}

    def wrong(self) -> list[verify.Check]:
        return [check for check in verify.verify(self.spark, self.config.root) if not check.ok or check.behind]

    def on_disk(self, name: str) -> list[dict[str, Any]]:
        """The rows of all files of a table, whatever its newest version has."""
        folder = Path(storage.local_path(self.config.table_uri(name)))
        found = [row for path in folder.rglob("*.parquet") if "_delta_log" not in path.parts for row in _rows(path)]
        return found


def _rows(path: Path) -> list[dict[str, Any]]:
    return list(pq.ParquetFile(path).read().to_pylist())


@pytest.fixture(scope="module")
def made(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(spark, tmp_path_factory.mktemp("takedown"))
    world.deliver("first", texts(12))
    world.ingest()
    world.score()
    refine.run(spark, world.config)
    versions.pin(spark, world.config.root, "kept", "all")
    packed = pack_corpus(spark, world.config, "kept", "bpe")
    training = {"packed_uri": storage.redact(packed["path"])}
    storage.write_json(world.config.model_uri("student/training.json"), training)
    assert max(len(row["document_ids"]) for row in world.rows("instances")) > 1
    return world


@pytest.fixture
def world(made: World, tmp_path: Path) -> World:
    """The same root again, under the same inputs, for one test."""
    found = World.__new__(World)
    found.spark, found.folder = made.spark, tmp_path
    shutil.copytree(storage.local_path(made.config.root), tmp_path / "root")
    for path in made.folder.glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    ingesting = dataclasses.replace(made.config.ingest, input=f"{tmp_path}/*.jsonl")
    found.config = dataclasses.replace(made.config, root=str(tmp_path / "root"), ingest=ingesting)
    return found


def test_it_goes_from_every_table_and_from_the_disk(spark: Any, world: World) -> None:
    config = world.config
    holding = [row for row in world.rows("instances") if "text 3" in row["document_ids"]]
    gone = {row["instance_id"] for row in holding}
    looked = takedown.look(spark, config.root, ["text 3", "nobody's"])
    assert looked["instances"] == len(gone)
    assert looked["not_found"] == ["nobody's"]
    assert looked["other_documents"] == len({one for row in holding for one in row["document_ids"]}) - 1 > 0
    before = len(world.rows("refined/kept"))

    found = takedown.take_down(spark, config, ["text 3", "nobody's"], ASKED)
    by_table = {name: len(gone) for name in ("instances", "score_matrix", "refined/kept", "pinned/kept/1")}
    by_table |= {"scores": 2 * len(gone), "packed/kept/bpe": found["removed"]["packed/kept/bpe"]}
    assert found["removed"] == by_table
    assert found["students"] == ["student"]
    assert "not changed: student" in corpus_text.taken_down(found)

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

    newest = corpora.newest(spark, corpora.corpus_uri(config.root, "kept"))
    assert newest is not None
    assert newest.provenance is not None
    assert newest.provenance.n_instances == before - len(gone)
    assert newest.provenance.derived == {"by": "take-down", "from_version": 1, "takedown_id": ASKED.id}
    assert world.wrong() == []
    # The pinned version stays one; it and what is made of it are without the rows.
    (pin,) = pins.find(spark, config.root)
    assert pin.n_instances == before - len(gone)
    refine.run(spark, config)
    versions.restore(spark, config, "kept@all")
    packed = pack_corpus(spark, config, "kept", "bpe")
    assert (packed["n_instances"], packed["skipped"]) == (before - len(gone), False)
    assert world.wrong() == []
    again = takedown.take_down(spark, config, ["text 3"], Takedown("another"))
    assert again["removed"] == {}
    assert world.wrong() == []


@pytest.mark.slow
def test_it_does_not_come_back(spark: Any, world: World) -> None:
    config = world.config
    takedown.take_down(spark, config, ["text 5"], ASKED)
    before = world.documents()
    # The same file under another name: nothing of it is new to the query, which knows its instances.
    shutil.copy(world.folder / "first.jsonl", world.folder / "again.jsonl")
    again = world.ingest()
    assert (again["new_instances"], world.documents()) == (0, before)
    assert world.wrong() == []
    # Its checkpoint is lost: the record alone knows; and a document that has never been there was asked for, too.
    shutil.rmtree(storage.local_path(config.checkpoint_uri("ingest-jsonl")))
    takedown.take_down(spark, config, ["text 20"], ASKED)
    world.deliver("new", texts(1, start=20))
    found = world.ingest()
    assert (found["new_instances"], world.documents()) == (0, before)
    rejected = [row for row in world.rows("rejects") if row["reason"] == "taken_down"]
    assert len(rejected) == found["new_rejected"] + again["new_rejected"] >= 2
    assert all(row["raw"] is None and row["instance_id"] is None for row in rejected)
    assert {row["detail"].split(": ")[1] for row in rejected} == {"text 5", "text 20"}
    assert set(world.score()["new_scored"].values()) == {0}
    assert world.wrong() == []


@pytest.mark.slow
def test_a_query_that_is_behind_begins_anew_without_it(spark: Any, world: World) -> None:
    config = world.config
    world.deliver("more", texts(16, start=12))
    world.ingest()
    found = takedown.take_down(spark, config, ["text 13"], ASKED)
    (begun_anew,) = found["begun_anew"]
    assert begun_anew.startswith("score-")
    scored = {row["instance_id"] for row in world.rows("scores")}
    world.score()
    assert world.wrong() == []
    new = {row["instance_id"] for row in world.rows("scores")} - scored
    assert new == {row["instance_id"] for row in world.rows("instances")} - scored
    assert len(new) > 0
    # One that has read all goes on, past the commit that removes rows.
    assert takedown.take_down(spark, config, ["text 26"], ASKED)["begun_anew"] == []
    world.deliver("last", texts(2, start=30))
    world.ingest()
    world.score()
    assert world.wrong() == []
    assert {"text 30", "text 31"} <= world.documents()
    assert {"text 13", "text 26"}.isdisjoint(world.documents())


@pytest.mark.slow
def test_one_that_was_killed_is_finished(spark: Any, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert set(found["removed"]) == {"scores", "instances"}
    assert "text 7" not in world.documents()
    assert world.wrong() == []


def test_what_is_refused(spark: Any, world: World, tmp_path: Path) -> None:
    with Lease(lease_uri(world.config.root, "ingest"), "ingest"), pytest.raises(CorpusError, match="run by process"):
        takedown.take_down(spark, world.config, ["text 1"], ASKED)
    assert removals.document_ids(spark, world.config.root) == []
    for ids in ([], [""]):
        with pytest.raises(ConfigError, match="expected ids of documents"):
            takedown.look(spark, world.config.root, ids)
    with pytest.raises(ConfigError, match="--ids-from"):
        corpus._ids_of(str(tmp_path / "nowhere"))
    (tmp_path / "ids").write_text("text 1\n\ntext 2\n")
    assert corpus._ids_of(str(tmp_path / "ids")) == ["text 1", "text 2"]
