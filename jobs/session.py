"""The Spark session of a command: Delta's jars and the settings that every job needs. Driver only.

Input: the sections `spark` and `storage` of the config; output: a session. The jars (spark_jars.py) for S3 are there if
the root or the input is on S3. Under spark-submit, the properties given there win over the config's, and these over the
defaults here. Reads and writes no table.
"""

import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jobs import java, spark_jars
from miniplm_udf import object_storage, stopping, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.streams import spark_log
from miniplm_udf.task_progress import watched_tasks
from miniplm_udf.upkeep import preflight

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.jobs")

# The master that spark-submit sets where none is given.
_NO_MASTER = "local[*]"


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
        # A worker sends its rows when so many bytes are full: with the default of 64 KiB, progress comes minutes late.
        "spark.sql.execution.pandas.udf.buffer.size": "1024",
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
        # Threads of torch that wait for each other sleep: next to other work, threads that spin keep it from the cores.
        "spark.executorEnv.OMP_WAIT_POLICY": "PASSIVE",
        "spark.driver.memory": "4g",
        "spark.sql.warehouse.dir": str(storage.cache_folder() / "warehouse"),
        "spark.log.level": "ERROR",
        # Spark's own default does not know API_KEY, so that its pages would show OPENAI_API_KEY of the executors.
        "spark.redaction.regex": "(?i)secret|password|token|access[._]?key|api[._]?key",
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
        ConfigError: spark-submit has started the driver without the jars of Delta or of S3.
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
    with_s3 = any(map(object_storage.is_s3, [config.root, *config.ingest.inputs]))
    service = object_storage.use(config.storage)
    for_s3 = service.spark_properties() if with_s3 else {}
    has_jars = submitted.contains("spark.jars.packages") or submitted.contains("spark.jars")
    jars = {} if has_jars else spark_jars.jar_properties(with_s3, config.spark.conf)
    # The JVM of spark-submit runs already.
    start = {} if is_submitted else spark_log.start_properties()
    for key, value in {**_defaults(cores), **start, **for_s3, **config.spark.conf, **jars}.items():
        if not submitted.contains(key):
            builder = builder.config(key, value)
    if submitted.get("spark.master", _NO_MASTER) == _NO_MASTER:
        master = config.spark.master or f"local[{cores},4]"
        if master.startswith("local"):
            os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        builder = builder.master(master)
    before = signal.getsignal(signal.SIGINT)
    session = builder.getOrCreate()
    spark_jars.require_classes(session, with_s3)
    java.leave_signals_to_python(session)
    if stopping.is_taken(before):
        signal.signal(signal.SIGINT, before)  # a new context replaces the handler of SIGINT
    if level := os.environ.get("MINIPLM_SPARK_LOG_LEVEL"):
        session.sparkContext.setLogLevel(level)
    elif not spark_log.is_wanted():
        # The command prints one line about the error that ends it.
        spark_log.silence(session, [spark_log.QUERY_LOGGER, *spark_log.TASK_LOGGERS])
    return session


@contextlib.contextmanager
def spark_session(config: ExperimentConfig, name: str) -> "Iterator[SparkSession]":
    """Starts the Spark session of a command (`make_session`), and stops it after the block.

    Args:
        config: the experiment.
        name: name of the Spark application.
    """
    LOGGER.info("%s: starting Spark", name.removeprefix("miniplm ") if name != "miniplm" else "run")
    session = make_session(config, name)
    try:
        yield session
    except BaseException:
        if not spark_log.is_wanted():
            # Tasks that still run fail while the session stops, and Spark would log their stacks.
            with contextlib.suppress(Exception):  # a signal may have ended the JVM
                session.sparkContext.setLogLevel("OFF")
        raise
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
    with spark_session(config, f"miniplm {command}") as session, watched_tasks(session, command):
        preflight.check(session, config, needed)
        yield session


def new_run_id() -> str:
    """A new id of a run of a command: 32 hexadecimal digits."""
    return uuid.uuid4().hex
