"""Ingest on a real session: formats, repeated delivery, bad input, lost checkpoints. One tiny byte-level tokenizer."""

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from jobs.ingest import run
from jobs.stage_runner import execute
from jobs.stages import stage_named
from miniplm_udf import schemas
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import FieldsConfig, ModelConfig, SplitConfig
from miniplm_udf.errors import ConfigError, CorpusError, ModelLoadError
from miniplm_udf.ingestion import query as ingest_query
from miniplm_udf.store import delta_log, tables
from tests.support.ingest_roots import ROWS, SENTENCE, Make, documents, instances, jsonl, rejects


def test_formats_and_redelivery(spark: Any, make: Make, tmp_path: Path) -> None:
    """Every format gives the same instances, packed; slices join to the documents; what comes twice changes nothing."""
    folder = tmp_path / "in put"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl(ROWS))
    (folder / "README.md").write_text("not a corpus")
    config = make(str(folder))
    first = run(spark, config)
    rows = instances(spark, config)
    assert first.instances == first.new_instances == len(rows) == len({row.instance_id for row in rows})
    assert sum(first.by_split.values()) == len(rows)
    assert min(first.by_split.values()) > 0
    assert first.rejected == 0
    assert first.documents == len(ROWS)
    assert delta_log.newest_version(config.layout.table("rejects")) == 0, "no empty commit"
    assert first.files == 1
    assert not first.too_many_rejects
    assert documents(rows) == {row["id"]: row["text"] for row in ROWS}
    assert {row.source for row in rows} == {"s0", "s1"}
    for row in rows:
        assert row.n_bytes == len(row.text.encode())
        assert row.starts_document == (row.start_byte == 0)
        assert not row.text.startswith("<|endoftext|>")
    schema = tables.read(spark, config.layout.table("instances")).schema
    assert {field.name: field.nullable for field in schema} == {c.name: c.nullable for c in schemas.INSTANCES.columns}

    # The same lines under other names and in other clothes: no new row. A new file: its rows alone.
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS)))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(jsonl(ROWS)))
    os.utime(folder / "a.jsonl", (2e9, 2e9))
    version = delta_log.newest_version(config.layout.table("instances"))
    second = run(spark, config)
    assert (second.instances, second.new_instances) == (first.instances, 0)
    assert delta_log.newest_version(config.layout.table("instances")) == version
    new = [{"id": "new", "text": "A new one."}]
    (folder / "d.jsonl").write_bytes(jsonl(new))
    os.utime(folder / "d.jsonl", (1e9, 1e9))  # years older than the others: still taken
    third = run(spark, config)
    assert third.new_instances == 1
    assert third.files == 4
    added = [row for row in instances(spark, config) if row.document_ids == ["new"]]
    assert [(row.text, row.source) for row in added] == [("A new one.", "unknown")]

    # A lost checkpoint: everything is read again, nothing is added.
    shutil.rmtree(tmp_path / "root/_checkpoints")
    again = run(spark, config)
    assert again.new_instances == 0
    assert len(instances(spark, config)) == third.instances


