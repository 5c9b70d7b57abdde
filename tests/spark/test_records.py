"""When a stage is skipped, and when not: config, inputs' versions, weights under an old path, and what it made."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs import records
from miniplm_udf import schemas, storage, tables
from miniplm_udf.config import ExperimentConfig, load_config
from tests.spark.conftest import REPOSITORY


@pytest.fixture
def config(spark: Any, tmp_path: Path) -> ExperimentConfig:
    """The demo with a local teacher, and the empty tables that its stages read and write."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "model.safetensors").write_bytes(b"first")
    made = load_config(REPOSITORY / "conf/demo.yaml", [f"root={tmp_path}/root", f"models.teacher.path={teacher}"])
    matrix = schemas.score_matrix(["teacher", "reference"])
    for table in (schemas.INSTANCES, schemas.SCORES, matrix, schemas.CORPORA):
        tables.create(spark, made.table_uri(table.name), table)
    for name in made.refine.corpora:
        table = schemas.refined(name, ["teacher", "reference"])
        tables.create(spark, made.table_uri(table.name), table)
    return made


def test_a_stage_is_skipped_until_something_changes(spark: Any, config: ExperimentConfig) -> None:
    assert not records.is_unchanged(spark, config, "refine"), "it never ran"
    records.execute("refine", lambda spark, config: {"kept": {}}, spark, config)
    assert records.is_unchanged(spark, config, "refine")

    refine = dataclasses.replace(config.refine, tokens_of="reference")
    assert not records.is_unchanged(spark, dataclasses.replace(config, refine=refine), "refine")

    uri = config.table_uri("score_matrix")
    spark.sql(f"ALTER TABLE delta.`{storage.local_path(uri)}` SET TBLPROPERTIES ('a' = 'b')")
    assert not records.is_unchanged(spark, config, "refine"), "its input has a new version"
    records.execute("refine", lambda spark, config: {"kept": {}}, spark, config)
    assert records.is_unchanged(spark, config, "refine")

    shutil.rmtree(storage.local_path(config.table_uri("refined/difference")))
    assert not records.is_unchanged(spark, config, "refine"), "what it made is gone"


def test_other_weights_under_an_old_path_are_scored_anew(spark: Any, config: ExperimentConfig) -> None:
    summary = {"tokens_per_second": {"teacher": 10.0, "reference": None}}
    records.execute("score", lambda spark, config: dict(summary), spark, config)
    assert records.is_unchanged(spark, config, "score")
    faster = dataclasses.replace(config, score=dataclasses.replace(config.score, tokens_per_batch=1))
    assert records.is_unchanged(spark, faster, "score"), "how fast is not part of what"
    (Path(str(config.models["teacher"].path)) / "model.safetensors").write_bytes(b"second and longer")
    assert not records.is_unchanged(spark, config, "score")


def test_a_run_that_scores_nothing_keeps_the_rates_of_the_last_scoring(spark: Any, config: ExperimentConfig) -> None:
    for rates in ({"teacher": 10.0, "reference": 5.0}, {"teacher": None, "reference": 6.0}):
        records.execute("score", lambda spark, config, rates=rates: {"tokens_per_second": dict(rates)}, spark, config)
    record = records.read_record(config, "score")
    assert record is not None
    assert record["summary"]["tokens_per_second"] == {"teacher": 10.0, "reference": 6.0}


def test_a_stage_that_fails_leaves_no_record(spark: Any, config: ExperimentConfig) -> None:
    def fail(spark: Any, config: ExperimentConfig) -> dict[str, Any]:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        records.execute("refine", fail, spark, config)
    assert records.read_record(config, "refine") is None
