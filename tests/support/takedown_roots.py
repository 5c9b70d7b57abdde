"""A small root that went through every stage, from which documents are taken down."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jobs import ingest, score
from miniplm_udf import storage
from miniplm_udf.config.refine import CorpusConfig, SelectConfig
from miniplm_udf.config.sections import ChunkingConfig, IngestConfig, PackConfig, SplitConfig, TokenizerConfig
from miniplm_udf.ingestion.summary import IngestSummary
from miniplm_udf.scores.summary import ScoreSummary
from miniplm_udf.store import tables
from miniplm_udf.store.takedowns import Takedown
from miniplm_udf.upkeep import verify
from tests.support.score_tables import FakeFactory, experiment, two_models

ASKED = Takedown("a test", "a court says so")


class TakedownRoot:
    """A root that went through ingest (packed: instances of several documents), score, refine, pin and pack."""

    def __init__(self, spark: Any, folder: Path) -> None:
        self.spark, self.folder = spark, folder
        everything = CorpusConfig(where="true", select=SelectConfig(ratio=1.0))
        self.config = dataclasses.replace(
            experiment(folder / "root", two_models(folder), {"kept": everything}),
            ingest=IngestConfig(
                input=f"{folder}/*.jsonl", chunking=ChunkingConfig(mode="packed", max_tokens=700),
                split=SplitConfig(reference=0, heldout=0), state_partitions=1,
            ),
            tokenizers={"bpe": TokenizerConfig(vocab_size=300)},
            pack=PackConfig(sequence_length=16),
        )  # fmt: skip

    def deliver(self, name: str, documents: list[str]) -> None:
        rows = [{"id": text.split(" w")[0], "text": text} for text in documents]
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def ingest(self) -> IngestSummary:
        return ingest.run(self.spark, self.config)

    def score(self) -> ScoreSummary:
        log = str(self.folder / "calls.log")
        factories = {"teacher": FakeFactory(1.0, log), "reference": FakeFactory(2.0, log)}
        return score.run(self.spark, self.config, factories)

    def rows(self, name: str) -> list[Any]:
        return list(tables.read(self.spark, self.config.layout.table(name)).collect())

    def documents(self) -> set[str]:
        return {one for row in self.rows("instances") for one in row["document_ids"]}

    def wrong(self) -> list[verify.Check]:
        return [check for check in verify.verify(self.spark, self.config.root) if not check.ok or check.behind]

    def on_disk(self, name: str) -> list[dict[str, Any]]:
        """The rows of all files of a table, whatever its newest version has."""
        folder = Path(storage.local_path(self.config.layout.table(name)))
        found = [row for path in folder.rglob("*.parquet") if "_delta_log" not in path.parts for row in file_rows(path)]
        return found


def file_rows(path: Path) -> list[dict[str, Any]]:
    return list(pq.ParquetFile(path).read().to_pylist())
