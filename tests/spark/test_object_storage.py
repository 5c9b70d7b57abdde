"""A root on S3: every command gives what it gives on a local root."""

import json
from pathlib import Path
from typing import Any

import pytest

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.store import tables
from tests.support.s3_server import BUCKET, S3Server
from tests.support.storage_runs import CORPUS, at, commands, make_config, put_file

TABLES = ("instances", "document_keys", "rejects", "scores", "score_matrix", f"refined/{CORPUS}")
# Columns that differ from run to run.
_VOLATILE = ("query_id", "batch_id", "instance_batch_id", "run_id", "source_file")


def plain_rows(spark: Any, uri: str) -> list[str]:
    frame = tables.read(spark, uri)
    kept = [f.name for f in frame.schema.fields if f.name not in _VOLATILE and f.dataType.typeName() != "timestamp"]
    return sorted(json.dumps(row.asDict(recursive=True), sort_keys=True) for row in frame.select(*kept).collect())


def content(spark: Any, config: ExperimentConfig) -> dict[str, list[str]]:
    return {name: plain_rows(spark, config.layout.table(name)) for name in TABLES}


def test_a_root_on_s3_holds_what_a_local_root_holds(s3_spark: Any, s3: S3Server, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    remote = at(config, f"s3a://{BUCKET}/run", f"s3a://{BUCKET}/in")
    for each in (config, remote):
        put_file(each, 0)
        for name, run in commands(s3_spark, each, tmp_path).items():
            if name in ("ingest", "score", "refine"):
                run()
    here, there = content(s3_spark, config), content(s3_spark, remote)
    for name, rows in here.items():
        assert there[name] == rows, name
    assert all(there[name] for name in TABLES if name not in ("rejects", "document_keys"))


@pytest.mark.long
def test_versions_and_upkeep_on_s3(s3_spark: Any, s3: S3Server, tmp_path: Path) -> None:
    """Two files, and then the commands on versions."""
    config = make_config(tmp_path)
    results = []
    for each in (config, at(config, f"s3a://{BUCKET}/run-2", f"s3a://{BUCKET}/in-2")):
        put_file(each, 0)
        runs = commands(s3_spark, each, tmp_path)
        for name in ("ingest", "score", "refine"):
            runs[name]()
        put_file(each, 1)
        done = {name: run() for name, run in runs.items()}
        pin, written = done["corpus pin"], done["export"]
        pinned = plain_rows(s3_spark, each.layout.pinned(CORPUS, pin.version))
        numbers = (pin.version, pin.fingerprint, written.fingerprint, written.n_instances)
        results.append((content(s3_spark, each), pinned, numbers))
    assert results[0] == results[1]
    assert results[0][1]
