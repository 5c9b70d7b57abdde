"""A score matrix of random rows, the records of its models, and the ids that a corpus keeps."""

import dataclasses
import random
from typing import Any

from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig
from miniplm_udf.store import tables
from tests.support.score_tables import instance_id

ALIASES = ["teacher", "reference"]
DIFFERENCE = "reference_nll_mean - teacher_nll_mean"


def matrix_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Matrix rows with ties, short instances and a few that are not of the pool."""
    rng = random.Random(seed)
    rows = []
    for number in range(n):
        row: dict[str, Any] = {
            "instance_id": f"{rng.getrandbits(128):032x}",
            "source": rng.choice(["web", "code", "books"]),
            "n_bytes": rng.randint(100, 4000),
            "split": "pool" if number % 10 else "heldout",
            "content_hash": "c",
            "instance_batch_id": 0,
            "query_id": "q" * 32,
            "batch_id": number % 2,
        }
        n_tokens = rng.randint(20, 300)
        for alias in ALIASES:
            mean = rng.randint(0, 30) / 10
            row |= {
                f"{alias}_nll_mean": mean,
                f"{alias}_nll_sum_nats": mean * n_tokens,
                f"{alias}_n_tokens": n_tokens,
                f"{alias}_bits_per_byte": None if number % 7 == 0 else mean / 3,
                f"{alias}_revision": f"rev-{alias}",
            }
        rows.append(row)
    return rows


def write_matrix(spark: Any, config: ExperimentConfig, rows: list[dict[str, Any]]) -> None:
    table = schemas.score_matrix(ALIASES)
    frame = spark.createDataFrame([tuple(row[c] for c in table.column_names) for row in rows], table.spark_schema())
    tables.append(frame, config.layout.table("score_matrix"), table)


def write_record(config: ExperimentConfig, alias: str, tokenizer_hash: str = "t" * 32) -> None:
    record = {
        "model_id": alias, "model_revision": f"rev-{alias}", "tokenizer_hash": tokenizer_hash, "dtype": "float32",
        "context_tokens": 64, "window_overlap_tokens": 8, "context_prefix": "none", "document_separator": "x",
        "document_separator_id": 0, "prefix_token_id": None, "vocab_size": 8, "n_parameters": 1, "weights_hash": "w",
        "path": "p",
    }  # fmt: skip
    storage.write_json(config.layout.model(f"{alias}.json"), record)


def with_corpora(config: ExperimentConfig, **made: CorpusConfig) -> ExperimentConfig:
    return dataclasses.replace(config, refine=dataclasses.replace(config.refine, corpora=made))


def ids(frame: Any) -> list[str]:
    return sorted(row[0] for row in frame.select("instance_id").collect())


N_ROWS = 300
TEXTS = [f"text {number} of some words" for number in range(N_ROWS)]


def rows_of_matrix() -> list[dict[str, Any]]:
    """Scores of two digits, so with ties; rows of the texts, in their order."""
    return [row | {"instance_id": instance_id(text)} for row, text in zip(matrix_rows(N_ROWS), TEXTS, strict=True)]


def candidates(min_tokens: int = 32) -> list[dict[str, Any]]:
    rows = [row for row in rows_of_matrix() if row["split"] == "pool" and row["teacher_n_tokens"] >= min_tokens]
    return [row | {"score": row["reference_nll_mean"] - row["teacher_nll_mean"]} for row in rows]
