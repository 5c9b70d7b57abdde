"""A root on S3: every command gives what it gives on a local root, and its requests do not grow with the root."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import zstandard

from jobs import ingest, refine, score
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig, SelectConfig
from miniplm_udf.config.sections import ChunkingConfig, IngestConfig, SplitConfig
from miniplm_udf.corpora import versions
from miniplm_udf.corpora.export import ExportRequest, export
from miniplm_udf.store import tables
from miniplm_udf.upkeep.maintain import maintain
from miniplm_udf.upkeep.verify import verify
from tests.support.s3_server import BUCKET, S3Server
from tests.support.score_tables import FakeFactory, experiment, texts, two_models

ROOT = f"s3a://{BUCKET}/run"
# Columns that differ from run to run.
_VOLATILE = ("query_id", "batch_id", "instance_batch_id", "run_id", "source_file")


def put_documents(folder: str, name: str, first: int, n: int) -> None:
    """Writes a compressed file of documents; each document is a function of its number."""
    lines = [json.dumps({"id": f"d{first + i}", "text": text}) for i, text in enumerate(texts(n, first))]
    with fsspec.open(f"{folder}/{name}.jsonl.zst", "wb", auto_mkdir=True) as file:
        file.write(zstandard.compress("\n".join(lines).encode()))


@pytest.fixture
def config(tmp_path: Path) -> ExperimentConfig:
    kept = CorpusConfig(score="reference_nll_mean - teacher_nll_mean", where="true", select=SelectConfig(ratio=0.5))
    return dataclasses.replace(
        experiment(tmp_path / "root", two_models(tmp_path), {"kept": kept}),
        ingest=IngestConfig(
            input=str(tmp_path / "in"), state_partitions=1, chunking=ChunkingConfig(max_tokens=65),
            split=SplitConfig(heldout=0.1, reference=0.1),
        ),
    )  # fmt: skip


def at(config: ExperimentConfig, root: str, input: str) -> ExperimentConfig:
    return dataclasses.replace(config, root=root, ingest=dataclasses.replace(config.ingest, input=input))


TABLES = ("instances", "document_keys", "rejects", "scores", "score_matrix", "refined/kept")


def scored(spark: Any, config: ExperimentConfig, folder: Path, step: int) -> None:
    """Ingests, scores and refines a further file of ten documents."""
    factories = {"teacher": FakeFactory(1.0, f"{folder}/log"), "reference": FakeFactory(2.0, f"{folder}/log")}
    put_documents(config.ingest.inputs[0], f"part-{step}", 10 * step, 10)
    ingest.run(spark, config)
    score.run(spark, config, factories)
    refine.run(spark, config)


def content(spark: Any, config: ExperimentConfig) -> dict[str, list[str]]:
    return {name: plain_rows(spark, config.layout.table(name)) for name in TABLES}


def plain_rows(spark: Any, uri: str) -> list[str]:
    frame = tables.read(spark, uri)
    kept = [f.name for f in frame.schema.fields if f.name not in _VOLATILE and f.dataType.typeName() != "timestamp"]
    return sorted(json.dumps(row.asDict(recursive=True), sort_keys=True) for row in frame.select(*kept).collect())


def test_a_root_on_s3_holds_what_a_local_root_holds(s3_spark: Any, config: ExperimentConfig, tmp_path: Path) -> None:
    remote = at(config, ROOT, f"s3a://{BUCKET}/in")
    for each in (config, remote):
        scored(s3_spark, each, tmp_path, 0)
    here, there = content(s3_spark, config), content(s3_spark, remote)
    for name, rows in here.items():
        assert there[name] == rows, name
    assert all(there[name] for name in TABLES if name not in ("rejects", "document_keys"))


@pytest.mark.long
def test_versions_and_upkeep_on_s3(s3_spark: Any, s3: S3Server, config: ExperimentConfig, tmp_path: Path) -> None:
    """Two micro-batches, then the commands on versions; the requests of each are printed."""

    def finished(step: str) -> None:
        print(step, s3.requests())
        s3.reset()

    results = []
    for each in (config, at(config, f"{ROOT}-2", f"s3a://{BUCKET}/in-2")):
        s3.reset()
        for step in range(2):
            scored(s3_spark, each, tmp_path, step)
            finished(f"micro-batch {step}")
        version = refine.run(s3_spark, each).refined["kept"].version
        pin = versions.pin(s3_spark, each.root, "kept", "paper")
        finished("refine and pin")
        maintain(s3_spark, each, retain_hours=0.0, abandoned_days=7.0, dry_run=False)
        finished("maintain")
        assert [check for check in verify(s3_spark, each.root) if not check.ok] == []
        finished("verify")
        written = export(s3_spark, each, "kept", ExportRequest(to="jsonl.zst", out=f"{each.root}/exports/kept"))
        finished("export")
        pinned = plain_rows(s3_spark, each.layout.pinned("kept", version))
        numbers = (pin.version, pin.fingerprint, written.fingerprint, written.n_instances)
        results.append((content(s3_spark, each), pinned, numbers))
    assert results[0] == results[1]
