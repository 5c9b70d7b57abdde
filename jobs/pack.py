"""Packs refined corpora, and generated texts, into token sequences for the students.

Reads `refined/<corpus>`, `instances` and `generations`; writes `packed/<corpus>/<tokenizer>` and
`models/tokenizer_<name>`. A corpus that is packed already, from the same version with the same tokenizer, is left as it
is: a rerun continues after a kill. Driver only.

    miniplm pack -c conf/demo.yaml [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/pack.py -c conf/demo.yaml
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.stage_runner import stage_main
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.generate import GENERATED
from miniplm_udf.errors import ConfigError
from miniplm_udf.lease import Lease
from miniplm_udf.packing.corpus import PackSummary, pack_corpus, pack_generated, pack_reference

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedSummary:
    """The result of `miniplm pack`: the packed tables by "corpus/tokenizer", and the seconds that it took."""

    packed: dict[str, PackSummary]
    seconds: float


def run(spark: "SparkSession", config: ExperimentConfig) -> PackedSummary:
    """Packs each (corpus, tokenizer) that a student trains on, once; returns the summary of the stage.

    Args:
        spark: the command's session.
        config: the experiment.

    Raises:
        ConfigError: the config has no students.
    """
    pairs = sorted({(student.corpus, student.tokenizer) for student in config.students.values()})
    if not pairs:
        raise ConfigError("students: expected at least one to pack for, found none")
    started = time.monotonic()
    with _lease(config):
        packed = {f"{corpus}/{tokenizer}": _packed(spark, config, corpus, tokenizer) for corpus, tokenizer in pairs}
    return PackedSummary(packed=packed, seconds=time.monotonic() - started)


def _packed(spark: "SparkSession", config: ExperimentConfig, corpus: str, tokenizer: str) -> PackSummary:
    if config.generate is not None and corpus == GENERATED:
        return pack_generated(spark, config, tokenizer)
    return pack_corpus(spark, config, corpus, tokenizer)


def run_reference(spark: "SparkSession", config: ExperimentConfig) -> PackedSummary:
    """Packs the reference split for the training of the reference; returns the summary.

    Args:
        spark: the command's session.
        config: the experiment.
    """
    started = time.monotonic()
    with _lease(config):
        summary = pack_reference(spark, config)
    name = config.reference.tokenizer if config.reference else ""
    return PackedSummary(packed={f"reference/{name}": summary}, seconds=time.monotonic() - started)


def _lease(config: ExperimentConfig) -> Lease:
    """The lease of packing. A second process waits, then finds the finished tokenizers and tables and keeps them."""
    return Lease(config.layout.lease("pack"), "pack", waits=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm pack` and returns its exit code; `argv` defaults to the arguments of the process."""
    return stage_main("pack", argv)


if __name__ == "__main__":
    sys.exit(main())
