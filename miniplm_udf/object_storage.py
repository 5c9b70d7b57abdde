"""How this process, Spark and its workers reach S3: one description for the three clients that read and write a root.

Input: the section `storage` of the config and the usual variables (`AWS_ENDPOINT_URL`, `AWS_REGION`). Output:
environment variables for delta-rs and fsspec, and properties for Spark (s3a). Handles no credentials: each client finds
them by itself, in the environment, in `~/.aws` or in the machine's role. Other storages (`gs:`, `abfss:`, `hdfs:`) are
configured by their own clients. On the driver and in the trainer; imports no Spark.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from typing import Literal

import fsspec

from miniplm_udf import storage
from miniplm_udf.config.object_storage import StorageConfig
from miniplm_udf.storage import Json

LOGGER = logging.getLogger("miniplm.storage")

SCHEMES = ("s3a", "s3")
EarlierObjects = Literal["none", "kept", "unknown"]
_DEFAULT_REGION = "us-east-1"
# A service that is away or busy is asked again for about half a minute; s3fs then repeats some requests five times.
_RETRIES = {"mode": "standard", "max_attempts": 8}
# s3fs has this key in fsspec's configuration for both schemes.
_FSSPEC_KEY = "s3"


@dataclasses.dataclass(frozen=True)
class S3Service:
    """An S3 service.

    Attributes:
        endpoint: its URL; None is AWS.
        region: region of the buckets; None lets each client find it.
        path_style: whether requests name the bucket in the path of the URL.
    """

    endpoint: str | None
    region: str | None
    path_style: bool

    def environment(self) -> dict[str, str]:
        """The variables that delta-rs, s3fs and boto3 read, in this process and in Spark's workers."""
        variables = {"FSSPEC_S3": json.dumps(self._s3fs_options(), sort_keys=True)}
        if self.endpoint is not None:
            variables |= {"AWS_ENDPOINT_URL": self.endpoint, "AWS_ENDPOINT_URL_S3": self.endpoint}
            variables["AWS_ALLOW_HTTP"] = str(self.endpoint.startswith("http:")).lower()
        if self.region is not None:
            variables |= {"AWS_REGION": self.region, "AWS_DEFAULT_REGION": self.region}
        variables["AWS_VIRTUAL_HOSTED_STYLE_REQUEST"] = str(not self.path_style).lower()
        return variables

    def _s3fs_options(self) -> Json:
        # Spark writes too, so a listing of a moment ago says nothing.
        options: Json = {"use_listings_cache": False, "config_kwargs": {"retries": _RETRIES}}
        if self.path_style:
            options["config_kwargs"]["s3"] = {"addressing_style": "path"}
        if self.endpoint is not None:
            options["endpoint_url"] = self.endpoint
        if self.region is not None:
            options["client_kwargs"] = {"region_name": self.region}
        return options

    def spark_properties(self) -> dict[str, str]:
        """The properties of a Spark session that reads and writes `s3a:` and `s3:` URIs."""
        s3a = {
            "path.style.access": str(self.path_style).lower(),
            # Hadoop's own chain does not read the files in ~/.aws.
            "aws.credentials.provider": ",".join(
                [
                    "org.apache.hadoop.fs.s3a.TemporaryAWSCredentialsProvider",
                    "org.apache.hadoop.fs.s3a.SimpleAWSCredentialsProvider",
                    "software.amazon.awssdk.auth.credentials.DefaultCredentialsProvider",
                ]
            ),
            # A service that is away or busy is asked again for about two minutes in all; then the command ends.
            "attempts.maximum": "3",
            "retry.limit": "6",
            "retry.interval": "500ms",
            "retry.throttle.limit": "12",
            "connection.establish.timeout": "10s",
            "connection.timeout": "60s",
            # No requests that look for a folder of the same name, or for parents. Commits do not depend on them.
            "performance.flags": "create,mkdir,delete",
        }
        if self.endpoint is not None:
            s3a |= {
                "endpoint": self.endpoint,
                "connection.ssl.enabled": str(self.endpoint.startswith("https:")).lower(),
            }
        if self.region is not None:
            s3a["endpoint.region"] = self.region
        log_stores = {f"spark.delta.logStore.{scheme}.impl": "miniplm.s3.ConditionalPutLogStore" for scheme in SCHEMES}
        return {
            **{f"spark.hadoop.fs.s3a.{key}": value for key, value in s3a.items()},
            "spark.hadoop.fs.s3.impl": "org.apache.hadoop.fs.s3a.S3AFileSystem",
            "spark.hadoop.fs.AbstractFileSystem.s3.impl": "org.apache.hadoop.fs.s3a.S3A",
            **log_stores,
            "spark.sql.streaming.checkpointFileManagerClass": "miniplm.s3.ConditionalPutFileManager",
            **{f"spark.executorEnv.{name}": value for name, value in self.environment().items()},
        }


def is_s3(uri: str) -> bool:
    """Whether a URI is of S3.

    Args:
        uri: a path or URI.
    """
    return uri.partition("://")[0] in SCHEMES and "://" in uri


def earlier_objects(uri: str) -> EarlierObjects:
    """Whether the storage keeps earlier versions of objects that are removed or replaced.

    Args:
        uri: a path or URI.

    Returns:
        none: it is a local disk, or a bucket of S3 without versions. kept: a bucket that has or had versions. unknown:
        the service did not say, or it is another storage.
    """
    if storage.is_local(uri):
        return "none"
    if not is_s3(uri):
        return "unknown"
    filesystem, path = fsspec.core.url_to_fs(uri)
    try:
        answer = filesystem.call_s3("get_bucket_versioning", Bucket=path.partition("/")[0])
    except Exception as error:  # without the permission s3:GetBucketVersioning, or a service that has no versions
        LOGGER.warning("%s: it is not known whether the bucket keeps versions: %s", storage.redact(uri), error)
        return "unknown"
    return "kept" if answer.get("Status") else "none"


def service(config: StorageConfig, environment: Mapping[str, str]) -> S3Service:
    """Returns the service that the config names, or else the environment.

    Args:
        config: the section `storage`.
        environment: `os.environ`.
    """
    endpoint = config.endpoint or environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or None
    region = config.region or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or None
    return S3Service(
        endpoint=endpoint.rstrip("/") if endpoint else None,
        region=region or (_DEFAULT_REGION if endpoint else None),
        path_style=bool(endpoint) if config.path_style is None else config.path_style,
    )


def use(config: StorageConfig) -> S3Service:
    """Makes delta-rs and fsspec reach the service in this process and in the processes that it starts.

    Args:
        config: the section `storage`.

    Returns:
        The service.
    """
    found = service(config, os.environ)
    variables = found.environment()
    os.environ.update(variables)
    # fsspec reads its variable when it is imported, which was earlier.
    fsspec.config.conf[_FSSPEC_KEY] = json.loads(variables["FSSPEC_S3"])
    return found
