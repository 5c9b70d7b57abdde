"""When a stage is skipped, and when not: config, inputs' versions, weights under an old path, and what it made."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.stage import Stage
from jobs.stage_runner import execute
from jobs.stages import stage_named
from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.store import tables
from tests.support.spark_session import REPOSITORY
from tests.support.stage_summaries import summary_of


def stage(name: str, **values: Any) -> Stage:
    """A stage that does nothing and returns a summary with these values."""
    summary = summary_of(stage_named(name), **values)
    return dataclasses.replace(stage_named(name), run=lambda spark, config, options: summary)


@pytest.fixture
def config(spark: Any, tmp_path: Path) -> ExperimentConfig:
    """The demo with a local teacher, and the empty tables that its stages read and write."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "model.safetensors").write_bytes(b"first")
    made = load_config(REPOSITORY / "conf/demo.yaml", [f"root={tmp_path}/root", f"models.teacher.path={teacher}"])
    matrix = schemas.score_matrix(["teacher", "reference"])
    for table in (schemas.INSTANCES, schemas.SCORES, matrix, schemas.CORPORA):
        tables.create(spark, made.layout.table(table.name), table)
    for name in made.refine.corpora:
        table = schemas.refined(name, ["teacher", "reference"])
        tables.create(spark, made.layout.table(table.name), table)
    return made


def test_a_stage_is_skipped_until_something_changes(spark: Any, config: ExperimentConfig) -> None:
    refine = stage("refine")
    assert not refine.is_unchanged(spark, config), "it never ran"
    execute(refine, spark, config)
    assert refine.is_unchanged(spark, config)

    changed = dataclasses.replace(config.refine, tokens_of="reference")
    assert not refine.is_unchanged(spark, dataclasses.replace(config, refine=changed))

    uri = config.layout.table("score_matrix")
    spark.sql(f"ALTER TABLE delta.`{storage.local_path(uri)}` SET TBLPROPERTIES ('a' = 'b')")
    assert not refine.is_unchanged(spark, config), "its input has a new version"
    execute(refine, spark, config)
    assert refine.is_unchanged(spark, config)

    shutil.rmtree(storage.local_path(config.layout.table("refined/difference")))
    assert not refine.is_unchanged(spark, config), "what it made is gone"


def test_other_weights_under_an_old_path_are_scored_again(spark: Any, config: ExperimentConfig) -> None:
    score = stage("score", tokens_per_second={"teacher": 10.0, "reference": None})
    execute(score, spark, config)
    assert score.is_unchanged(spark, config)
    faster = dataclasses.replace(config, score=dataclasses.replace(config.score, tokens_per_batch=1))
    assert score.is_unchanged(spark, faster), "how fast is not part of what"
    (Path(str(config.models["teacher"].path)) / "model.safetensors").write_bytes(b"second and longer")
    assert not score.is_unchanged(spark, config)


@pytest.mark.long
def test_a_run_that_scores_nothing_keeps_the_rates_of_the_last_scoring(spark: Any, config: ExperimentConfig) -> None:
    for rates in ({"teacher": 10.0, "reference": 5.0}, {"teacher": None, "reference": 6.0}):
        execute(stage("score", tokens_per_second=rates), spark, config)
    record = stage_named("score").record(config)
    assert record is not None
    assert record.summary.tokens_per_second == {"teacher": 10.0, "reference": 6.0}


def test_a_stage_that_fails_leaves_no_record(spark: Any, config: ExperimentConfig) -> None:
    def fail(spark: Any, config: ExperimentConfig, options: Any) -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        execute(dataclasses.replace(stage_named("refine"), run=fail), spark, config)
    assert stage_named("refine").record(config) is None