@pytest.mark.long
def test_a_file_that_changes_between_a_batch_and_its_replay(
    spark: Any, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each document of both states of the file is there once, also the documents that come again."""
    folder = tmp_path / "input"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl(ROWS[:6]))
    config = make(str(folder), mode="document", max_tokens=4096)
    write = ingest_query.write_batch

    def die_behind(*arguments: Any) -> None:
        write(*arguments)
        raise KeyError("killed between the tables and the checkpoint")

    with monkeypatch.context() as patched:
        patched.setattr(ingest_query, "write_batch", die_behind)
        with pytest.raises(Exception, match="killed between"):
            run(spark, config)
    (folder / "a.jsonl").write_bytes(jsonl(ROWS[3:9]))
    assert run(spark, config).documents == 9
    (folder / "b.jsonl").write_bytes(jsonl(ROWS[:12]))
    assert run(spark, config).new_instances == 3
    (folder / "c.jsonl").write_bytes(jsonl(ROWS[:12]))
    assert run(spark, config).new_instances == 0
    found = [document for row in instances(spark, config) for document in row.document_ids]
    assert sorted(found) == sorted(str(row["id"]) for row in ROWS[:12])


@pytest.mark.long
def test_parquet_and_delta_equal_jsonl(spark: Any, make: Make, tmp_path: Path) -> None:
    """The same rows from a Parquet file, a Delta table and JSON lines give the same ids, with mapped fields."""
    fields = FieldsConfig(id="key", text="body", source="source", metadata=["lang"])
    renamed = [{"key": i, "body": row["text"], "source": row["source"], "lang": "en"} for i, row in enumerate(ROWS)]
    (tmp_path / "rows.jsonl").write_bytes(jsonl(renamed))
    pq.write_table(pa.Table.from_pylist(renamed), tmp_path / "rows.parquet")
    spark.read.parquet(str(tmp_path / "rows.parquet")).coalesce(1).write.format("delta").save(str(tmp_path / "table"))
    found = {}
    for kind, path in (("jsonl", "rows.jsonl"), ("parquet", "rows.parquet"), ("delta", "table")):
        config = make(str(tmp_path / path), root=kind, fields=fields)
        run(spark, config)
        found[kind] = [(row.instance_id, row.stream_id, row.text, row.document_ids) for row in instances(spark, config)]
        metadata = [json.loads(row.metadata) for row in instances(spark, config)]
        assert all(entry == {"lang": "en"} for entries in metadata for entry in entries)
    assert len(found["jsonl"]) > 20
    assert found["jsonl"] == found["parquet"] == found["delta"]

    # Another format in a root that has its rows already: a source of its own, and no new row.
    for path in ("table", "rows.parquet"):
        moved = run(spark, make(str(tmp_path / path), root="jsonl", fields=fields))
        assert (moved.instances, moved.new_instances) == (len(found["jsonl"]), 0)

    # The table is made again under its query, with one document more; it has as many versions as before.
    shutil.rmtree(tmp_path / "table")
    pq.write_table(pa.Table.from_pylist([*renamed, {**renamed[0], "key": 99}]), tmp_path / "more.parquet")
    spark.read.parquet(str(tmp_path / "more.parquet")).coalesce(1).write.format("delta").save(str(tmp_path / "table"))
    with pytest.raises(
        ConfigError, match=r"^ingest\.input: .* made again.* remove .*/_checkpoints/ingest-delta and run"
    ):
        execute(stage_named("ingest"), spark, config)
    shutil.rmtree(tmp_path / "delta" / "_checkpoints" / "ingest-delta")
    assert execute(stage_named("ingest"), spark, config).new_documents == 1


def test_splits_of_a_file_do_not_depend_on_the_batch(spark: Any, make: Make, tmp_path: Path) -> None:
    """Small input splits: the same ids whether a file comes alone or with others; every text is there once."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(jsonl(ROWS))
    alone = make(str(tmp_path / "in/a.jsonl"), root="alone", split_bytes=1024)
    run(spark, alone)
    for i in range(3):
        (tmp_path / f"in/{i}.jsonl").write_bytes(jsonl([{"id": f"x{i}", "text": f"Other text {i}."}]))
    beside = make(str(tmp_path / "in/*.jsonl"), root="beside", split_bytes=1024)
    run(spark, beside)
    ids = {row.instance_id for row in instances(spark, alone)}
    assert len({row.stream_id for row in instances(spark, alone)}) > 6  # more than one split's
    assert ids < {row.instance_id for row in instances(spark, beside)}
    assert documents(instances(spark, alone)) == {row["id"]: row["text"] for row in ROWS}


def test_bad_rows_and_files_become_rejects(spark: Any, make: Make, tmp_path: Path) -> None:
    """Bad lines and unreadable files are rejects with their reasons; every good line of these files is there, once."""
    folder = tmp_path / "in"
    folder.mkdir()
    bad = {
        b'{"id": "1", "text": "caf\xe9"}': "invalid_utf8",
        b'{"id": "2", "text": "lone \\ud800"}': "invalid_utf8",
        b'{"id": "3", "text": "a\0b"}': "nul_byte",
        b'{"id": "4", "text": "a\\u0000b"}': "nul_byte",
        b'{"id": "5", "text": ': "invalid_json",
        b"[" * 100_000: "invalid_json",
        b'["text"]': "not_an_object",
        b'{"id": "6"}': "missing_text",
        b'{"id": "7", "text": null}': "missing_text",
        b'{"id": "8", "text": 8}': "text_not_string",
        b'{"id": "9", "text": ""}': "empty_text",
    }
    good = [
        {"id": "same", "text": "Same id."},
        {"id": "same", "text": "Same id."},
        {"id": "same", "text": "Other text."},
    ]
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(good) + b"\n" + b"\n".join([*bad, b'["text"]']) + b"\n")
    whole = gzip.compress(jsonl([{"id": f"g{i}", "text": os.urandom(40).hex()} for i in range(2000)]))
    (folder / "cut one.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    packed = zstandard.compress(jsonl([{"id": f"z{i}", "text": os.urandom(40).hex()} for i in range(2000)]))
    (folder / "cut.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    config = make(str(folder), mode="document", split=SplitConfig(reference=0, heldout=0))
    summary = run(spark, config)
    assert sorted((row.document_ids[0], row.text) for row in instances(spark, config)) == [
        ("same", "Other text."),
        ("same", "Same id."),
    ]
    found = rejects(spark, config)
    lines = {bytes(row.raw): row.reason for row in found if row.raw is not None}
    assert lines == {line[:4096]: reason for line, reason in bad.items()}
    assert max(row.n_bytes for row in found if row.raw is not None) == 100_000
    unreadable = [row for row in found if row.reason == "unreadable_file"]
    assert [row.source_file.rsplit("/")[-1] for row in unreadable] == ["cut%20one.jsonl.gz", "cut.jsonl.zst"]
    assert all("end too early" in row.detail for row in unreadable)
    assert (
        summary.rejected == summary.new_rejected == len(found) == len(bad) + 3
    )  # two files, and a line that stands there twice
    assert summary.documents == 2
    assert summary.too_many_rejects

    # Known bad files are not tried again, also under a new checkpoint; a repaired copy under another name is read.
    shutil.rmtree(tmp_path / "root/_checkpoints")
    (folder / "repaired.jsonl.gz").write_bytes(whole)
    after = run(spark, config)
    assert (after.new_instances > 2000, after.new_rejected) == (True, 0)


def test_corrupt_parquet_beside_a_good_one(spark: Any, make: Make, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [b"A text.", None, b"not \xff utf-8"]}), tmp_path / "good.parquet")
    (tmp_path / "bad.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:-40])
    config = make(str(tmp_path / "*.parquet"))
    run(spark, config)
    assert [row.text for row in instances(spark, config)] == ["A text."]
    assert [row.reason for row in rejects(spark, config)] == ["invalid_utf8", "missing_text", "unreadable_file"]


@pytest.mark.long
def test_one_line_of_20_megabytes(spark: Any, make: Make, tmp_path: Path) -> None:
    text = SENTENCE * (20_000_000 // len(SENTENCE.encode()))
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"id": "long", "text": text}, {"id": "short", "text": "Short."}]))
    config = make(str(tmp_path / "a.jsonl"), mode="document", max_tokens=1025)
    summary = run(spark, config)
    frame = tables.read(spark, config.layout.table("instances"))
    assert summary.rejected == 0
    rows = (
        frame.where("document_ids[0] = 'long'")
        .select("ordinal", "start_byte", "n_bytes", "text")
        .orderBy("ordinal")
        .collect()
    )
    assert [row.ordinal for row in rows] == list(range(len(rows)))
    assert all(row.n_bytes <= 1025 * 10 for row in rows)
    assert "".join(row.text for row in rows) == text


