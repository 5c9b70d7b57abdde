"""Packs refined corpora into token sequences for the students.

    miniplm pack -c conf/demo.yaml [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/pack.py -c conf/demo.yaml

Reads `refined/<corpus>` and `instances`; writes `packed/<corpus>/<tokenizer>` and `models/tokenizer_<name>`. What is
packed already from the same version with the same tokenizer is left alone: a rerun goes on where a kill stopped it.
"""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs.session import stage_main
from miniplm_udf.config import ExperimentConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.pack import pack_corpus, pack_reference

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def run(spark: "SparkSession", config: ExperimentConfig) -> dict[str, Any]:
    """Packs each (corpus, tokenizer) that a student trains on, once."""
    pairs = sorted({(student.corpus, student.tokenizer) for student in config.students.values()})
    if not pairs:
        raise ConfigError("students: expected at least one to pack for, found none")
    started = time.monotonic()
    packed = {f"{corpus}/{tokenizer}": pack_corpus(spark, config, corpus, tokenizer) for corpus, tokenizer in pairs}
    return {"packed": packed, "seconds": time.monotonic() - started}


def run_reference(spark: "SparkSession", config: ExperimentConfig) -> dict[str, Any]:
    """Packs what the reference is trained on. Only wanted while there is no reference: it is frozen once trained."""
    started = time.monotonic()
    summary = pack_reference(spark, config)
    name = config.reference.tokenizer if config.reference else ""
    return {"packed": {f"reference/{name}": summary}, "seconds": time.monotonic() - started}


def main(argv: Sequence[str] | None = None) -> int:
    return stage_main("pack", run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
