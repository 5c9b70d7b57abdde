"""`verify` on roots that the jobs made: all holds; and each kind of damage, written into the tables, is found."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs import cli, ingest, pipeline, refine, score, session
from jobs.stage_runner import execute
from jobs.stages import stage_named
from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig, SelectConfig
from miniplm_udf.config.sections import ChunkingConfig, IngestConfig, SplitConfig
from miniplm_udf.errors import CorpusError
from miniplm_udf.store import corpus_records, tables
from miniplm_udf.upkeep import preflight, verify
from tests.support.right_experiment import Place
from tests.support.score_tables import FakeFactory, experiment, texts, two_models

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
    rows = spark.read.format("delta").load(copy.layout.table("instances"))
    new = rows.where("split = 'pool'").limit(2).selectExpr("* EXCEPT (instance_id)", "uuid() AS instance_id")
    new.select(rows.columns).write.format("delta").mode("append").save(copy.layout.table("instances"))
    behind = [check for check in verify.verify(spark, copy.root) if check.behind]
    assert [(check.name, check.behind, check.ok) for check in behind] == [
        ("reference: pool = scored + rejected", 2, True),
        ("teacher: pool = scored + rejected", 2, True),
    ]


def _append_again(spark: Any, config: ExperimentConfig, table: str) -> None:
    frame = spark.read.format("delta").load(config.layout.table(table)).limit(1)
    again = spark.createDataFrame(frame.collect(), frame.schema)
    again.write.format("delta").mode("append").save(config.layout.table(table))


def _sql(spark: Any, config: ExperimentConfig, table: str, statement: str) -> None:
    """With ONE and OTHER for the ids of two kept instances."""
    kept = spark.read.format("delta").load(config.layout.table("refined/kept"))
    one, other = kept.selectExpr("min(instance_id)", "max(instance_id)").collect()[0]
    statement = statement.replace("TABLE", f"delta.`{config.layout.table(table)}`")
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


@pytest.mark.long
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
    folder = Path(storage.local_path(copy.layout.table("refined/kept")))
    next(folder.glob("*.parquet")).unlink()
    assert failed(spark, copy).keys() == {"corpus kept, version 1: its files are there"}


def check(spark: Any, config: ExperimentConfig, name: str) -> None:
    """The check before a stage."""
    stage = stage_named(name)
    preflight.check(spark, config, stage.needed_tables, stage.queries)


def test_a_stage_whose_table_is_gone_stops_and_names_it(spark: Any, copy: ExperimentConfig, tmp_path: Path) -> None:
    folder = Path(storage.local_path(storage.join(copy.root, "tables")))
    for stage in ("ingest", "score", "stream", "refine"):
        check(spark, copy, stage)
    (folder / "scores").rename(tmp_path / "scores")
    by_score = r"tables/scores .*remove .*/_checkpoints/score-.*, .*/_checkpoints/score_matrix-.* and run again"
    with pytest.raises(CorpusError, match=by_score):
        execute(stage_named("score"), spark, copy)
    check(spark, copy, "ingest")
    # Created again, as a run that continues would do.
    tables.create(spark, copy.layout.table("scores"), schemas.SCORES)
    with pytest.raises(CorpusError, match=r"tables/scores .*/_checkpoints/score_matrix-"):
        check(spark, copy, "score")
    shutil.rmtree(folder / "scores")
    (tmp_path / "scores").rename(folder / "scores")
    check(spark, copy, "score")
    shutil.rmtree(folder / "instances")
    for stage, checkpoint in (("ingest", "/_checkpoints/ingest-jsonl"), ("score", r"remove the checkpoints ingest-\*")):
        with pytest.raises(CorpusError, match=rf"tables/instances\b.*{checkpoint}"):
            check(spark, copy, stage)
    rules = storage.read_json(copy.layout.table("instances.json"))
    storage.write_json(copy.layout.table("instances.json"), rules | {"chunking": {"copies": "packed once"}})
    with pytest.raises(CorpusError, match=r"tables/document_keys, which .*or ingest into a new root"):
        preflight.check(spark, copy, pipeline.NEEDED)
    shutil.rmtree(Path(storage.local_path(copy.root)) / "_checkpoints")
    check(spark, copy, "ingest")
    (folder / "instances").mkdir()
    (folder / "instances" / "part.parquet").write_bytes(b"x")
    with pytest.raises(CorpusError, match="files without the log"):
        tables.create(spark, copy.layout.table("instances"), schemas.INSTANCES)


@pytest.mark.parametrize(
    ("table", "command", "remedy"),
    [
        ("rejects", "ingest", "remove .*/_checkpoints/ingest-jsonl and run again"),
        ("rejects", "score", "remove .*/_checkpoints/score-.* and run again"),
        ("rejects", "report", r"remove the checkpoints ingest-\* and score-\*"),
        ("instances", "annotate", r"remove the checkpoints ingest-\*"),
        ("instances", "pack", r"remove the checkpoints ingest-\*"),
        ("instances", "export kept --to parquet", r"remove the checkpoints ingest-\*"),
        ("instances", "inspect kept", r"remove the checkpoints ingest-\*"),
        ("instances", "corpus diff kept kept", r"remove the checkpoints ingest-\*"),
        ("scores", "run", r"remove the checkpoints score-\*"),
        ("scores", "maintain", r"remove the checkpoints score-\*"),
        ("scores", "corpus take-down --id x", r"remove the checkpoints score-\*"),
        ("score_matrix", "refine", "run `miniplm score`"),
        ("score_matrix", "refine --follow", "run `miniplm score`"),
        ("score_matrix", "corpus rebuild kept@1", "run `miniplm score`"),
        ("score_matrix", "proxy", "run `miniplm score`"),
        ("corpora", "corpus list", "run `miniplm refine`"),
        ("corpora", "corpus pin kept", "run `miniplm refine`"),
    ],
)
def test_a_command_names_the_table_that_it_needs_and_how_to_get_it_back(
    spark: Any, made: tuple[ExperimentConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], table: str, command: str, remedy: str,
) -> None:  # fmt: skip
    config, folder = made
    right = Place(tmp_path).config
    kept = {"score": "teacher_nll_mean", "select": {"ratio": 0.5}}
    train = {"steps": 4, "batch_sequences": 1}
    student = {"corpus": "kept", "tokenizer": "bpe", "architecture": {"model_type": "llama"}, "train": train}
    experiment_file = {
        "root": config.root, "models": {"teacher": right["models"]["teacher"]}, "annotate": {"duplicates": True},
        "ingest": right["ingest"],
        "proxy": {"score": "teacher_nll_mean"},
        "refine": {"tokens_of": "teacher", "corpora": {"kept": kept}}, "tokenizers": {"bpe": {"vocab_size": 300}},
        "students": {"student": student},
    }  # fmt: skip
    (folder / "conf.yaml").write_text(json.dumps(experiment_file))
    monkeypatch.setattr(spark, "stop", lambda: None)
    monkeypatch.setattr(session, "make_session", lambda config, name: spark)
    words, place = command.split(), Path(storage.local_path(config.layout.table(table)))
    at = 2 if words[0] == "corpus" else 1
    place.rename(tmp_path / "away")
    try:
        assert cli.main([*words[:at], "-c", str(folder / "conf.yaml"), *words[at:]]) == 1
    finally:
        (tmp_path / "away").rename(place)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("miniplm: ")]
    assert len(said) == 1
    assert re.search(rf"CorpusError: root .*tables/{table}\b.*[Pp]ut .* back from a copy[,;] or {remedy}", said[0])


def test_a_corpus_is_not_made_again_under_the_numbers_of_its_lost_versions(
    spark: Any, copy: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(storage.local_path(copy.layout.table("refined/kept")))
    with pytest.raises(CorpusError, match=r"refined/kept: expected the versions \[1\].*refine under another name"):
        refine.run(spark, copy)
    with pytest.raises(CorpusError, match=r"refined/kept: expected the versions \[1\].*put it back from a copy"):
        corpus_records.read_corpus(spark, copy.root, "kept")
    with caplog.at_level("WARNING", logger="miniplm"):
        preflight.check(spark, copy, ["corpora"])
    assert "expected the table tables/refined/kept, which the table tables/corpora names" in caplog.text
    shutil.rmtree(storage.local_path(copy.layout.table("scores")))
    assert failed(spark, copy).keys() == {
        "scores: the table is there",
        "corpus kept, version 1: its files are there",
    }


def test_no_root_is_an_error(spark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CorpusError, match="nothing to verify"):
        verify.verify(spark, str(tmp_path))
    assert cli.main(["verify"]) == 2
    assert "either -c CONFIG or --root ROOT" in capsys.readouterr().err
