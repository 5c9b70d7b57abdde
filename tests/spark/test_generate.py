"""The stage `generate`, with a tiny model or a fake: each instance once; packed, verified, taken down."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from jobs import generate, pack
from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.generate import GenerateConfig
from miniplm_udf.config.sections import PackConfig, TokenizerConfig
from miniplm_udf.config.training import StudentConfig
from miniplm_udf.corpora import takedown
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.scoring.tokenizer import load_tokenizer
from miniplm_udf.store import corpus_records, tables
from miniplm_udf.store.takedowns import Takedown
from miniplm_udf.upkeep import verify
from miniplm_udf.upkeep.maintain import maintain
from tests.support.generators import CountingFactory, calls
from tests.support.score_tables import experiment, instance_id, model_config, texts, write_instances
from tests.support.tiny_models import SEPARATOR, make_model_folder

LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models"), name="teacher", factor=3.0)


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> ExperimentConfig:
    student = StudentConfig(corpus="generated", tokenizer="same", architecture={"model_type": "llama"})
    return dataclasses.replace(
        experiment(tmp_path / "root", {"teacher": model_config(folder)}),
        generate=GenerateConfig(prompt_tokens=30, new_tokens=10, seed=3),
        tokenizers={
            "same": TokenizerConfig(path=str(folder), document_separator=SEPARATOR),
            "other": TokenizerConfig(vocab_size=280),
        },
        pack=PackConfig(sequence_length=LENGTH),
        students={"one": student},
    )


def rows_of(spark: Any, config: ExperimentConfig) -> dict[str, Any]:
    rows = tables.read(spark, config.layout.table("generations")).collect()
    by_id = {row["instance_id"]: row for row in rows}
    assert len(by_id) == len(rows), "each instance once"
    return by_id


def ids_of(row: Any) -> list[int]:
    return list(np.frombuffer(row["token_ids"], "<i4").tolist())


def wrong(spark: Any, config: ExperimentConfig) -> list[verify.Check]:
    return [check for check in verify.verify(spark, config.root) if not check.ok or check.behind]


@pytest.mark.long
def test_a_pool_is_continued(spark: Any, config: ExperimentConfig, folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    long, short = texts(6), ["short"]
    write_instances(spark, config, [*long, *short])
    write_instances(spark, config, texts(2, start=50), split="heldout")
    summary = generate.run(spark, config)
    rows = rows_of(spark, config)
    assert rows.keys() == set(map(instance_id, [*long, *short]))
    for text in long:
        row = rows[instance_id(text)]
        assert ids_of(row)[:30] == tokenizer.encode(text, add_special_tokens=False).ids[:30]
        assert (row["n_prompt_tokens"], row["n_tokens"]) == (30, len(ids_of(row)) - 30)
        assert row["end_reason"] == ("eos" if ids_of(row)[-1] == 0 else "length")
        assert (row["source"], row["document_ids"], row["seed"]) == ("web", [text[:20]], 3)
    row = rows[instance_id("short")]
    assert (ids_of(row), row["end_reason"]) == ([*tokenizer.encode("short").ids, 0], "prompt")
    record = storage.read_json(config.layout.model_record("teacher"))
    assert {row["model_revision"] for row in rows.values()} == {record["model_revision"]}
    assert config.generate is not None
    revision = config.generate.revision(record["model_revision"])
    assert {row["generation_revision"] for row in rows.values()} == {revision} == {summary.revision}
    assert (summary.generated, summary.new_generated, summary.rejected) == (6, 7, 0)
    assert summary.tokens == sum(row["n_tokens"] for row in rows.values()) > 0
    assert tables.read(spark, config.layout.table("generations")).schema == schemas.GENERATIONS.spark_schema()


@pytest.mark.long
def test_generated_texts_are_packed_verified_maintained_and_taken_down(spark: Any, config: ExperimentConfig) -> None:
    two = {**config.students, "two": dataclasses.replace(config.students["one"], tokenizer="other")}
    config = dataclasses.replace(config, students=two)
    long = texts(6)
    write_instances(spark, config, [*long, "short"])
    summary = generate.run(spark, config)
    assert wrong(spark, config) == []
    packed = pack.run(spark, config).packed
    assert {name: each.n_instances for name, each in packed.items()} == {"generated/other": 7, "generated/same": 7}
    sequences = tables.read(spark, packed["generated/same"].path).orderBy("sequence_id").collect()
    # The very ids, one row after another: consecutive sequences share one token.
    stream = [i for n, row in enumerate(sequences) for i in ids_of(row)[1 if n else 0 :]]
    stream = stream[: packed["generated/same"].n_tokens]
    parts = [ids_of(row) for row in rows_of(spark, config).values()]
    assert len(stream) == sum(map(len, parts))
    parts.sort(key=lambda ids: next(n for n in range(len(stream)) if stream[n : n + len(ids)] == ids))
    assert [i for ids in parts for i in ids] == stream
    assert packed["generated/same"].n_targets == len(stream) - len(parts), "the first of a row is no target"
    newest = corpus_records.newest(packed["generated/same"].path)
    assert newest is not None
    assert newest.metadata is not None
    assert newest.metadata["refined_metadata"] == {"model_revisions": {"teacher": summary.model_revision}}
    assert newest.metadata["generation_revision"] == summary.revision
    assert newest.metadata["generation"]["seed"] == 3
    # Maintenance merges files and changes no row: nothing is packed again.
    assert "generations" in {table.table for table in maintain(spark, config).tables}
    assert all(each.skipped for each in pack.run(spark, config).packed.values())
    gone = long[2]
    removed = takedown.take_down(spark, config, [gone[:20]], Takedown("a test")).removed
    assert removed["generations"] == removed["instances"] == 1
    assert removed.keys() == {"generations", "instances", "packed/generated/same", "packed/generated/other"}
    assert instance_id(gone) not in rows_of(spark, config)
    assert wrong(spark, config) == []
    assert pack.run(spark, config).packed["generated/same"].n_instances == 6
    # Rows of another seed are no reason to pack again, either.
    assert config.generate is not None
    reseeded = dataclasses.replace(config, generate=dataclasses.replace(config.generate, seed=8))
    assert generate.run(spark, reseeded).new_generated == 6
    assert all(each.skipped for each in pack.run(spark, config).packed.values())
    # A copy of another tokenizer, as where the model's files were replaced.
    kept = Path(storage.local_path(config.layout.model("tokenizer_teacher", "miniplm.json")))
    record = kept.read_text()
    kept.write_text(json.dumps(json.loads(record) | {"document_separator_id": 5}))
    with pytest.raises(CorpusError, match=r"tokenizer_teacher: .*models\.teacher were replaced; remove this folder"):
        pack.run(spark, config)
    kept.write_text(record)


def test_a_killed_job_continues_each_instance_once(spark: Any, config: ExperimentConfig, tmp_path: Path) -> None:
    log = tmp_path / "calls.log"
    factory = CountingFactory(str(log))
    write_instances(spark, config, [*texts(4), "fail now"])
    append = tables.append

    def killed(frame: Any, uri: str, *arguments: Any, **named: Any) -> None:
        append(frame, uri, *arguments, **named)
        if uri.endswith("/generations"):
            raise RuntimeError("killed between the tables and the checkpoint")

    with mock.patch.object(tables, "append", killed), pytest.raises(Exception, match="killed between"):
        generate.run(spark, config, factory)
    rows = rows_of(spark, config)
    for text in texts(4):
        row = rows[instance_id(text)]
        assert ids_of(row) == [*text.encode(), sum(text.encode())]
        assert (row["n_prompt_tokens"], row["n_tokens"], row["end_reason"]) == (len(text.encode()), 1, "length")
        assert (row["source"], row["document_ids"], row["seed"]) == ("web", [text[:20]], 3)
    assert len(rows) == 4
    assert tables.read(spark, config.layout.table("generations")).schema == schemas.GENERATIONS.spark_schema()
    summary = generate.run(spark, config, factory)
    assert calls(log) == sorted([*map(instance_id, [*texts(4), "fail now"])])
    assert (summary.generated, summary.new_generated, summary.rejected) == (4, 0, 1)
    assert summary.too_many_rejects is True
    (reject,) = tables.read(spark, config.layout.table("rejects")).collect()
    assert (reject["instance_id"], reject["stage"]) == (instance_id("fail now"), f"generate:{summary.revision}")


@pytest.mark.long
def test_lost_checkpoints_other_seeds_and_shares_generate_only_what_is_missing(
    spark: Any, config: ExperimentConfig, tmp_path: Path
) -> None:
    log = tmp_path / "calls.log"
    factory = CountingFactory(str(log))
    write_instances(spark, config, texts(4))
    generate.run(spark, config, factory)
    # A lost checkpoint, new instances, and an instance that fails with its reason.
    shutil.rmtree(storage.local_path(config.layout.checkpoint()))
    write_instances(spark, config, [*texts(3, start=10), "fail again"], batch_id=1)
    summary = generate.run(spark, config, factory)
    assert (summary.generated, summary.new_generated, summary.rejected) == (7, 3, 1)
    assert len(calls(log)) == len(set(calls(log))) == 8
    (reject,) = tables.read(spark, config.layout.table("rejects")).collect()
    assert (reject["instance_id"], reject["reason"]) == (instance_id("fail again"), "no_tokens")
    assert wrong(spark, config) == []

    # With another seed, other texts are added to the same table: at first for a share of the pool, then for the rest.
    assert config.generate is not None
    half = dataclasses.replace(config, generate=dataclasses.replace(config.generate, seed=4, sample=0.5))
    some = generate.run(spark, half, factory).generated
    assert 0 < some < 7
    whole = dataclasses.replace(config, generate=dataclasses.replace(config.generate, seed=4))
    assert generate.run(spark, whole, factory).new_generated == 7 - some
    assert tables.read(spark, config.layout.table("generations")).count() == 14
    assert wrong(spark, config) == []


@pytest.mark.long
def test_what_cannot_be_is_refused(spark: Any, config: ExperimentConfig) -> None:
    with pytest.raises(CorpusError, match="miniplm ingest"):
        generate.run(spark, config)
    with pytest.raises(CorpusError, match="miniplm generate"):
        pack.run(spark, config)
    with pytest.raises(ConfigError, match="expected a section"):
        generate.run(spark, dataclasses.replace(config, generate=None, students={}))
    write_instances(spark, config, ["too", "short"])
    with pytest.raises(
        CorpusError, match=r"more than 30 tokens, found none \(2 shorter ones, 0 rejects\).*prompt_tokens"
    ):
        generate.run(spark, config)
    assert config.generate is not None
    other = dataclasses.replace(config, generate=dataclasses.replace(config.generate, seed=9))
    with pytest.raises(CorpusError, match="found only others"):
        pack.run(spark, other)
