"""Tables by name: for this session alone, or in a schema for every session of the catalog."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from pyspark.errors import AnalysisException

from jobs.stage import Options
from jobs.stage_runner import execute
from jobs.stages import stage_named
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.config.spark import SparkConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.store import catalog
from tests.support.matrices import ALIASES, DIFFERENCE, matrix_rows, with_corpora, write_matrix, write_record
from tests.support.score_tables import experiment, texts, write_instances

COUNT = "SELECT count(*) FROM {}kept_text WHERE text IS NOT NULL AND score IS NOT NULL"


def test_a_root_has_names(spark: Any, tmp_path: Path) -> None:
    models = {alias: ModelConfig(path="/nowhere") for alias in ALIASES}
    # A space, and what ends a string of SQL.
    config = with_corpora(experiment(tmp_path / "it's a root", models), kept=CorpusConfig(score=DIFFERENCE))
    write_instances(spark, config, texts(30))
    rows = [
        {**row, "instance_id": instance["instance_id"]}
        for row, instance in zip(
            matrix_rows(30), spark.read.format("delta").load(config.layout.table("instances")).collect(), strict=True
        )
    ]
    write_matrix(spark, config, rows)
    for alias in ALIASES:
        write_record(config, alias)
    config = dataclasses.replace(config, spark=SparkConfig(schema="a_schema"))
    kept = execute(stage_named("refine"), spark, config).kept["kept"]
    other = spark.newSession()
    try:
        assert other.sql(COUNT.format("a_schema.")).collect()[0][0] == kept > 5
        assert other.sql("SELECT count(*) FROM a_schema.score_matrix").collect()[0][0] == 30
        with pytest.raises(AnalysisException):
            other.sql("SELECT * FROM score_matrix")
        # The names follow the tables.
        write_matrix(spark, config, [{**row, "instance_id": f"{n:032x}"} for n, row in enumerate(rows)])
        assert other.sql("SELECT count(*) FROM a_schema.score_matrix").collect()[0][0] == 60
        names = catalog.register_tables(other, config.root)
        assert names == catalog.register_tables(spark, config.root, "a_schema")
        assert {"instances", "score_matrix", "corpora", "refined_kept", "kept_text"} == set(names)
        assert other.sql(COUNT.format("")).collect()[0][0] == kept
        elsewhere = experiment(tmp_path / "elsewhere", models)
        write_matrix(spark, elsewhere, matrix_rows(3))
        with pytest.raises(ConfigError, match=r"a_schema\.score_matrix, found .*a root"):
            catalog.register_tables(spark, elsewhere.root, "a_schema")
        # A stage does no work then.
        stage = dataclasses.replace(stage_named("refine"), run=never)
        with pytest.raises(ConfigError, match=r"a_schema\.score_matrix"):
            execute(stage, spark, dataclasses.replace(elsewhere, spark=config.spark))
    finally:
        spark.sql("DROP SCHEMA a_schema CASCADE")


def never(spark: Any, config: ExperimentConfig, options: Options) -> dict[str, Any]:
    raise AssertionError("no work was expected")


def test_a_schema_is_a_name() -> None:
    for name in ("", "a.b.c", "a-b", "x; DROP TABLE y"):
        with pytest.raises(ConfigError, match=r"spark\.schema: expected schema or catalog\.schema"):
            SparkConfig(schema=name)
