"""Helpers of the score tests: instances, tiny models, and fake scorers whose score is a function of the text."""

import dataclasses
import datetime
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miniplm_udf import schemas
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig, RefineConfig
from miniplm_udf.config.sections import ModelConfig, ScoreConfig
from miniplm_udf.scoring.results import Failure, Score
from miniplm_udf.store import tables
from tests.support.tiny_models import SEPARATOR, make_model_folder


def fake_nll(text: str, scale: float) -> float:
    return scale * sum(text.encode()) / 100


def fake_n_tokens(text: str) -> int:
    return len(text.split())


class FakeScorer:
    def __init__(self, scale: float, log: str) -> None:
        self.scale, self.log = scale, Path(log)

    def score(
        self, texts: Sequence[str | None], segment_ends: Sequence[Sequence[int]], ends_document: Sequence[bool]
    ) -> list[Any]:
        results: list[Any] = []
        for text in texts:
            assert text is not None
            with self.log.open("a") as handle:
                handle.write(f"{self.scale} {text[:40]}\n")
            if text.startswith("nan"):
                results.append(Score(math.nan, 5, len(text.encode())))
            elif text.startswith("inf"):
                results.append(Score(math.inf, 5, len(text.encode())))
            elif text.startswith("fail"):
                results.append(Failure("no_tokens", "the fake refuses it"))
            else:
                # If a text begins with `part`, not every byte is scored.
                n_bytes = len(text.encode()) - text.startswith("part")
                results.append(Score(fake_nll(text, self.scale), fake_n_tokens(text), n_bytes))
        return results


@dataclasses.dataclass(frozen=True)
class FakeFactory:
    """Makes a `FakeScorer`; `log` has a line for every text that was scored."""

    scale: float
    log: str

    @property
    def key(self) -> str:
        return f"fake/{self.scale}/{self.log}"

    def __call__(self) -> FakeScorer:
        return FakeScorer(self.scale, self.log)


def instance_id(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


def write_instances(
    spark: Any,
    config: ExperimentConfig,
    texts: Sequence[str],
    split: str = "pool",
    source: str = "web",
    batch_id: int = 0,
) -> None:
    """Appends one instance a text, in one commit."""
    from pyspark.sql import Row

    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    rows = [
        Row(
            instance_id=instance_id(text), stream_id=instance_id(text), ordinal=0, document_ids=[text[:20]],
            start_byte=0, source=source, text=text, segment_ends=[], starts_document=True, ends_document=True,
            n_bytes=len(text.encode()), content_hash=instance_id("content" + text), split=split, metadata=None,
            ingested_at=now, query_id="0" * 32, batch_id=batch_id,
        )
        for text in texts
    ]  # fmt: skip
    frame = spark.createDataFrame(rows, schemas.INSTANCES.spark_schema())
    tables.append(frame, config.layout.table("instances"), schemas.INSTANCES)


def model_config(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(
        path=str(folder), document_separator=SEPARATOR, context_tokens=64, window_overlap_tokens=8, **changes
    )


def experiment(
    root: Path, models: dict[str, ModelConfig], corpora: dict[str, CorpusConfig] | None = None, **score: Any
) -> ExperimentConfig:
    return ExperimentConfig(
        root=str(root),
        models=models,
        score=ScoreConfig(tokens_per_batch=256, **score),
        refine=RefineConfig(tokens_of="teacher", corpora=corpora or {}),
    )


def two_models(folder: Path) -> dict[str, ModelConfig]:
    return {
        "teacher": model_config(make_model_folder(folder, name="teacher", seed=1)),
        "reference": model_config(make_model_folder(folder, name="small", seed=2, hidden_size=16)),
    }


def texts(n: int, start: int = 0, words: int = 40) -> list[str]:
    return [
        f"text {i} " + " ".join(f"w{(i * 37 + j * 11) % 101}" for j in range(words)) for i in range(start, start + n)
    ]


def scored_texts(log: Path, scale: float) -> list[str]:
    lines = log.read_text().splitlines() if log.exists() else []
    return sorted(line.split(" ", 1)[1] for line in lines if line.startswith(f"{scale} "))
