"""Packing in Spark: against the pure packer, with its tokenizers, its provenance and what a second run does."""

import dataclasses
import datetime
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import pack as job
from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import PackConfig, TokenizerConfig
from miniplm_udf.errors import ConfigError, CorpusError, ModelLoadError
from miniplm_udf.packing import file_layout, sequences
from miniplm_udf.packing.corpus import pack_corpus, pack_reference
from miniplm_udf.packing.tokenizers import ensure_tokenizer
from miniplm_udf.scoring.tokenizer import load_tokenizer, tokenizer_hash
from miniplm_udf.store import delta_files, delta_log, tables
from tests.support.tiny_models import SEPARATOR, make_model_folder

LENGTH = 16


def instance(stream: str, ordinal: int, text: str, split: str = "pool", **changes: Any) -> dict[str, Any]:
    plain = {
        "instance_id": hashlib.sha256(f"{stream} {ordinal}".encode()).hexdigest()[:32],
        "stream_id": stream,
        "ordinal": ordinal,
        "document_ids": [stream],
        "start_byte": 0,
        "source": "web",
        "text": text,
        "segment_ends": [],
        "starts_document": True,
        "ends_document": True,
        "n_bytes": len(text.encode()),
        "content_hash": "",
        "split": split,
        "metadata": None,
        "ingested_at": datetime.datetime(2025, 1, 1),
        "query_id": "q",
        "batch_id": 0,
    }
    return {**plain, **changes}


POOL = [instance(f"s{i}", j, f"stream {i} slice {j} of naïve text\n") for i in range(6) for j in range(4)]
OTHERS = [instance(f"r{i}", 0, f"reference {i} zzzz zzzz zzzz", "reference") for i in range(3)]
OTHERS += [instance("h", 0, "qqqq qqqq qqqq qqqq", "heldout")]


def write_instances(spark: Any, config: ExperimentConfig, rows: Sequence[dict[str, Any]]) -> None:
    frame = spark.createDataFrame(
        [tuple(row[name] for name in schemas.INSTANCES.column_names) for row in rows], schemas.INSTANCES.spark_schema()
    )
    tables.append(frame, config.layout.table("instances"), schemas.INSTANCES)


def write_refined(spark: Any, config: ExperimentConfig, rows: Sequence[dict[str, Any]], corpus: str = "kept") -> int:
    table = schemas.refined(corpus, [])
    frame = spark.createDataFrame(
        [(row["instance_id"], row["source"], 8, row["n_bytes"], 0.0) for row in rows], table.spark_schema()
    )
    return tables.overwrite(frame, config.layout.table(f"refined/{corpus}"), table, {"threshold": 0.25, "n": len(rows)})


@pytest.fixture
def config(demo_config: ExperimentConfig) -> ExperimentConfig:
    corpora = {"kept": demo_config.refine.corpora["random"], "other": demo_config.refine.corpora["random"]}
    student = dataclasses.replace(demo_config.students["miniplm"], corpus="kept", tokenizer="bpe")
    return dataclasses.replace(
        demo_config,
        refine=dataclasses.replace(demo_config.refine, corpora=corpora),
        tokenizers={"bpe": TokenizerConfig(vocab_size=300)},
        pack=PackConfig(sequence_length=LENGTH, shards=1),
        students={"one": student, "two": student},
    )


def stored(uri: str) -> list[dict[str, Any]]:
    """All rows in stored order, as the trainer reads them; checked against the schema."""
    rows: list[dict[str, Any]] = []
    for path in delta_files.files_by(delta_files.open_table(uri), uri, "sequence_id"):
        content = pq.read_table(path)
        assert content.schema.remove_metadata().names == schemas.packed("c", "t").column_names
        rows += content.to_pylist()
    return rows


def kept_text(config: ExperimentConfig, rows: list[dict[str, Any]], name: str = "bpe") -> str:
    """The text of all targets and of the shards' first tokens, without separators."""
    folder = Path(storage.local_path(config.layout.model(f"tokenizer_{name}")))
    tokenizer, info = load_tokenizer(folder), json.loads((folder / "miniplm.json").read_text())
    ids: list[int] = []
    for i, row in enumerate(rows):
        row_ids = np.frombuffer(row["token_ids"], "<i4").tolist()
        ids += row_ids if i == 0 or rows[i - 1]["token_ids"][-4:] != row["token_ids"][:4] else row_ids[1:]
    return tokenizer.decode([i for i in ids if i != info["document_separator_id"]], skip_special_tokens=False)


