"""`verify` on roots that the jobs made: all holds; and each kind of damage, written into the tables, is found."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs import cli, ingest, refine, score
from miniplm_udf import storage
from miniplm_udf.config import ChunkingConfig, CorpusConfig, ExperimentConfig, IngestConfig, SelectConfig, SplitConfig
from miniplm_udf.errors import CorpusError
from miniplm_udf.upkeep import verify
from tests.spark.score_tables import FakeFactory, experiment, texts, two_models

CORPUS = {"kept": CorpusConfig(where="true", select=SelectConfig(ratio=0.5))}


@pytest.fixture(scope="module")
def made(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExperimentConfig, Path]:
    """A root that went through ingest, score (in three micro-batches) and refine; one text is rejected by a model."""
    folder = tmp_path_factory.mktemp("verified")
    config = dataclasses.replace(
        experiment(folder / "root", two_models(folder), CORPUS, max_bytes_per_trigger="1b"),
        ingest=IngestConfig(
            input=f"{folder}/*.jsonl", chunking=ChunkingConfig(mode="document", max_tokens=1025),
            split=SplitConfig(reference=0.2, heldout=0), state_partitions=1, max_files_per_trigger=1,
        ),
    )  # fmt: skip
    for number in range(3):
        rows = [{"id": text, "text": text} for text in [*texts(6, start=6 * number), f"fail {number}"]]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "no json\n")
    ingest.run(spark, config)
    log = str(folder / "calls.log")
    score.run(spark, config, {"teacher": FakeFactory(1.0, log), "reference": FakeFactory(2.0, log)})
    refine.run(spark, config)
    return config, folder


@pytest.fixture
def copy(made: tuple[ExperimentConfig, Path], tmp_path: Path) -> ExperimentConfig:
    """The same root again, to be damaged."""
    config, _ = made
    shutil.copytree(storage.local_path(config.root), tmp_path / "root")
    return dataclasses.replace(config, root=str(tmp_path / "root"))


def failed(spark: Any, config: ExperimentConfig) -> dict[str, verify.Check]:
    return {check.name: check for check in verify.verify(spark, config.root) if not check.ok}


def test_a_sound_root_holds_and_what_comes_is_behind(spark: Any, copy: ExperimentConfig) -> None:
    checks = verify.verify(spark, copy.root)
    assert [check for check in checks if not check.ok or check.behind or check.note] == []
    sums = {check.name: check.found for check in checks}
    assert sums["ingest-jsonl: read = instances + rejected"] == 3 * 7 + 3
    assert {"teacher: pool = scored + rejected", "corpus kept, version 1: fingerprint"} <= sums.keys()
    rows = spark.read.format("delta").load(copy.table_uri("instances"))
    new = rows.where("split = 'pool'").limit(2).selectExpr("* EXCEPT (instance_id)", "uuid() AS instance_id")
    new.select(rows.columns).write.format("delta").mode("append").save(copy.table_uri("instances"))
    behind = [check for check in verify.verify(spark, copy.root) if check.behind]
    assert [(check.name, check.behind, check.ok) for check in behind] == [
        ("reference: pool = scored + rejected", 2, True),
        ("teacher: pool = scored + rejected", 2, True),
    ]


def _append_again(spark: Any, config: ExperimentConfig, table: str) -> None:
    frame = spark.read.format("delta").load(config.table_uri(table)).limit(1)
    again = spark.createDataFrame(frame.collect(), frame.schema)
    again.write.format("delta").mode("append").save(config.table_uri(table))


def _sql(spark: Any, config: ExperimentConfig, table: str, statement: str) -> None:
    """With ONE and OTHER for the ids of two kept instances."""
    kept = spark.read.format("delta").load(config.table_uri("refined/kept"))
    one, other = kept.selectExpr("min(instance_id)", "max(instance_id)").collect()[0]
    statement = statement.replace("TABLE", f"delta.`{config.table_uri(table)}`")
    spark.sql(statement.replace("ONE", f"'{one}'").replace("OTHER", f"'{other}'"))


def test_rows_that_stand_twice_are_found(spark: Any, copy: ExperimentConfig) -> None:
    for table in ("instances", "scores", "score_matrix", "rejects"):
        _append_again(spark, copy, table)
    found = failed(spark, copy)
    assert found.keys() == {f"{t}: keys are unique" for t in ("instances", "scores", "score_matrix", "rejects")}
    assert all(len(check.examples) == 1 for check in found.values())


def test_rows_that_are_lost_are_found(spark: Any, copy: ExperimentConfig) -> None:
    _sql(spark, copy, "instances", "DELETE FROM TABLE WHERE instance_id = ONE")
    _sql(spark, copy, "score_matrix", "DELETE FROM TABLE WHERE instance_id = OTHER")
    _sql(spark, copy, "corpora", "UPDATE TABLE SET n_instances = n_instances + 1, fingerprint = 'x'")
    assert failed(spark, copy).keys() == {
        "ingest-jsonl: read = instances + rejected",
        "scores: each is of an instance",
        "score_matrix: each is of an instance",
        "score_matrix: holds all complete scores",
        "corpus kept, version 1: rows",
        "corpus kept, version 1: fingerprint",
        "corpus kept, version 1: rows are the matrix's",
    }


def test_scores_that_are_lost_or_changed_are_found(spark: Any, copy: ExperimentConfig) -> None:
    _sql(spark, copy, "scores", "DELETE FROM TABLE WHERE instance_id = ONE AND model_id = 'teacher'")
    _sql(spark, copy, "scores", "UPDATE TABLE SET nll_sum_nats = nll_sum_nats + 1e-9 WHERE instance_id = OTHER")
    assert failed(spark, copy).keys() == {
        "teacher: pool = scored + rejected",
        "score_matrix: each is scored by every model",
        "score_matrix: equals its scores",
    }
    _sql(spark, copy, "scores", "UPDATE TABLE SET instance_batch_id = 99 WHERE instance_id = OTHER")
    assert len(failed(spark, copy)["scores: each repeats its instance"].examples) == 2


def test_a_file_that_went_away_is_found(spark: Any, copy: ExperimentConfig) -> None:
    folder = Path(storage.local_path(copy.table_uri("refined/kept")))
    next(folder.glob("*.parquet")).unlink()
    assert failed(spark, copy).keys() == {"corpus kept, version 1: its files are there"}


def test_no_root_is_an_error(spark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CorpusError, match="nothing to verify"):
        verify.verify(spark, str(tmp_path))
    assert cli.main(["verify"]) == 2
    assert "either -c CONFIG or --root ROOT" in capsys.readouterr().err
