"""The same small experiment on any storage: its config, its input files, and its commands by name.

The scores are functions of the texts, so that two roots can be compared row by row. Used by the tests of a root on S3
and by the benchmark of storages.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import zstandard

from jobs import ingest, refine, score
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig, SelectConfig
from miniplm_udf.config.sections import ChunkingConfig, IngestConfig, SplitConfig
from miniplm_udf.corpora import listing, versions
from miniplm_udf.corpora.export import ExportRequest, export
from miniplm_udf.upkeep.maintain import maintain
from miniplm_udf.upkeep.verify import verify
from tests.support.score_tables import FakeFactory, experiment, texts, two_models

CORPUS = "kept"
DOCUMENTS = 10


def make_config(folder: Path) -> ExperimentConfig:
    """The experiment, with its root and its input below a local folder; each file is a micro-batch."""
    kept = CorpusConfig(score="reference_nll_mean - teacher_nll_mean", where="true", select=SelectConfig(ratio=0.5))
    return dataclasses.replace(
        experiment(folder / "root", two_models(folder), {CORPUS: kept}),
        ingest=IngestConfig(
            input=str(folder / "in"), state_partitions=1, max_files_per_trigger=1,
            chunking=ChunkingConfig(max_tokens=65), split=SplitConfig(heldout=0.1, reference=0.1),
        ),
    )  # fmt: skip


def at(config: ExperimentConfig, root: str, input: str) -> ExperimentConfig:
    """The experiment in another place."""
    return dataclasses.replace(config, root=root, ingest=dataclasses.replace(config.ingest, input=input))


def put_file(config: ExperimentConfig, number: int) -> None:
    """Writes a compressed input file of ten documents; each document is a function of its number."""
    first = DOCUMENTS * number
    lines = [json.dumps({"id": f"d{first + i}", "text": text}) for i, text in enumerate(texts(DOCUMENTS, first))]
    with fsspec.open(f"{config.ingest.inputs[0]}/part-{number}.jsonl.zst", "wb", auto_mkdir=True) as file:
        file.write(zstandard.compress("\n".join(lines).encode()))


def factories(folder: Path) -> Mapping[str, FakeFactory]:
    return {"teacher": FakeFactory(1.0, f"{folder}/log"), "reference": FakeFactory(2.0, f"{folder}/log")}


def _verified(spark: Any, root: str) -> None:
    assert [check for check in verify(spark, root) if not check.ok] == []


def commands(spark: Any, config: ExperimentConfig, folder: Path) -> dict[str, Callable[[], Any]]:
    """The commands by name, in an order in which they can run."""
    tags = (f"pin-{number}" for number in itertools.count())
    request = ExportRequest(to="jsonl.zst", out=f"{config.root}/exports/{CORPUS}", overwrite=True)
    return {
        "ingest": lambda: ingest.run(spark, config),
        "score": lambda: score.run(spark, config, factories(folder)),
        "refine": lambda: refine.run(spark, config),
        "corpus list": lambda: listing.listing(config.root),
        "corpus pin": lambda: versions.pin(spark, config.root, CORPUS, next(tags)),
        "maintain": lambda: maintain(spark, config, retain_hours=0.0, abandoned_days=7.0, dry_run=False),
        "verify": lambda: _verified(spark, config.root),
        "export": lambda: export(spark, config, CORPUS, request),
    }
