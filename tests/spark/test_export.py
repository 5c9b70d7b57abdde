"""Exports are read back with `datasets`: every byte of the kept texts, in each format, and whole documents of them."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from delta.tables import DeltaTable

from jobs import cli, corpus_text, refine, session
from miniplm_udf import storage
from miniplm_udf.corpora import export_folder, takedown, versions
from miniplm_udf.corpora.export import ExportRequest, export
from miniplm_udf.corpora.file_writers import FORMATS
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.store import corpus_records
from miniplm_udf.task_progress import watched_tasks
from tests.support.score_tables import texts
from tests.support.takedown_roots import ASKED, TakedownRoot

CONF = Path(__file__).resolve().parents[2] / "conf"
DOCUMENTS = [
    *texts(9),
    'text 9 w "quoted" \\ and \\n, naïve 終 🙂\r\n\ttab \x1b[31m \u2028 \ufeff \x7f end',
    "text 10 w " + "終🙂 " * 300,
    "text 11 w ",
]


@pytest.fixture(scope="module")
def world(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> TakedownRoot:
    """A root whose corpus `kept` has every instance of the documents, several of which share instances."""
    made = TakedownRoot(spark, tmp_path_factory.mktemp("export"))
    made.deliver("first", DOCUMENTS)
    made.ingest()
    made.score()
    refine.run(spark, made.config)
    return made


def loaded(folder: Path, cache: Path) -> list[dict[str, Any]]:
    """Loads a folder with `datasets`, without any hint about the format."""
    import datasets

    return list(datasets.load_dataset(str(folder), split="train", cache_dir=str(cache)))


def documents_of(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Documents put together of the spans of the exported rows: each byte once, from the first on."""
    pieces: dict[str, dict[int, bytes]] = {}
    for row in rows:
        text = row["text"].encode()
        starts, ends = [0, *row["segment_ends"]], [*row["segment_ends"], len(text)]
        for number, (document, start, end) in enumerate(zip(row["document_ids"], starts, ends, strict=True)):
            pieces.setdefault(document, {})[0 if number else row["start_byte"]] = text[start:end]
    found = {}
    for document, of in pieces.items():
        whole = b""
        for start in sorted(of):
            assert start == len(whole), document
            whole += of[start]
        found[document] = whole
    return found


@pytest.mark.parametrize("to", FORMATS)
def test_every_byte_is_found_again(spark: Any, world: TakedownRoot, tmp_path: Path, to: str) -> None:
    out = tmp_path / "my exports" / "kept"
    made = dataclasses.asdict(export(spark, world.config, "kept", ExportRequest(to=to, out=str(out), rows_per_file=3)))
    rows = {row["instance_id"]: row for row in loaded(out, tmp_path / "cache")}

    instances = {row["instance_id"]: row.asDict() for row in world.rows("instances")}
    kept = {
        row["instance_id"]: row.asDict()
        for row in corpus_records.read_corpus(spark, world.config.root, "kept").collect()
    }
    assert len(rows) == len(kept) == len(instances) == made["n_instances"] > 3
    assert (made["to"], made["n_bytes"]) == (to, size_of(out))
    columns = list(made["columns"])
    assert {"score", "text", "metadata", "document_ids", "teacher_nll_mean", "reference_n_tokens"} <= set(columns)
    for name, row in rows.items():
        assert list(row) == columns
        expected = {**instances[name], **kept[name]}
        assert row == {column: expected[column] for column in columns}
        assert row["text"].encode() == instances[name]["text"].encode()
    originals = {text.split(" w")[0]: text.encode() for text in DOCUMENTS}
    assert documents_of(list(rows.values())) == originals

    manifest = json.loads((out / export_folder.MANIFEST).read_text())
    assert {**manifest, "path": storage.redact(storage.to_uri(str(out)))} == made
    known = corpus_records.show_corpus(spark, world.config.root, "kept")
    for key in ("version", "fingerprint", "n_instances", "n_tokens", "config", "threshold"):
        assert manifest[key] == known[key], key
    assert manifest["text_bytes"] == sum(map(len, originals.values()))
    assert manifest["model_revisions"] == known["inputs"]["model_revisions"]
    card = (out / "README.md").read_text()
    (entry,) = yaml.safe_load(card.split("---\n")[1])["configs"]
    assert entry == {"config_name": "default", "data_files": f"*.{to}"}
    files = {path.name: path.stat().st_size for path in out.glob(f"part-*.{to}")}
    assert {file["name"]: file["n_bytes"] for file in manifest["files"]} == files
    assert len(files) > 1
    assert sum(file["n_rows"] for file in manifest["files"]) == len(rows)
    assert {path.name for path in out.iterdir()} == {*files, export_folder.MANIFEST, "README.md"}
    assert [path.name for path in out.parent.iterdir()] == ["kept"]


@pytest.mark.parametrize("to", [to for to in FORMATS if to != "parquet"])
def test_json_lines_that_begin_with_nothing_are_loaded_with_their_types(
    world: TakedownRoot, spark: Any, tmp_path: Path, to: str
):
    """`datasets` alone would take a column of empty lists, or of nulls, for one that has no type."""
    out = tmp_path / "kept"
    export(spark, world.config, "kept", ExportRequest(to=to, out=str(out)))
    import datasets

    found = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache")).features
    assert found["metadata"].dtype == "string"
    assert found["segment_ends"].feature.dtype == "int32"
    assert found["ends_document"].dtype == "bool"