def test_a_corpus_is_packed_as_the_pure_packer_does_and_only_once(spark: Any, config: ExperimentConfig):
    kept = [row for row in POOL if (row["stream_id"], row["ordinal"]) not in {("s1", 2), ("s4", 0)}]
    write_instances(spark, config, [*POOL, *OTHERS])
    version = write_refined(spark, config, kept)
    summary = job.run(spark, config).packed
    assert list(summary) == ["kept/bpe"], "two students of one corpus and tokenizer: packed once"
    found = summary["kept/bpe"]
    rows = stored(found.path)

    # The order of streams is read off the table's own text; all else is the pure packer's.
    text = kept_text(config, rows)
    order = sorted({row["stream_id"] for row in kept}, key=lambda s: text.index(f"stream {s[1:]} "))
    folder = Path(storage.local_path(config.layout.model("tokenizer_bpe")))
    info = json.loads((folder / "miniplm.json").read_text())
    slices = [
        sequences.InstanceText(
            *(row[name] for name in ("stream_id", "ordinal", "text", "segment_ends")), True, True, [stream], 0
        )
        for stream in order
        for row in kept
        if row["stream_id"] == stream
    ]
    expected = list(sequences.pack_texts(slices, load_tokenizer(folder), info["document_separator_id"], LENGTH))
    assert [row["token_ids"] for row in rows] == [s.token_ids.tobytes() for s in expected]
    assert [row["target_mask"] for row in rows] == [s.target_mask.tobytes() for s in expected]
    assert [row["n_targets"] for row in rows] == [int(s.target_mask.sum()) for s in expected]
    assert [row["sequence_id"] for row in rows] == list(range(len(expected)))
    assert order != sorted(order), "streams stand in the order of a hash"
    assert spark.read.format("delta").load(found.path).schema == schemas.packed("kept", "bpe").spark_schema()

    metadata = next(delta_log.commits(found.path)).metadata()
    assert metadata is not None
    assert metadata["refined_version"] == version
    assert metadata["refined_metadata"] == {"threshold": 0.25, "n": len(kept)}
    assert metadata["tokenizer_hash"] == tokenizer_hash(folder) == info["tokenizer_hash"]
    assert metadata["n_tokens"] == sum(s.n_new_tokens for s in expected) == found.n_tokens
    assert metadata["n_instances"] == len(kept)
    assert metadata["n_sequences"] == len(rows)

    again = job.run(spark, config).packed["kept/bpe"]
    assert again == dataclasses.replace(found, skipped=True)

    # The same inputs in another table: the same bytes. A newer version of the corpus: packed again.
    shutil.rmtree(storage.local_path(found.path))
    assert not pack_corpus(spark, config, "kept", "bpe").skipped
    assert stored(found.path) == rows
    write_refined(spark, config, kept[:5])
    fewer = pack_corpus(spark, config, "kept", "bpe")
    assert (fewer.skipped, fewer.n_instances) == (False, 5)


def test_with_sequences_instance_each_instance_is_a_sequence(spark: Any, config: ExperimentConfig):
    instances = [*POOL, instance("long", 0, "stream 7 slice 0 of naïve text " * 12)]
    write_instances(spark, config, instances)
    write_refined(spark, config, instances)
    packed = pack_corpus(spark, config, "kept", "bpe")
    alone = dataclasses.replace(config, pack=dataclasses.replace(config.pack, sequences="instance", sequence_length=64))
    summary = pack_corpus(spark, alone, "kept", "bpe")
    rows = stored(summary.path)
    folder = Path(storage.local_path(config.layout.model("tokenizer_bpe")))
    tokenizer, info = load_tokenizer(folder), json.loads((folder / "miniplm.json").read_text())
    contents: list[list[int]] = []
    for row in rows:
        ids, n = np.frombuffer(row["token_ids"], "<i4").tolist(), row["n_targets"]
        assert np.frombuffer(row["target_mask"], "u1").tolist() == [1] * n + [0] * (64 - n)
        assert set(ids[n + 1 :]) <= {info["document_separator_id"]}
        contents.append(ids[: n + 1])
    expected = [[*tokenizer.encode(r["text"]).ids, info["document_separator_id"]] for r in instances]
    (long,) = [ids for ids in expected if len(ids) > 65]
    short = [ids for ids in expected if len(ids) <= 65]
    assert len(short) == len(POOL)
    # The long instance continues in further sequences, which share one token with the sequence before.
    parts = [long[start : start + 65] for start in range(0, len(long) - 1, 64)]
    assert sorted(contents) == sorted([*short, *parts])
    assert summary.n_tokens == packed.n_tokens == sum(map(len, expected))
    assert [row["sequence_id"] for row in rows] == list(range(summary.n_sequences))
    assert pack_corpus(spark, alone, "kept", "bpe").skipped
    # The other way to make sequences makes other sequences: nothing is skipped.
    packed_again = dataclasses.replace(alone, pack=dataclasses.replace(alone.pack, sequences="packed"))
    assert not pack_corpus(spark, packed_again, "kept", "bpe").skipped


