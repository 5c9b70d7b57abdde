"""`miniplm estimate` on real Spark: its counts are those of ingest and score on the same input; it writes nothing."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jobs import command, ingest, score
from jobs import estimate as job
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import (
    ChunkingConfig,
    FieldsConfig,
    IngestConfig,
    ModelConfig,
    PackConfig,
    ScoreConfig,
    SplitConfig,
)
from miniplm_udf.config.training import ReferenceConfig, TrainConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.estimate import estimate as estimate_module
from miniplm_udf.estimate.estimate import estimate
from miniplm_udf.estimate.results import Gpus
from tests.support.score_tables import model_config
from tests.support.tiny_models import make_model_folder

GOOD = [f"Document {i}. " + "hello world, this is a test of the tokenizer! " * (1 + i % 7) for i in range(120)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return model_config(make_model_folder(tmp_path_factory.mktemp("models"), name="teacher", seed=1))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "MEASURE_SECONDS", 0.5)


def config_of(root: Path, teacher: ModelConfig, given: str | Path, **ingest: Any) -> ExperimentConfig:
    return ExperimentConfig(
        root=str(root),
        models={"teacher": teacher},
        ingest=IngestConfig(
            input=str(given),
            chunking=ChunkingConfig(mode="packed", max_tokens=65),
            split=SplitConfig(reference=0.2, heldout=0.1),
            state_partitions=2,
            **ingest,
        ),
        score=ScoreConfig(tokens_per_batch=256),
    )


def jsonl(folder: Path, bad: bool = True) -> Path:
    lines = [json.dumps({"id": i, "text": text, "source": f"s{i % 2}"}) for i, text in enumerate(GOOD)]
    lines += ["{broken", json.dumps({"id": "e", "text": ""}), json.dumps({"id": "m"}), lines[0]] if bad else []
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(lines[:60]) + "\n")
    (folder / "b.jsonl").write_text("\n".join(lines[60:]) + "\n")
    return folder


def run(spark: Any, config: ExperimentConfig, sample_bytes: int = 10**7) -> dict[str, Any]:
    return dataclasses.asdict(estimate(spark, config, sample_bytes, Gpus()))


@pytest.mark.long
def test_of_a_corpus_that_is_read_whole_every_count_is_exact(spark: Any, tmp_path: Path, teacher: ModelConfig) -> None:
    config = config_of(tmp_path / "root", teacher, jsonl(tmp_path / "texts"))
    found = run(spark, config)
    assert not (tmp_path / "root").exists()
    ingested = ingest.run(spark, config)
    scored = score.run(spark, config)
    corpus = found["corpus"]
    assert (corpus["documents"], corpus["instances"]) == (ingested.documents, ingested.instances)
    assert corpus["by_split"] == ingested.by_split
    table = spark.read.format("delta").load(config.layout.table("instances"))
    assert corpus["text_bytes"] == sum(row["n_bytes"] for row in table.collect())
    assert found["models"]["teacher"]["tokens"] == scored.tokens["teacher"]
    assert found["rejects"]["ingest"]["reasons"] == {"invalid_json": 1, "empty_text": 1, "missing_text": 1}
    assert found["rejects"]["score"]["share"] == 0
    assert found["too_many_rejects"] is False
    assert found["sample"]["share"] == 1
    teacher_facts = found["models"]["teacher"]
    # Printed to a hundredth of a second.
    expected = teacher_facts["tokens"] / teacher_facts["tokens_per_second"]
    assert teacher_facts["seconds"] == pytest.approx(expected, rel=0.01, abs=0.006)
    assert found["score"]["stage_seconds"] > teacher_facts["seconds"] + teacher_facts["start_seconds"]
    # Estimated again with everything there: the same.
    assert run(spark, config)["corpus"] == corpus


@pytest.mark.long
def test_a_reference_that_is_not_trained_is_measured_too(spark: Any, tmp_path: Path, teacher: ModelConfig) -> None:
    plain = config_of(tmp_path / "root", teacher, jsonl(tmp_path / "texts"))
    config = ExperimentConfig(
        root=plain.root,
        models={"teacher": teacher, "reference": ModelConfig(context_tokens=64, window_overlap_tokens=8)},
        ingest=plain.ingest,
        score=plain.score,
        pack=PackConfig(sequence_length=64),
        reference=ReferenceConfig(
            architecture={
                "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                "num_attention_heads": 2, "tie_word_embeddings": True,
            },
            train=TrainConfig(steps=20, warmup_steps=0, batch_sequences=4, micro_batch_sequences=2),
        ),
    )  # fmt: skip
    found = run(spark, config)
    assert found["models"]["reference"]["fresh_weights"] is True
    assert found["models"]["reference"]["parameters"] < found["models"]["teacher"]["parameters"]
    assert found["models"]["reference"]["tokens"] == found["models"]["teacher"]["tokens"]
    assert found["reference_training"]["tokens"] == 20 * 4 * 64
    assert found["reference_training"]["seconds"] > 0
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(("kind", "files"), [("parquet", 4), ("delta", 4), ("delta", 40)])
def test_tables_are_sampled(spark: Any, tmp_path: Path, teacher: ModelConfig, kind: str, files: int) -> None:
    rows = [(str(i), text * 2, i) for i, text in enumerate(GOOD * 10)]
    frame = spark.createDataFrame(rows, "name string, body string, other int").repartition(files)
    frame.write.format(kind).save(str(tmp_path / "table"))
    config = config_of(tmp_path / "root", teacher, tmp_path / "table", fields=FieldsConfig(text="body", id="name"))
    whole = run(spark, config)
    assert whole["corpus"]["documents"] == len(rows)
    stored = whole["corpus"]["input_bytes"]
    part = run(spark, config, sample_bytes=stored * 3 // 4)
    assert 0.1 < part["sample"]["share"] < 0.5
    assert part["corpus"]["documents"] == pytest.approx(len(rows), rel=0.1)
    assert part["models"]["teacher"]["tokens"] == pytest.approx(whole["models"]["teacher"]["tokens"], rel=0.25)


def test_what_would_be_rejected_is_exit_code_3(
    spark: Any,
    tmp_path: Path,
    teacher: ModelConfig,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join([json.dumps({"text": text}) for text in GOOD] + ["{bad"] * 30) + "\n")
    config = config_of(tmp_path / "root", teacher, folder)
    monkeypatch.setattr(command, "load_config", lambda path, overrides: config)
    monkeypatch.setattr(job, "run", lambda config, arguments: estimate(spark, config, 8_000_000, Gpus()))
    assert job.main(["-c", "x.yaml"]) == 3
    shown = capsys.readouterr().out
    assert "invalid_json 30)  more than max_reject_share (5.00%)" in shown
    assert "prefix  teacher: no BOS (its tokenizer adds none)" in shown
    assert job.main(["-c", "x.yaml", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["rejects"]["ingest"]["share"] == 30 / 150
    assert not storage.exists(config.root)


def test_a_config_that_ingest_refuses_is_refused(spark: Any, tmp_path: Path, teacher: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="matches no file"):
        run(spark, config_of(tmp_path / "root", teacher, tmp_path / "nothing"))
    fields = FieldsConfig(text="texxt")
    with pytest.raises(ConfigError, match=r"did you mean ingest\.fields\.text=text"):
        run(spark, config_of(tmp_path / "root", teacher, jsonl(tmp_path / "texts"), fields=fields))
