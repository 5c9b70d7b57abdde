"""A small finished experiment, made by hand: tables, records of two students, MLflow runs.

For the tests of the report and of the local page.
300 scored pool instances, 20 more scored after the corpora were refined, 40 held out; two versions of the corpus
`difference` (the highest 30 %, then 50 %) and one of `random`. The rows are returned as plain Python, so that a test
counts for itself. Some names and texts are hostile on purpose: markup, mathematics, emoji, NUL.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import write_deltalake

from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig, load_config, to_dict
from miniplm_udf.refinement.refine import resolve_corpus
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.store import tables
from tests.support import model_records

REPOSITORY = Path(__file__).resolve().parents[2]
NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
SOURCES = ("docstrings", "readmes", "licences", "<b>bold</b> & $x_1^$")
HOSTILE = "<script>alert('pwned')</script> & </pre> https://example.org/x ' \" \U0001f600 "
WORDS = ("the", "data", "keeps", "what", "a", "teacher", "knows", "and", "small", "models", "do", "not", "yet", "know")
ALIASES = ["teacher", "reference"]
REVISIONS = {alias: hashlib.sha256(alias.encode()).hexdigest()[:32] for alias in ALIASES}
QUERY = {"query_id": "q" * 32, "batch_id": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """The experiment, and the rows that went into its tables."""

    config: ExperimentConfig
    instances: list[dict[str, Any]]
    matrix: list[dict[str, Any]]
    kept: dict[str, list[dict[str, Any]]]
    run_ids: dict[str, str]

    @property
    def candidates(self) -> list[dict[str, Any]]:
        """Rows that the corpora were chosen from: scored before, at least 32 tokens."""
        return [row for row in self.matrix[:300] if row["teacher_n_tokens"] >= 32]


def report_config(root: Path, *overrides: str) -> ExperimentConfig:
    # There is no table of annotations here, so `where` names none of its columns.
    wheres = [f"refine.corpora.{name}.where=teacher_n_tokens >= 32" for name in ("difference", "random")]
    return load_config(REPOSITORY / "conf/demo.yaml", [f"root={root}", "report.examples=3", *wheres, *overrides])


def score(row: dict[str, Any]) -> float:
    return float(row["reference_nll_mean"] - row["teacher_nll_mean"])


def instance_rows() -> list[dict[str, Any]]:
    """320 pool instances and 40 held out; texts from 40 to 900 characters, some hostile."""
    draw, rows = random.Random(3), []
    for i in range(360):
        words = " ".join(draw.choice(WORDS) for _ in range(draw.randint(8, 180)))
        text = (HOSTILE if i % 7 == 0 else "") + words + ("\x00" if i % 11 == 0 else "")
        digest = hashlib.sha256(f"{i}{text}".encode()).hexdigest()[:32]
        rows.append(
            {
                "instance_id": digest, "stream_id": f"s{i // 2}", "ordinal": i % 2, "document_ids": [f"d{i}"],
                "start_byte": 0, "source": SOURCES[draw.choice((0, 0, 0, 1, 1, 2, 3))], "text": text,
                "segment_ends": [], "starts_document": True, "ends_document": True,
                "n_bytes": len(text.encode()), "content_hash": digest, "split": "pool" if i < 320 else "heldout",
                "metadata": None, "ingested_at": NOW, **QUERY,
            }
        )  # fmt: skip
    return rows


def matrix_rows(instances: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both models' numbers of each pool instance."""
    draw, rows = random.Random(5), []
    for instance in instances:
        row = {key: instance[key] for key in ("instance_id", "source", "split", "n_bytes", "content_hash")}
        row["instance_batch_id"] = 0
        n_tokens = max(2, instance["n_bytes"] // 4)
        teacher = draw.gauss(2.5, 0.6) + SOURCES.index(instance["source"]) * 0.2
        for alias, mean in (("teacher", teacher), ("reference", teacher + draw.gauss(0.7, 0.5))):
            row |= {
                f"{alias}_nll_mean": mean, f"{alias}_nll_sum_nats": mean * n_tokens, f"{alias}_n_tokens": n_tokens,
                f"{alias}_bits_per_byte": mean * n_tokens / math.log(2) / row["n_bytes"],
                f"{alias}_revision": REVISIONS[alias],
            }  # fmt: skip
        rows.append({**row, **QUERY})
    return rows


def _score_rows(matrix: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "instance_id": row["instance_id"], "model_id": alias, "model_revision": REVISIONS[alias],
            "tokenizer_hash": "t" * 32, "nll_sum_nats": row[f"{alias}_nll_sum_nats"],
            "n_tokens": row[f"{alias}_n_tokens"], "n_bytes": row["n_bytes"],
            "source": row["source"], "split": row["split"], "content_hash": row["content_hash"],
            "text_bytes": row["n_bytes"], "instance_batch_id": 0, "dtype": "float32", "context_tokens": 512,
            "run_id": "r", "scored_at": NOW, **QUERY,
        }
        for row in matrix for alias in ALIASES
    ]  # fmt: skip


def _reject_rows() -> list[dict[str, Any]]:
    places = [("ingest", "invalid_json")] * 4 + [("ingest", "invalid_utf8")] * 2
    places += [(f"score:{REVISIONS['teacher']}", "no_tokens")] * 3
    return [
        {
            "reject_id": f"{i:032x}", "stage": stage, "reason": reason, "detail": None, "source_file": None,
            "instance_id": None, "raw": b"\xff", "n_bytes": 1, "rejected_at": NOW, **QUERY,
        }
        for i, (stage, reason) in enumerate(places)
    ]  # fmt: skip