def test_row_groups_and_files_are_small(spark: Any, config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(file_layout.SETTINGS, "parquet.block.row.count.limit", "3")
    monkeypatch.setitem(file_layout.SETTINGS, "spark.sql.files.maxRecordsPerFile", "6")
    before = {key: spark.conf.get(key, None) for key in file_layout.SETTINGS}
    write_instances(spark, config, POOL)
    write_refined(spark, config, POOL)
    uri = pack_corpus(spark, config, "kept", "bpe").path
    assert {key: spark.conf.get(key, None) for key in file_layout.SETTINGS} == before
    files = delta_files.files_by(delta_files.open_table(uri), uri, "sequence_id")
    rows = [row for file in files for row in pq.read_table(file)["sequence_id"].to_pylist()]
    assert rows == list(range(len(rows)))
    assert len(files) == -(-len(rows) // 6) > 2
    for file in files[:-1]:
        footer = pq.read_metadata(file)
        groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
        assert [group.num_rows for group in groups] == [3, 3]
        columns = {group.column(i).path_in_schema: group.column(i) for group in groups for i in range(4)}
        assert {column.compression for column in columns.values()} == {"ZSTD"}
        assert [name for name, column in columns.items() if column.statistics] == ["sequence_id", "n_targets"]
        assert "PLAIN_DICTIONARY" not in columns["token_ids"].encodings


@pytest.mark.long
def test_a_table_of_an_earlier_version_counts_as_packed(spark: Any, config: ExperimentConfig) -> None:
    write_instances(spark, config, POOL)
    write_refined(spark, config, POOL)
    summary = pack_corpus(spark, config, "kept", "bpe")
    metadata = next(delta_log.commits(summary.path)).metadata()
    assert metadata is not None
    assert metadata.pop("sequences") == "packed"
    rows = spark.read.format("delta").load(summary.path).localCheckpoint()
    tables.overwrite(rows, summary.path, schemas.packed("kept", "bpe"), metadata)
    assert pack_corpus(spark, config, "kept", "bpe").skipped
    alone = dataclasses.replace(config, pack=dataclasses.replace(config.pack, sequences="instance"))
    assert not pack_corpus(spark, alone, "kept", "bpe").skipped


def test_shards_hold_everything_once_in_stored_order(spark: Any, config: ExperimentConfig):
    config = dataclasses.replace(config, pack=PackConfig(sequence_length=LENGTH, shards=4))
    write_instances(spark, config, POOL)
    write_refined(spark, config, POOL)
    found = pack_corpus(spark, config, "kept", "bpe")
    rows = stored(found.path)
    assert [row["sequence_id"] for row in rows] == list(range(found.n_sequences))
    text = kept_text(config, rows)
    assert sorted(text.splitlines()) == sorted("".join(row["text"] for row in POOL).splitlines())
    # Every token but the first of each shard that holds any is a target: nothing else is broken here.
    n_shards = found.n_tokens - found.n_targets
    assert 1 < n_shards <= 4


def test_a_trained_tokenizer_knows_the_pool_alone_and_is_frozen(spark: Any, config: ExperimentConfig, caplog: Any):
    write_instances(spark, config, [*POOL, *OTHERS])
    made = ensure_tokenizer(spark, config, "bpe")
    folder = Path(storage.local_path(config.layout.model("tokenizer_bpe")))
    vocabulary = load_tokenizer(folder).get_vocab()
    assert any("stream" in token for token in vocabulary)
    assert not any("zz" in token or "qq" in token for token in vocabulary)

    write_instances(spark, config, [instance("new", 0, "wwww wwww wwww " * 50)])
    assert ensure_tokenizer(spark, config, "bpe") == made
    changed = dataclasses.replace(config, tokenizers={"bpe": TokenizerConfig(vocab_size=310)})
    with caplog.at_level("WARNING", logger="miniplm"):
        assert ensure_tokenizer(spark, changed, "bpe").tokenizer_hash != made.tokenizer_hash
    assert "tokenizer is made again" in caplog.text

    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.eos_token == SEPARATOR
    text = "stream 1 naïve 🙂\n"
    assert loaded(text)["input_ids"] == load_tokenizer(folder).encode(text, add_special_tokens=False).ids


@pytest.mark.long
def test_training_stops_at_train_bytes_in_the_order_of_ids(spark: Any, config: ExperimentConfig):
    rows = [
        instance(f"s{i}", 0, ("aaaa " if i < 8 else "bbbb ") * 20, instance_id=f"{i:x}" + "0" * 31) for i in range(16)
    ]
    write_instances(spark, config, rows)
    half = dataclasses.replace(config, tokenizers={"bpe": TokenizerConfig(vocab_size=400, train_bytes=800)})
    vocabulary = ensure_tokenizer(spark, half, "bpe").content.decode()
    assert "aaaa" in vocabulary
    assert "bbbb" not in vocabulary


@pytest.mark.long
def test_a_tokenizer_is_copied_from_a_folder(spark: Any, config: ExperimentConfig, tmp_path: Path):
    model = make_model_folder(tmp_path / "model", "llama")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(model / "tokenizer.json", alone)
    for name, folder in (("whole", model), ("alone", alone)):
        copied = dataclasses.replace(config, students={}, tokenizers={name: TokenizerConfig(path=str(folder))})
        assert ensure_tokenizer(spark, copied, name).tokenizer_hash == tokenizer_hash(model)
    for wanted, error in (
        (TokenizerConfig(path=str(alone), document_separator="<none>"), ConfigError),
        (TokenizerConfig(path=str(tmp_path / "absent")), ModelLoadError),
    ):
        with pytest.raises(error):
            ensure_tokenizer(spark, dataclasses.replace(config, students={}, tokenizers={"bad": wanted}), "bad")
    assert not Path(storage.local_path(config.layout.model("tokenizer_bad"))).exists()


def test_the_reference_is_packed_with_the_tokenizer_of_its_model(spark: Any, config: ExperimentConfig, tmp_path: Path):
    model = make_model_folder(tmp_path / "model", "llama")
    teacher = dataclasses.replace(
        config.models["teacher"], path=str(model), context_tokens=128, window_overlap_tokens=32
    )
    config = dataclasses.replace(config, models={**config.models, "teacher": teacher})
    write_instances(spark, config, POOL)
    with pytest.raises(CorpusError, match=r"ingest\.split\.reference"):
        job.run_reference(spark, config)
    write_instances(spark, config, OTHERS)
    packed = job.run_reference(spark, config).packed["reference/teacher"]
    text = kept_text(config, stored(packed.path), "teacher")
    assert sorted(text[i : i + len(OTHERS[0]["text"])] for i in range(0, len(text), len(OTHERS[0]["text"]))) == [
        row["text"] for row in OTHERS if row["split"] == "reference"
    ]
    metadata = next(delta_log.commits(packed.path)).metadata()
    assert metadata is not None
    assert metadata["refined_version"] is None
    assert metadata["tokenizer_hash"] == tokenizer_hash(model)
    assert pack_reference(spark, config).skipped


def test_what_is_missing_is_said(spark: Any, config: ExperimentConfig):
    with pytest.raises(CorpusError, match="refine"):
        pack_corpus(spark, config, "kept", "bpe")
    write_instances(spark, config, OTHERS)
    write_refined(spark, config, POOL[:2])
    with pytest.raises(CorpusError, match="pool"):
        pack_corpus(spark, config, "kept", "bpe")
    write_instances(spark, config, POOL[2:])
    with pytest.raises(CorpusError, match="2 that are not there"):
        pack_corpus(spark, config, "kept", "bpe")
    write_refined(spark, config, [])
    with pytest.raises(CorpusError, match="keeps nothing"):
        pack_corpus(spark, config, "kept", "bpe")
    with pytest.raises(ConfigError, match="section tokenizers"):
        pack_corpus(spark, config, "kept", "none")
    with pytest.raises(ConfigError, match="students"):
        job.run(spark, dataclasses.replace(config, students={}))
    with pytest.raises(ConfigError, match="reference"):
        pack_reference(spark, dataclasses.replace(config, reference=None))
