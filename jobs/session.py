"""The Spark session of a command: Delta's jars and the settings that every job needs. Driver only.

Input: the section `spark` of the config; output: a session. Delta's jars come from this node's cache if all are there,
else by Maven coordinates, without those that pyspark contains. Under spark-submit, the properties given there win over
the config's, and these over the defaults here. Reads and writes no table.
"""

import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jobs import java
from miniplm_udf import stopping, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.upkeep import preflight

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

DELTA_PACKAGE = "io.delta:delta-spark_4.2_2.13:4.4.0"
# Dependencies of Delta's coordinates that pyspark contains already, or that only other storages need.
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

# The master that spark-submit sets where none is given.
_NO_MASTER = "local[*]"

DELTA_JARS = (
    "io.delta_delta-spark_4.2_2.13-4.4.0.jar",
    "io.delta_delta-storage-4.4.0.jar",
    "io.delta_delta-kernel-api-4.4.0.jar",
    "io.delta_delta-kernel-defaults-4.4.0.jar",
    "io.delta_delta-kernel-unitycatalog-4.4.0.jar",
    "com.google.code.findbugs_jsr305-3.0.2.jar",
)


def delta_jars() -> dict[str, str]:
    """The properties with Delta's jars: this node's cache if all are there (no network), else Maven coordinates."""
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
    """Settings of a session of this project; a property file or `spark.conf` in the config may change each."""
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
        # Spark's own default does not know API_KEY, so that its pages would show OPENAI_API_KEY of the executors.
        "spark.redaction.regex": "(?i)secret|password|token|access[.]?key|api[._]?key",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.debug.maxToStringFields": "100",
    }


def make_session(config: ExperimentConfig, name: str) -> "SparkSession":
    """Starts (or joins) the Spark session of a command.

    Args:
        config: its `spark.master` and `spark.conf` win over the defaults; properties of spark-submit win over both. A
            master `local[*]` counts as not given, because spark-submit sets it where none is given.
        name: application name.

    Returns:
        The session.

    Raises:
        ConfigError: spark-submit has started the driver without Delta's jars.
    """
    from pyspark import SparkConf, SparkContext
    from pyspark.logger import PySparkLogger
    from pyspark.sql import SparkSession

    # These loggers print every error with Java's stack, even one that is caught: an expression is tried over several
    # tables.
    for logger in ("SQLQueryContextLogger", "DataFrameQueryContextLogger"):
        PySparkLogger.getLogger(logger).setLevel(logging.CRITICAL)
    # pyspark itself reads only this variable; spark-submit sets it from the property.
    os.environ.setdefault("PYSPARK_PYTHON", config.spark.conf.get("spark.pyspark.python", sys.executable))
    cores = _cores()
    is_submitted = "PYSPARK_GATEWAY_PORT" in os.environ  # spark-submit has started the JVM, and the JVM this Python
    if is_submitted:
        # Only a Python that is connected to the JVM can read its properties.
        SparkContext._ensure_initialized()
    submitted = SparkConf(loadDefaults=is_submitted)
    builder = SparkSession.builder.appName(name)
    jars = {} if submitted.contains("spark.jars.packages") or submitted.contains("spark.jars") else delta_jars()
    for key, value in {**jars, **_defaults(cores), **config.spark.conf}.items():
        if not submitted.contains(key):
            builder = builder.config(key, value)
    if submitted.get("spark.master", _NO_MASTER) == _NO_MASTER:
        master = config.spark.master or f"local[{cores},4]"
        if master.startswith("local"):
            os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        builder = builder.master(master)
    before = signal.getsignal(signal.SIGINT)
    session = builder.getOrCreate()
    _require_delta(session)
    java.leave_signals_to_python(session)
    if stopping.is_taken(before):
        signal.signal(signal.SIGINT, before)  # a new context replaces the handler of SIGINT
    if level := os.environ.get("MINIPLM_SPARK_LOG_LEVEL"):
        session.sparkContext.setLogLevel(level)
    return session


def _require_delta(session: "SparkSession") -> None:
    """Raises a ConfigError if spark-submit has started the driver without Delta's jars, which it alone can add."""
    from py4j.java_gateway import JavaPackage

    if isinstance(session._jvm.io.delta.tables.DeltaTable, JavaPackage):
        session.stop()
        raise ConfigError(
            f"spark.jars.packages: expected Delta's jars on the driver, found none; submit with --packages "
            f"{DELTA_PACKAGE}, or with a --properties-file of conf/spark/, which names them"
        )


@contextlib.contextmanager
def spark_session(config: ExperimentConfig, name: str) -> "Iterator[SparkSession]":
    """Starts the Spark session of a command (`make_session`), and stops it after the block.

    Args:
        config: the experiment.
        name: name of the Spark application.
    """
    session = make_session(config, name)
    try:
        yield session
    finally:
        session.stop()


@contextlib.contextmanager
def command_session(config: ExperimentConfig, command: str, needed: Sequence[str]) -> "Iterator[SparkSession]":
    """Starts the session of a command that is not a stage, and checks that its tables are there (`preflight.check`).

    Args:
        config: the experiment.
        command: name of the command, for the name of the Spark application.
        needed: kinds of tables that the command needs.

    Raises:
        CorpusError: a table that the command needs is gone.
    """
    with spark_session(config, f"miniplm {command}") as session:
        preflight.check(session, config, needed)
        yield session


def new_run_id() -> str:
    """A new id of a run of a command: 32 hexadecimal digits."""
    return uuid.uuid4().hex