def test_config_errors(spark: Any, make: Make, tmp_path: Path) -> None:
    """A config that does not fit the input is refused before anything is written; the message says what to do."""
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"id": "1", "txt": "x"}]))
    pq.write_table(pa.table({"content": ["x"], "n": [1]}), tmp_path / "a.parquet")
    (tmp_path / "a.weird").write_text("x")
    (tmp_path / "nested.jsonl").write_bytes(jsonl([{"text": "x", "meta": {"set": "web"}}]))
    cases = [
        (make(""), "ingest.input"),
        (make(str(tmp_path / "nothing*.jsonl")), r"nothing\*.jsonl matches no file"),
        (make(str(tmp_path / "a.*")), "files of one format, found \\['jsonl', 'parquet'\\]"),
        (make(str(tmp_path / "a.weird")), "set ingest.format"),
        (make(str(tmp_path / "a.jsonl")), "did you mean ingest.fields.text=txt"),
        (
            make(str(tmp_path / "nested.jsonl"), fields=FieldsConfig(source="meta.sett")),
            r"ingest.fields.source.*found \['meta', 'meta.set', 'text'\]; did you mean ingest.fields.source=meta.set",
        ),
        (
            make(str(tmp_path / "a.parquet"), fields=FieldsConfig(text="content", metadata=["lang"])),
            "ingest.fields.metadata.*'lang'",
        ),
        (make(str(tmp_path / "a.parquet")), "'text'.*found \\['content', 'n'\\]"),
        (make(str(tmp_path / "a.parquet"), fields=FieldsConfig(text="n")), "expected a column of text"),
        (make(str(tmp_path), format="delta"), "expected a Delta table"),
    ]
    for config, message in cases:
        if config.ingest.input == "":
            config = ExperimentConfig(root=config.root)
        with pytest.raises(ConfigError, match=message) as caught:
            run(spark, config)
        assert caught.value.exit_code == 2
    assert not (tmp_path / "root").exists()