def write(config: ExperimentConfig, table: schemas.Table, rows: list[dict[str, Any]]) -> None:
    """Appends rows without Spark: a commit here takes milliseconds."""
    declared = table.arrow_schema()
    arrow = pa.Table.from_pylist([{name: row[name] for name in table.column_names} for row in rows], schema=declared)
    write_deltalake(config.layout.table(table.name), arrow, mode="append")


def refine(spark: Any, config: ExperimentConfig, name: str, kept: list[dict[str, Any]], n_candidates: int) -> None:
    """Commits `kept` as the next version of refined/<name>, with its provenance and its row in `corpora`."""
    table = schemas.refined(name, ALIASES)
    rows = [{**row, "n_tokens": row["teacher_n_tokens"], "score": score(row)} for row in kept]
    frame = spark.createDataFrame([tuple(row[c] for c in table.column_names) for row in rows], table.spark_schema())
    record = {
        "name": name,
        "config": json.dumps({**to_dict(resolve_corpus(config, name)), "tokens_of": "teacher", "models": ALIASES}),
        "inputs": json.dumps({"matrix_version": 0, "model_revisions": REVISIONS}),
        "threshold": min(row["score"] for row in rows), "n_candidates": n_candidates, "candidate_tokens": 54321,
        "n_instances": len(rows), "n_tokens": sum(row["n_tokens"] for row in rows), "fingerprint": f"f{len(rows)}",
        "code_revision": "0.1.0", "created_at": NOW,
    }  # fmt: skip
    metadata = {key: value for key, value in record.items() if key != "created_at"}
    record["version"] = tables.overwrite(frame, config.layout.table(table.name), table, metadata)
    write(config, schemas.CORPORA, [record])


def _student(config: ExperimentConfig, client: Any, experiment: str, name: str, bits: float) -> str:
    """Records and the MLflow run of one trained and evaluated student."""
    run_id = str(client.create_run(experiment, run_name=name, tags={"delta_table_version": "1"}).info.run_id)
    for step in range(5, 101, 5):
        client.log_metric(run_id, "train_loss", 4.0 + 5.0 * math.exp(-step / 30) + bits / 10, step=step)
    client.log_metric(run_id, "heldout_bits_per_byte", bits)
    client.log_metric(run_id, "heldout_nats_per_token", bits * 1.7)
    client.set_terminated(run_id)
    model_records.write_training(config, name, run_id=run_id)
    loss = model_records.text_loss(bits)
    by_source = {source: dataclasses.replace(loss, bits_per_byte=bits + i / 7) for i, source in enumerate(SOURCES)}
    sets = {"heldout": model_records.set_evaluation(loss, by_source), "dclm": model_records.set_evaluation(loss)}
    evaluation = model_records.evaluation(sets, {"piqa": bits / 4, "my_task": bits / 5})
    storage.write_json(config.layout.model(name, "evaluation.json"), dataclasses.asdict(evaluation))
    return run_id


def _students(config: ExperimentConfig) -> dict[str, str]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=config.mlflow_uri())
    experiment = client.create_experiment(config.mlflow.experiment, artifact_location=config.artifact_uri())
    losses = {"miniplm": 2.1034, "conventional": 2.1271}
    return {name: _student(config, client, experiment, name, bits) for name, bits in losses.items()}


@functools.cache
def build_root(spark: Any, folder: Path) -> Built:
    """Writes the whole experiment under `folder`, once for all test files of a run."""
    config = report_config(folder)
    instances = instance_rows()
    matrix = matrix_rows([row for row in instances if row["split"] == "pool"])
    write(config, schemas.INSTANCES, instances)
    write(config, schemas.SCORES, _score_rows(matrix))
    write(config, schemas.REJECTS, _reject_rows())
    write(config, schemas.score_matrix(ALIASES), matrix[:300])
    for alias in ALIASES:
        warnings = ["chat-tuned <model>", "quantised: Q4_1"] if alias == "teacher" else []
        description = ModelDescription(
            model_id=alias, model_revision=REVISIONS[alias], tokenizer_hash="t" * 32, dtype="float32",
            context_tokens=512, window_overlap_tokens=0, context_prefix="none", document_separator="x",
            document_separator_id=0, prefix_token_id=None, vocab_size=300, n_parameters=1_234_567, weights_hash="w",
            path="p", warnings=warnings,
        )  # fmt: skip
        storage.write_json(config.layout.model_record(alias), description.to_dict())
    candidates = [row for row in matrix[:300] if row["teacher_n_tokens"] >= 32]
    ranked = sorted(candidates, key=lambda row: (-score(row), row["instance_id"]))
    kept = {
        "difference": ranked[: len(ranked) // 2],
        "random": random.Random(0).sample(candidates, len(candidates) // 2),
    }
    refine(spark, config, "difference", ranked[: int(len(ranked) * 0.3)], len(candidates))
    refine(spark, config, "difference", kept["difference"], len(candidates))
    refine(spark, config, "random", kept["random"], len(candidates))
    write(config, schemas.score_matrix(ALIASES), matrix[300:])
    return Built(config=config, instances=instances, matrix=matrix, kept=kept, run_ids=_students(config))
