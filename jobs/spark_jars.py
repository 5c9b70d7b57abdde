"""The jars of a Spark session: Delta's, and for S3 Hadoop's connector with AWS's client. Driver only.

Output: the properties that name the jars: files of this node's cache if all are there (no network), else Maven
coordinates without what pyspark contains already. `miniplm-s3.jar` comes with this package (miniplm_udf/s3_commits).
"""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from miniplm_udf import storage
from miniplm_udf.errors import ConfigError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

DELTA_PACKAGES = ("io.delta:delta-spark_4.2_2.13:4.4.0",)
# pyspark 4.2.0 contains Hadoop 3.5.0. hadoop-aws by itself brings a bundle of 700 MB; these are its parts.
S3_PACKAGES = (
    "org.apache.hadoop:hadoop-aws:3.5.0",
    "software.amazon.awssdk:s3:2.35.4",
    "software.amazon.awssdk:s3-transfer-manager:2.35.4",
)
# What pyspark contains already, or what nothing here uses.
EXCLUDES = (
    "org.apache.hadoop:hadoop-client-api",
    "org.apache.hadoop:hadoop-client-runtime",
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
    "software.amazon.awssdk:bundle",
    "org.wildfly.openssl:*",
    "io.netty:*",
)
# Delta names hadoop-aws as a dependency, which a root on another storage does not need.
_HADOOP_AWS = "org.apache.hadoop:hadoop-aws"

_DELTA_JARS = (
    "io.delta_delta-spark_4.2_2.13-4.4.0.jar",
    "io.delta_delta-storage-4.4.0.jar",
    "io.delta_delta-kernel-api-4.4.0.jar",
    "io.delta_delta-kernel-defaults-4.4.0.jar",
    "io.delta_delta-kernel-unitycatalog-4.4.0.jar",
    "com.google.code.findbugs_jsr305-3.0.2.jar",
)
_AWS_PARTS = (
    "annotations", "apache-client", "arns", "auth", "aws-core", "aws-query-protocol", "aws-xml-protocol", "checksums",
    "checksums-spi", "crt-core", "endpoints-spi", "http-auth", "http-auth-aws", "http-auth-aws-eventstream",
    "http-auth-spi", "http-client-spi", "identity-spi", "json-utils", "metrics-spi", "netty-nio-client", "profiles",
    "protocol-core", "regions", "retries", "retries-spi", "s3", "s3-transfer-manager", "sdk-core",
    "third-party-jackson-core", "utils", "utils-lite",
)  # fmt: skip
_S3_JARS = (
    "org.apache.hadoop_hadoop-aws-3.5.0.jar",
    *(f"software.amazon.awssdk_{name}-2.35.4.jar" for name in _AWS_PARTS),
    "software.amazon.eventstream_eventstream-1.0.1.jar",
    "software.amazon.s3.analyticsaccelerator_analyticsaccelerator-s3-1.3.1.jar",
    "org.apache.httpcomponents_httpclient-4.5.13.jar",
    "org.apache.httpcomponents_httpcore-4.4.16.jar",
    "org.reactivestreams_reactive-streams-1.0.4.jar",
    "commons-codec_commons-codec-1.17.1.jar",
    "commons-logging_commons-logging-1.2.jar",
)
# Settings of the user that add to the jars here; any other setting of the user replaces the one here.
_LISTS = ("spark.jars", "spark.jars.packages", "spark.jars.excludes")


def s3_commits_jar() -> str:
    """Returns the path of the jar with this project's classes for Delta's log and checkpoints on S3."""
    return str(resources.files("miniplm_udf.s3_commits") / "miniplm-s3.jar")


def jar_folder() -> Path:
    """Returns this node's folder of jars, which Maven fills."""
    return storage.cache_folder() / "ivy" / "jars"


def missing_jars(with_s3: bool) -> list[str]:
    """Returns the names of the jars that are not in this node's cache.

    Args:
        with_s3: whether the session reads or writes S3.
    """
    return [name for name in _jar_names(with_s3) if not (jar_folder() / name).exists()]


def _jar_names(with_s3: bool) -> Sequence[str]:
    return (*_DELTA_JARS, *(_S3_JARS if with_s3 else ()))


def jar_properties(with_s3: bool, given: Mapping[str, str]) -> dict[str, str]:
    """Returns the properties that name the jars of a session.

    Args:
        with_s3: whether the session reads or writes S3.
        given: the user's settings by key; jars and packages that they name are added.
    """
    own = [s3_commits_jar()] if with_s3 else []
    if not missing_jars(with_s3):
        cached = [str(jar_folder() / name) for name in _jar_names(with_s3)]
        properties = {"spark.jars": ",".join([*cached, *own])}
    else:
        excludes = [*EXCLUDES, *([] if with_s3 else [_HADOOP_AWS])]
        properties = {
            "spark.jars.ivy": str(jar_folder().parent),
            "spark.jars.packages": ",".join([*DELTA_PACKAGES, *(S3_PACKAGES if with_s3 else ())]),
            "spark.jars.excludes": ",".join(excludes),
            **({"spark.jars": ",".join(own)} if own else {}),
        }
    for key in _LISTS:
        if given.get(key):
            properties[key] = ",".join(filter(None, [properties.get(key), *re.split(r"[\s,]+", given[key])]))
    return properties


def require_classes(session: "SparkSession", with_s3: bool) -> None:
    """Refuses a driver that spark-submit has started without the jars, because only spark-submit can add them.

    Args:
        session: the session.
        with_s3: whether it reads or writes S3.

    Raises:
        ConfigError: Delta's jars, or those for S3, are not on the driver.
    """
    if not _has_class(session, "io.delta.tables.DeltaTable"):
        session.stop()
        raise ConfigError(
            f"spark.jars.packages: expected Delta's jars on the driver, found none; submit with --packages "
            f"{DELTA_PACKAGES[0]}, or with a --properties-file of conf/spark/, which names them"
        )
    if with_s3 and not _has_class(
        session, "miniplm.s3.ConditionalPutLogStore", "org.apache.hadoop.fs.s3a.S3AFileSystem"
    ):
        session.stop()
        raise ConfigError(
            "spark.jars.packages: expected the jars for S3 on the driver, found none; submit with --packages "
            f"{','.join([*DELTA_PACKAGES, *S3_PACKAGES])} --exclude-packages {','.join(EXCLUDES)} --jars "
            f"{s3_commits_jar()}"
        )


def _has_class(session: "SparkSession", *names: str) -> bool:
    from py4j.java_gateway import JavaPackage

    classes = []
    for name in names:
        place = session._jvm
        for part in name.split("."):
            place = getattr(place, part)
        classes.append(place)
    return not any(isinstance(place, JavaPackage) for place in classes)