def test_empty_corpus_and_missing_tokenizer(spark: Any, make: Make, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": ""}\n')
    (tmp_path / "empty.jsonl").write_bytes(b"")
    config = make(str(tmp_path / "*.jsonl"))
    with pytest.raises(CorpusError, match=r"nothing was ingested.*'empty_text': 1") as caught:
        run(spark, config)
    assert caught.value.exit_code == 1
    elsewhere = {"teacher": ModelConfig(path="/no/such/model")}
    with pytest.raises(ModelLoadError, match="/no/such/model"):
        run(spark, ExperimentConfig(root=config.root, models=elsewhere, ingest=config.ingest))


def test_an_executor_error_is_raised_as_it_was(
    spark: Any, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node that begins has another tokenizer than the one that works."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS[:3]))
    monkeypatch.setattr("miniplm_udf.ingestion.query.executor_tokenizer_hash", lambda *_: "0" * 32)
    with pytest.raises(CorpusError, match=r"^tokenizer .*expected hash 0{32}.*the same model files$"):
        run(spark, make(str(tmp_path / "a.jsonl")))


def test_other_chunking_in_the_same_root_is_refused(spark: Any, make: Make, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS[:3]))
    run(spark, make(str(tmp_path / "a.jsonl")))
    with pytest.raises(ConfigError, match=r"chunking.max_tokens: 33 there, 34 now.*new root"):
        run(spark, make(str(tmp_path / "a.jsonl"), max_tokens=34))
    with pytest.raises(ConfigError, match=r"split.heldout"):
        run(spark, make(str(tmp_path / "a.jsonl"), split=SplitConfig(reference=0.3, heldout=0.1)))