@pytest.fixture
def copy(world: TakedownRoot, tmp_path: Path) -> TakedownRoot:
    """The same root again, for one test."""
    copied = TakedownRoot.__new__(TakedownRoot)
    copied.spark, copied.folder = world.spark, tmp_path
    shutil.copytree(storage.local_path(world.config.root), tmp_path / "root")
    copied.config = dataclasses.replace(world.config, root=str(tmp_path / "root"))
    return copied


def test_another_format_replaces_an_export(spark: Any, world: TakedownRoot, tmp_path: Path) -> None:
    out = tmp_path / "kept"
    for to in ("jsonl.gz", "jsonl"):
        export(spark, world.config, "kept", ExportRequest(to=to, out=str(out), overwrite=True))
    assert [path.name.split(".", 1)[1] for path in out.glob("part-*")] == ["jsonl"]
    assert len(loaded(out, tmp_path / "cache")) == len(world.rows("instances"))


@pytest.mark.long
def test_what_is_refused_leaves_all_as_it_was(spark: Any, copy: TakedownRoot, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "photo").write_text("")
    with pytest.raises(ConfigError, match="never overwritten"):
        export(spark, copy.config, "kept", ExportRequest(out=str(theirs), overwrite=True))
    assert [path.name for path in theirs.iterdir()] == ["photo"]
    out = ExportRequest(out=str(tmp_path / "out"))
    with pytest.raises(CorpusError, match="one of the corpora"):
        export(spark, copy.config, "nobody", out)
    # Rows that are not what was recorded of them.
    pin = versions.pin(spark, copy.config.root, "kept", "changed")
    pinned = DeltaTable.forPath(spark, copy.config.layout.pinned("kept", pin.version))
    pinned.update(set={"score": "score + 1"})
    with pytest.raises(CorpusError, match="expected rows of the fingerprint"):
        export(spark, copy.config, "kept@changed", out)
    # Rows whose instances are not there.
    DeltaTable.forPath(spark, copy.config.layout.table("instances")).delete("ordinal = 0")
    with pytest.raises(CorpusError, match=rf"kept@{pin.version}: expected its {pin.n_instances} instances"):
        export(spark, copy.config, "kept", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "theirs"]


@pytest.mark.long
def test_an_export_of_a_pinned_version_is_without_what_was_taken_down(
    spark: Any, copy: TakedownRoot, tmp_path: Path
) -> None:
    made = versions.pin(spark, copy.config.root, "kept", "all")
    first = export(spark, copy.config, "kept@all", ExportRequest(to="parquet"))
    assert first.path == f"{copy.config.root}/exports/kept-{made.version}.parquet"
    found = takedown.take_down(spark, copy.config, ["text 3"], ASKED)
    assert found.exports == [f"kept-{made.version}.parquet"]
    assert f"(not changed): kept-{made.version}.parquet" in corpus_text.taken_down(found)
    with pytest.raises(ConfigError, match=rf"an export of kept@{made.version}; choose another folder, or --overwrite"):
        export(spark, copy.config, "kept@all", ExportRequest(to="parquet"))
    again = export(spark, copy.config, "kept@all", ExportRequest(to="parquet", overwrite=True))
    assert (again.version, again.n_instances) == (made.version, first.n_instances - found.instances)
    rows = spark.read.parquet(f"{again.path}/*.parquet").collect()
    assert len(rows) == again.n_instances
    assert "text 3" not in {document for row in rows for document in row["document_ids"]}


def test_the_command_writes_says_so_and_refuses(
    spark: Any, world: TakedownRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spark, "stop", lambda: None)
    monkeypatch.setattr(session, "make_session", lambda config, name: spark)
    given = ["kept", "-c", str(CONF / "demo.yaml"), f"root={world.config.root}", "--to", "jsonl.zst"]
    assert cli.main(["export", *given, "--out", str(tmp_path / "out")]) == 0
    written = capsys.readouterr()
    n_rows = len(world.rows("refined/kept"))
    assert written.out.startswith(f"kept@1: {n_rows} instances, ")
    assert written.out.endswith(
        f"as 1 files of {size_of(tmp_path / 'out'):,} bytes (jsonl.zst) in file://{tmp_path}/out\n"
    )
    assert cli.main(["export", *given, "--out", str(tmp_path / "out")]) == 2
    refused = capsys.readouterr()
    assert refused.out == ""
    assert "ConfigError: --out: expected nothing at" in refused.err


def test_tasks_at_work_are_told_of(spark: Any, caplog: pytest.LogCaptureFixture) -> None:
    def slow(batches: Any) -> Any:
        import time

        time.sleep(0.5)
        yield from batches

    with caplog.at_level("INFO", logger="miniplm"), watched_tasks(spark, "the work", every_seconds=0.05):
        assert len(spark.range(0, 4, 1, 4).mapInArrow(slow, "id bigint").collect()) == 4
    assert re.search(r"the work: \d of 4 Spark tasks", caplog.text)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("part-*"))
