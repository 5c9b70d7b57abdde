"""The wide table against a pivot done by hand: rows that come together, apart, twice, or never."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from miniplm_udf import schemas
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import ModelConfig, ScoreConfig, StreamConfig
from miniplm_udf.layout import Root
from miniplm_udf.scores import matrix
from miniplm_udf.store import tables
from miniplm_udf.streams.runner import QueryRunner
from tests.support.score_tables import experiment, instance_id, texts

REVISIONS = {"teacher": "rev-t", "reference": "rev-r"}
TABLE = schemas.score_matrix(list(REVISIONS))


@dataclasses.dataclass(frozen=True)
class Tables:
    """A root, and a way to append score rows to it. There are no instances: the matrix does not need them."""

    spark: Any
    config: ExperimentConfig

    @property
    def root(self) -> Root:
        return self.config.layout

    def score(
        self, text: str, revision: str, nll: float, n_tokens: int = 10, missing_bytes: int = 0
    ) -> tuple[Any, ...]:
        n_bytes = len(text.encode())
        instance = ("web", "pool", instance_id("content" + text), n_bytes)
        scored = ("h" * 32, nll, n_tokens, n_bytes - missing_bytes)
        return (instance_id(text), "alias", revision, *scored, *instance, 0, "float32", 64, "run")

    def append(self, rows: list[tuple[Any, ...]]) -> Any:
        """Appends score rows in one commit and returns them as a frame."""
        from pyspark.sql import functions as F

        fields = schemas.SCORES.spark_schema().fields[:15]
        frame = self.spark.createDataFrame(rows, ", ".join(f"{f.name} {f.dataType.simpleString()}" for f in fields))
        frame = frame.select(
            "*", F.current_timestamp().alias("scored_at"), F.lit("s" * 32).alias("query_id"),
            F.lit(0).cast("bigint").alias("batch_id"),
        )  # fmt: skip
        tables.append(frame, self.root.table("scores"), schemas.SCORES)
        return frame

    def matrix(self) -> dict[str, Any]:
        rows = self.spark.read.format("delta").load(self.root.table("score_matrix")).collect()
        found = {row["instance_id"]: row.asDict() for row in rows}
        assert len(found) == len(rows)
        return found


@pytest.fixture
def made(spark: Any, tmp_path: Path) -> Tables:
    return Tables(spark, experiment(tmp_path / "root", {alias: ModelConfig(path="/nowhere") for alias in REVISIONS}))


def test_rows_that_come_together_or_apart_are_pivoted_once(made: Tables) -> None:
    together, apart, half, partly, other, _ = texts(6)
    first = made.append(
        [
            made.score(together, "rev-t", 30.0),
            made.score(together, "rev-r", 50.0),
            made.score(apart, "rev-t", 1.0),
            made.score(half, "rev-t", 2.0),
            made.score(partly, "rev-t", 3.0, missing_bytes=2),
            made.score(partly, "rev-r", 4.0),
            made.score(other, "another", 9.0),
        ]
    )
    matrix.write_batch(first, REVISIONS, made.root, "m" * 32, 0)
    assert sorted(made.matrix()) == sorted(map(instance_id, (together, partly)))
    second = made.append([made.score(apart, "rev-r", 5.0, n_tokens=20)])
    matrix.write_batch(second, REVISIONS, made.root, "m" * 32, 1)
    found = made.matrix()
    assert sorted(found) == sorted(map(instance_id, (together, partly, apart)))
    n_bytes = len(apart.encode())
    assert found[instance_id(apart)] == {
        "instance_id": instance_id(apart), "source": "web", "n_bytes": n_bytes, "split": "pool",
        "content_hash": instance_id("content" + apart), "instance_batch_id": 0,
        "teacher_nll_mean": 0.1, "teacher_nll_sum_nats": 1.0, "teacher_n_tokens": 10,
        "teacher_bits_per_byte": pytest.approx(1.0 / math.log(2) / n_bytes), "teacher_revision": "rev-t",
        "reference_nll_mean": 0.25, "reference_nll_sum_nats": 5.0, "reference_n_tokens": 20,
        "reference_bits_per_byte": pytest.approx(5.0 / math.log(2) / n_bytes), "reference_revision": "rev-r",
        "query_id": "m" * 32, "batch_id": 1,
    }  # fmt: skip
    assert found[instance_id(partly)]["teacher_bits_per_byte"] is None
    assert found[instance_id(partly)]["reference_bits_per_byte"] is not None
    # A row of the first micro-batch whose partner the table had by then already: emitted once.
    matrix.write_batch(made.spark.createDataFrame(second.collect(), second.schema), REVISIONS, made.root, "m" * 32, 2)
    # A replay of each micro-batch, batch 0 with its replacing of the table included, changes nothing.
    matrix.write_batch(second, REVISIONS, made.root, "m" * 32, 1)
    matrix.write_batch(first, REVISIONS, made.root, "m" * 32, 0)
    assert made.matrix() == found
    schema = made.spark.read.format("delta").load(made.root.table("score_matrix")).schema
    assert schema == TABLE.spark_schema()


def test_a_table_of_other_models_is_built_again(made: Tables) -> None:
    one, two, *_ = texts(6)
    made.append([made.score(text, revision, 1.0) for text in (one, two) for revision in ("rev-t", "rev-r", "rev-n")])

    def update(revisions: dict[str, str]) -> dict[str, Any]:
        checkpoint = made.config.layout.checkpoint(matrix.checkpoint_name(revisions))
        query = matrix.MatrixQuery(made.spark, revisions, made.root, checkpoint, ScoreConfig())
        QueryRunner(made.spark, made.config.root, StreamConfig()).run([query])
        return made.matrix()

    old = update(REVISIONS)
    assert sorted(old) == sorted(map(instance_id, (one, two)))
    new = update({"teacher": "rev-t", "reference": "rev-n"})
    assert {row["reference_revision"] for row in new.values()} == {"rev-n"}
    assert sorted(new) == sorted(old)
    # The old checkpoint has seen everything, but the table is not its work any more.
    again = update(REVISIONS)
    assert {row["reference_revision"] for row in again.values()} == {"rev-r"}
    assert sorted(again) == sorted(old)
