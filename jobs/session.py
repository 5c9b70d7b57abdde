"""The Spark session of a command, and the frame around every stage's `main`: config, session, exit code.

Owns Delta's jars (by Maven coordinates, only those that pyspark does not hold itself), the settings every job needs,
and the turning of an error into one line and an exit code. Owns no table. Driver only. Under spark-submit the master
and every property given there win over what is set here.
"""

import argparse
import json
import logging
import os
import sys
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jobs import records
from miniplm_udf import progress, storage
from miniplm_udf.config import ExperimentConfig, load_config, printable, to_dict
from miniplm_udf.errors import EXIT_DONE, EXIT_TOO_MANY_REJECTS, MiniplmError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.jobs")

DELTA_PACKAGE = "io.delta:delta-spark_4.2_2.13:4.4.0"
# What Delta's coordinates would drag in although pyspark has it already, or although only other storages need it.
DELTA_EXCLUDES = (
    "org.apache.hadoop:hadoop-client-api",
    "org.apache.hadoop:hadoop-client-runtime",
    "org.apache.hadoop:hadoop-aws",
    "org.apache.parquet:parquet-hadoop",
    "org.apache.parquet:parquet-column",
    "com.fasterxml.jackson.core:*",
    "com.fasterxml.jackson.datatype:*",
    "com.fasterxml.jackson.module:*",
    "io.unitycatalog:*",
    "org.apache.logging.log4j:*",
    "org.slf4j:*",
    "org.locationtech.jts:*",
    "org.roaringbitmap:*",
    "com.github.luben:*",
)


DELTA_JARS = (
    "io.delta_delta-spark_4.2_2.13-4.4.0.jar",
    "io.delta_delta-storage-4.4.0.jar",
    "io.delta_delta-kernel-api-4.4.0.jar",
    "io.delta_delta-kernel-defaults-4.4.0.jar",
    "io.delta_delta-kernel-unitycatalog-4.4.0.jar",
    "com.google.code.findbugs_jsr305-3.0.2.jar",
)


def _delta_jars() -> dict[str, str]:
    """Delta's jars: from this node's cache where they are there (no network, no resolving), else by coordinates."""
    ivy = storage.cache_folder() / "ivy"
    cached = [ivy / "jars" / name for name in DELTA_JARS]
    if all(path.exists() for path in cached):
        return {"spark.jars": ",".join(map(str, cached))}
    return {
        "spark.jars.ivy": str(ivy),
        "spark.jars.packages": DELTA_PACKAGE,
        "spark.jars.excludes": ",".join(DELTA_EXCLUDES),
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _defaults(cores: int) -> dict[str, str]:
    """Settings for a session of this project; a property file or `spark.conf` in the config may change each."""
    return {
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.shuffle.partitions": str(cores),
        "spark.databricks.delta.snapshotPartitions": str(cores),
        "spark.sql.execution.arrow.maxRecordsPerBatch": "1000",
        # Small parts, so that scorers get even shares of a micro-batch's files without a shuffle of the text.
        "spark.hadoop.parquet.block.size": str(16 * 1024 * 1024),
        "spark.sql.files.maxPartitionBytes": "16m",
        # Ids and scores differ from row to row.
        "spark.hadoop.parquet.enable.dictionary#instance_id": "false",
        "spark.hadoop.parquet.enable.dictionary#score": "false",
        "spark.sql.streaming.stateStore.providerClass": (
            "org.apache.spark.sql.execution.streaming.state.RocksDBStateStoreProvider"
        ),
        "spark.sql.streaming.stateStore.rocksdb.changelogCheckpointing.enabled": "true",
        "spark.executorEnv.OMP_NUM_THREADS": str(cores),
        "spark.driver.memory": "4g",
        "spark.sql.warehouse.dir": str(storage.cache_folder() / "warehouse"),
        "spark.log.level": "ERROR",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.debug.maxToStringFields": "100",
    }


def make_session(config: ExperimentConfig, name: str) -> "SparkSession":
    """Starts (or joins) the Spark session of a command.

    Args:
        config: its `spark.master` and `spark.conf` win over the defaults; what spark-submit was given wins over both.
        name: application name.
    """
    from pyspark import SparkConf
    from pyspark.logger import PySparkLogger
    from pyspark.sql import SparkSession

    # They log, with Java's stack, what is raised, also where it is caught: an expression is tried over several tables.
    for logger in ("SQLQueryContextLogger", "DataFrameQueryContextLogger"):
        PySparkLogger.getLogger(logger).setLevel(logging.CRITICAL)
    # pyspark itself looks at this variable alone; spark-submit sets it from the property.
    os.environ.setdefault("PYSPARK_PYTHON", config.spark.conf.get("spark.pyspark.python", sys.executable))
    cores = _cores()
    given = SparkConf()
    builder = SparkSession.builder.appName(name)
    jars = {} if given.contains("spark.jars.packages") or given.contains("spark.jars") else _delta_jars()
    for key, value in {**jars, **_defaults(cores), **config.spark.conf}.items():
        if not given.contains(key):
            builder = builder.config(key, value)
    if not given.contains("spark.master"):
        master = config.spark.master or f"local[{cores},4]"
        if master.startswith("local"):
            os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        builder = builder.master(master)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel(os.environ.get("MINIPLM_SPARK_LOG_LEVEL", "ERROR"))
    return session


def stage_parser(stage: str, description: str | None) -> argparse.ArgumentParser:
    """The command line that all stages share."""
    parser = argparse.ArgumentParser(
        prog=f"miniplm {stage}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    return parser


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", required=True, help="experiment file, e.g. conf/demo.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the plan; do nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. root=/data/run1")


def new_run_id() -> str:
    return uuid.uuid4().hex


def exit_code(summary: dict[str, Any]) -> int:
    """3 where a stage says that its rejects passed the configured share, else 0."""
    return EXIT_TOO_MANY_REJECTS if summary.get("too_many_rejects") else EXIT_DONE


def guarded(body: Callable[[], int]) -> int:
    """Runs `body`; a MiniplmError becomes one line on stderr and its exit code, everything else keeps its traceback."""
    progress.configure_logging()
    try:
        return body()
    except MiniplmError as error:
        if os.environ.get("MINIPLM_LOG_LEVEL") == "DEBUG":
            LOGGER.exception("failed")
        print(f"miniplm: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def stage_main(
    stage: str, run: Callable[["SparkSession", ExperimentConfig], dict[str, Any]], description: str | None,
    argv: Sequence[str] | None = None,
) -> int:  # fmt: skip
    """`main` of one Spark stage: resolve the config, make the session, run, print the summary, return the exit code."""

    def body() -> int:
        arguments = stage_parser(stage, description).parse_intermixed_args(argv)
        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            print(json.dumps(printable(to_dict(config)), indent=2))
            return EXIT_DONE
        session = make_session(config, f"miniplm {stage}")
        try:
            summary = records.execute(stage, run, session, config)
        finally:
            session.stop()
        print(json.dumps({stage: summary}, indent=2, default=str))
        return exit_code(summary)

    return guarded(body)
