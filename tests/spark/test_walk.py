"""From a metric of a run to the micro-batches that scored its texts, by the code of docs/tracking.md."""

import collections
import dataclasses
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import pack, refine, score
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig, SelectConfig
from miniplm_udf.config.sections import PackConfig, TokenizerConfig
from miniplm_udf.config.tracking import MlflowConfig
from miniplm_udf.config.training import StudentConfig, TrainConfig
from miniplm_udf.store import tables
from tests.support.killed_training import train_small
from tests.support.score_tables import FakeFactory, experiment, texts, two_models, write_instances
from tests.support.spark_session import REPOSITORY
from tests.support.trainer_roots import LLAMA

DIFFERENCE = "reference_nll_mean - teacher_nll_mean"


def corpus(ratio: float) -> CorpusConfig:
    return CorpusConfig(score=DIFFERENCE, select=SelectConfig(ratio=ratio))


@pytest.fixture
def config(tmp_path: Path) -> ExperimentConfig:
    train = TrainConfig(steps=4, batch_sequences=2, micro_batch_sequences=2, warmup_steps=1, log_every_steps=1)
    return dataclasses.replace(
        experiment(tmp_path / "root", two_models(tmp_path), {"kept": corpus(0.5)}, max_bytes_per_trigger="1"),
        tokenizers={"bpe": TokenizerConfig(vocab_size=300)},
        pack=PackConfig(sequence_length=16),
        students={"small": StudentConfig(corpus="kept", tokenizer="bpe", architecture=LLAMA, train=train)},
        mlflow=MlflowConfig(system_metrics=False),
    )


def score_in_several_batches(spark: Any, config: ExperimentConfig, folder: Path) -> dict[str, int]:
    """Scores twenty texts, one file in a micro-batch; returns the number of the micro-batch of each instance."""
    write_instances(spark, config, texts(20))
    factories = {"teacher": FakeFactory(1.0, f"{folder}/log"), "reference": FakeFactory(2.0, f"{folder}/log")}
    score.run(spark, config, factories)
    rows = tables.read(spark, config.layout.table("scores")).collect()
    return {row["instance_id"]: row["batch_id"] for row in rows}


def code_of_the_walk() -> str:
    section = (REPOSITORY / "docs/tracking.md").read_text(encoding="utf-8").split("## From a metric to the scores")[1]
    match = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert match is not None
    return match[1]


@pytest.mark.long
def test_a_metric_leads_to_the_batches_that_scored_its_texts(
    spark: Any, config: ExperimentConfig, tmp_path: Path
) -> None:
    batch_of = score_in_several_batches(spark, config, tmp_path)
    refine.run(spark, config)
    pack.run(spark, config)
    training = train_small(config)
    kept = {row["instance_id"] for row in tables.read(spark, config.layout.refined("kept")).collect()}
    counts = collections.Counter(batch_of[kept_id] for kept_id in kept)
    assert len(counts) > 1, "texts of several micro-batches have to be kept"
    expected = {(model, batch): count for model in ("teacher", "reference") for batch, count in counts.items()}

    # Newer versions of both tables do not belong to the run.
    newer = dataclasses.replace(config, refine=dataclasses.replace(config.refine, corpora={"kept": corpus(1.0)}))
    refine.run(spark, newer)
    pack.run(spark, newer)

    names: dict[str, Any] = {"tracking_uri": config.mlflow_uri(), "run_id": training["run_id"]}
    exec(code_of_the_walk(), names)
    assert names["loss"] == pytest.approx(training["final_loss"])
    assert names["lineage"] == training["lineage"]
    batches = pa.table(names["batches"]).to_pylist()
    assert {(row["model_id"], row["batch_id"]): row["n_instances"] for row in batches} == expected
    # Each of them is a committed micro-batch of the table.
    rows = tables.read(spark, config.layout.table("scores")).select("run_id", "query_id", "batch_id").distinct()
    assert {(row["run_id"], row["query_id"], row["batch_id"]) for row in batches} == set(map(tuple, rows.collect()))
